"""The terms of the loss at the samples of one rank, by products, at the leader's orders.

A rank without samples of a term takes part in every transfer with nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.criteria.denominators import divided_by, for_rows, share_of
from ddnewton.distributed.team import Team
from ddnewton.inputs.samples import Samples
from ddnewton.linearize.free_linearization import FreeLinearization, linearized_freely
from ddnewton.linearize.use_of_parameters import depends_on_parameters
from ddnewton.quadratic.arguments import Arguments, function_of, of_complex_outputs
from ddnewton.quadratic.matrix_free.distant_root import Known
from ddnewton.quadratic.matrix_free.free_term import FreeTerm, Wholes, free_term, known_of
from ddnewton.quadratic.ranks.column_shard import ColumnShard
from ddnewton.quadratic.ranks.messages import (
    FreeOutputs,
    OwnShare,
    free_outputs_of,
    numbers_on,
)
from ddnewton.quadratic.term import Objective
from ddnewton.quadratic.trial_loss import trial_of
from ddnewton.trees import as_real, chunks

logger = logging.getLogger(__name__)

R = TypeVar("R")


class Entry(NamedTuple):
    """A term of the loss at the samples of this rank, None for what it has none of."""

    term: int
    linearization: FreeLinearization | None
    losses: FreeTerm | None = None  # once they are expanded


class ShardTerms(ColumnShard):
    """The samples of this rank, with which Jacobians and losses are multiplied as well."""

    def __init__(self, team: Team, arguments: Arguments, stack: ExitStack) -> None:
        super().__init__(team, arguments, stack)
        self._entries: list[Entry] = []

    def free_linearized(self, term: int) -> tuple[int, list[FreeOutputs | None]]:
        """Linearize the model of a term; return the number of the linearization as well."""
        arguments, shard = self._arguments.terms[term], self._samples(term)
        params, size = self._arguments.params, self._arguments.chunk_size
        # Where matrices were tried and do not fit, nothing is kept of them.
        for made in (self._linearizations, self._terms, self._at_once, self._columns):
            made.clear()
        assert arguments.shards is not None
        whole = arguments.shards[-1].stop

        def make() -> FreeLinearization:
            parts = function_of(arguments, params), as_real(params), arguments.X, size, whole
            entered = linearized_freely(*parts, precision=self._arguments.precision)
            return self._stack.enter_context(entered)

        return self._entered(term, make if len(shard) else None)

    def free_widened(self, number: int) -> tuple[int, list[FreeOutputs | None]]:
        """Linearize once more in float64, where that is another linearization."""
        term, narrow, _ = self._entries[number]
        make = None if narrow is None else narrow.in_float64 or (lambda: narrow)
        return self._entered(term, make)

    def free_depends(self, number: int) -> list[bool | None]:
        """Return whether outputs depend on the parameters."""
        linearization = self._entries[number].linearization
        return self._collected(linearization, depends_on_parameters, "reports")

    def free_shares(self, number: int) -> list[OwnShare | None]:
        """Return the share in the denominator, of samples that have losses of their own."""

        def share(linearization: FreeLinearization) -> OwnShare:
            (_, _, loss, y, *_), outputs = self._objective(number), linearization.outputs
            try:
                # As a part of a batch, which need not have a target that counts.
                divided_by(loss, 1.0).check(outputs, y)
                return OwnShare(share_of(loss, outputs, linearization.precise, y, []))
            except torch.OutOfMemoryError:
                raise
            except Exception as reason:  # noqa: BLE001 - all samples together tell what it is
                logger.info("the loss is not taken of the samples of a rank: %s", reason)
                return OwnShare(None)

        return self._collected(self._entries[number].linearization, share, "reports")

    def free_expanded(self, number: int, total: float) -> list[Known | None]:
        """Expand the losses, which are divided by a total; return what the leader is to know."""
        entry = self._entries[number]
        shard, arguments = self._samples(entry.term), self._arguments.terms[entry.term]

        def expanded(linearization: FreeLinearization) -> Known:
            assert arguments.shards is not None
            objective, whole = self._objective(number), arguments.shards[-1].stop
            # N / total times the losses, whose mean over all ranks is that of the batch.
            loss = for_rows(objective.loss, shard.start, whole)
            loss = divided_by(loss, total * len(shard) / whole)
            wholes = [whole if x is None else len(x) for x in objective.samples[:2]]
            subsets = [None if x is None else numbers_on(shard, x) for x in objective.samples]
            term = free_term(
                objective._replace(loss=loss, samples=Samples(*subsets)), linearization
            )
            term = term._replace(wholes=Wholes(*wholes))
            self._entries[number] = entry._replace(losses=term)
            return known_of(term)

        return self._collected(entry.linearization, expanded, "losses")

    def free_gathered(self, number: int) -> list[tuple[Tensor, Tensor] | None]:
        """Return the outputs, and those in the dtype in which they are computed."""
        return self._collected(
            self._entries[number].linearization, lambda x: (x.outputs, x.precise), "outputs"
        )

    def free_outputs(
        self, number: int, leaves: Sequence[Tensor], samples: Int[Tensor, " n"] | None
    ) -> list[Float[Tensor, "n ..."] | None]:
        """Return the outputs of samples, None for all, at other parameters."""
        term, linearization, _ = self._entries[number]
        indices = numbers_on(self._samples(term), samples)

        def outputs(linearization: FreeLinearization) -> Tensor:
            parts = [
                indices[chunk] for chunk in chunks(len(indices), linearization.samples_at_once)
            ]
            at = [x.to(leaf) for x, leaf in zip(leaves, linearization.leaves, strict=True)]
            return torch.cat([linearization.function(at, part) for part in parts])

        return self._collected(linearization if len(indices) else None, outputs, "outputs")

    def free_loss(
        self, number: int, leaves: Sequence[Tensor], samples: Int[Tensor, " n"] | None
    ) -> list[Tensor]:
        """Return the sum of the losses of samples, None for all, at other parameters."""
        term, _, losses = self._entries[number]
        indices = numbers_on(self._samples(term), samples)

        def total() -> list[Tensor]:
            if losses is None or not len(indices):
                return []
            trial = trial_of(losses, leaves, None if samples is None else indices)
            return [len(indices) * trial.loss]

        return self._team.summed(total, [()], "losses")

    def _entered(
        self, term: int, make: Callable[[], FreeLinearization] | None
    ) -> tuple[int, list[FreeOutputs | None]]:
        """Make a linearization of a term, and number it."""
        number = len(self._entries)
        self._entries.append(Entry(term, None))

        def entered() -> FreeOutputs | None:
            if make is None:
                return None
            linearization = make()
            self._entries[number] = Entry(term, linearization)
            return free_outputs_of(linearization)

        return number, self._team.collected(entered, "reports")

    def _objective(self, number: int) -> Objective:
        """Return the losses of the samples, by themselves."""
        term, linearization, _ = self._entries[number]
        arguments, objective = self._arguments, self._arguments.objectives[term]
        if linearization is not None and linearization.complex_outputs:
            return of_complex_outputs(objective, arguments.terms[term], arguments.params)
        return objective

    def _refusing(self, numbers: Sequence[int], make: Callable[[], R]) -> R:
        """Return a result of products, or raise what is wrong with the model that fails in them."""
        try:
            return make()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            linearizations = [self._entries[number].linearization for number in numbers]
            for linearization in linearizations:
                if linearization is not None and linearization.refused is not None:
                    raise linearization.refused(error) from error
            raise
