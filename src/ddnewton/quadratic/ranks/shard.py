"""The samples of one rank, and what is made of them at the leader's orders.

Every public method is an order: all ranks follow it at the same time, each with its samples, and
what it returns is for the leader. Linearizations and Jacobians stay where their samples are, and
have the same numbers on all ranks; a rank without samples has None in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.columns.factors import Jacobian
from ddnewton.columns.kept_factors import keeping
from ddnewton.distributed.fingerprints import generators_in
from ddnewton.distributed.team import Team
from ddnewton.inputs.term_names import about_term
from ddnewton.linearize.linearization import linearized
from ddnewton.linearize.model import Linearization
from ddnewton.linearize.use_of_parameters import depends_on_parameters
from ddnewton.quadratic.arguments import Arguments, function_of
from ddnewton.quadratic.ranks.messages import (
    Form,
    Outputs,
    OwnBasis,
    Rows,
    basis_of,
    form_of,
    numbers_on,
    outputs_of,
    rows_on,
)
from ddnewton.trees import as_real, chunks
from ddnewton.types import PyTree

T = TypeVar("T")
R = TypeVar("R")


class Columns(NamedTuple):
    """Columns on this rank, None for none, and which rows of all columns' samples they are."""

    jacobian: Jacobian | None
    rows: Rows


class Shard:
    """The samples of this rank, and what has been made of them."""

    def __init__(self, team: Team, arguments: Arguments, stack: ExitStack) -> None:
        self._team, self._arguments, self._stack = team, arguments, stack
        self._linearizations: list[Linearization | None] = []
        self._terms: list[int] = []  # of the linearizations
        self._at_once: list[int | None] = []  # how many of their samples, None for all
        self._columns: list[Columns] = []
        self._generators = generators_in([block.damping for block in arguments.blocks])

    def draws(self) -> list[Tensor]:
        """Return the states of all generators that rules draw from, which only the leader calls."""
        return [generator.get_state() for generator in self._generators]

    def drawn(self, states: Sequence[Tensor]) -> None:
        """Have drawn what the leader has."""
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)

    def targets(self, term: int) -> list[PyTree]:
        """Return the targets of a term."""
        return self._team.collected(lambda: self._arguments.terms[term].y, "targets")

    def linearized(self, number: int) -> tuple[int, list[Outputs | None]]:
        """Linearize the model of a term; return the number of the linearization as well."""
        term, params = self._arguments.terms[number], self._arguments.params
        assert term.shards is not None
        whole = term.shards[-1].stop

        def make() -> Linearization:
            with about_term(term.name):
                function, size = function_of(term, params), self._arguments.chunk_size
                parts = function, as_real(params), term.X, term.gram, size, whole
                entered = linearized(*parts, precision=self._arguments.precision)
                return self._stack.enter_context(entered)

        return self._added(number, make if len(self._samples(number)) else None)

    def widened(self, number: int) -> tuple[int, list[Outputs | None]]:
        """Linearize once more in float64, where that is possible with the samples of a rank."""
        narrow = self._linearizations[number]
        wide = None if narrow is None else narrow.in_float64 or (lambda: narrow)
        return self._added(self._terms[number], wide)

    def outputs(
        self, number: int, leaves: Sequence[Tensor], samples: Int[Tensor, " n"] | None
    ) -> list[Float[Tensor, "n ..."] | None]:
        """Return the outputs of samples, None for all, at other parameters."""
        linearization = self._linearizations[number]
        indices = numbers_on(self._samples(self._terms[number]), samples)

        def make() -> Tensor | None:
            if linearization is None or not len(indices):
                return None
            size = self._at_once[number] or len(indices)
            parts = [indices[chunk] for chunk in chunks(len(indices), size)]
            moved = [new.to(x) for new, x in zip(leaves, linearization.leaves, strict=True)]
            return torch.cat([linearization.function(moved, part) for part in parts])

        return self._team.collected(make, "outputs")

    def depends(self, number: int) -> list[bool | None]:
        """Return whether outputs depend on the parameters."""
        return self._collected(self._linearizations[number], depends_on_parameters, "reports")

    def pulled_back(
        self,
        number: int,
        samples: Int[Tensor, " n"] | None,
        bases: Sequence[OwnBasis] = (),
    ) -> tuple[int, list[Form | None]]:
        """Pull back the ``bases`` that the leader has of samples, None for all, and number it."""
        # The samples of this rank among those, and their basis.
        linearization, shard = self._linearizations[number], self._samples(self._terms[number])
        numbers = numbers_on(shard, samples)
        basis, place = self._team.scattered(bases, "bases"), len(self._columns)
        self._columns.append(Columns(None, rows_on(shard, samples)))

        # Their columns, which stay here.
        def make() -> Form | None:
            if linearization is None or not len(numbers):
                return None
            indices = None if samples is None else numbers
            jacobian = keeping(linearization.jacobian(basis_of(basis), indices))
            self._columns[place] = self._columns[place]._replace(jacobian=jacobian)
            self._at_once[number] = jacobian.chunks[0].stop
            return form_of(jacobian)

        return place, self._team.collected(make, "reports")

    def _added(
        self, term: int, make: Callable[[], Linearization] | None
    ) -> tuple[int, list[Outputs | None]]:
        """Make a linearization of a term, and number it."""
        number = len(self._linearizations)
        self._linearizations.append(None)
        self._terms.append(term)
        self._at_once.append(None)

        def made() -> Outputs | None:
            if make is None:
                return None
            self._linearizations[number] = linearization = make()
            return outputs_of(linearization)

        return number, self._team.collected(made, "outputs")

    def _collected(self, present: T | None, make: Callable[[T], R], kind: str) -> list[R | None]:
        """Return the results of all ranks, None where they have nothing to make them of."""
        return self._team.collected(lambda: None if present is None else make(present), kind)

    def _samples(self, term: int) -> range:
        """Return the samples of a term that are on this rank, counted in the whole batch."""
        shards = self._arguments.terms[term].shards
        assert shards is not None
        return shards[self._team.rank]
