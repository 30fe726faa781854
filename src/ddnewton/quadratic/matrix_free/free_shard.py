"""The samples of one rank, and the products that are made with them at the leader's orders.

Graphs are kept as those of one process are, of every block and terms that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.distributed.team import Team
from ddnewton.linearize.free_linearization import FreeLinearization
from ddnewton.linearize.jacobian_products import Products
from ddnewton.quadratic.arguments import Arguments
from ddnewton.quadratic.matrix_free.sample_operator import SampleOperator, sample_operator
from ddnewton.quadratic.matrix_free.shard_terms import ShardTerms
from ddnewton.quadratic.ranks.messages import numbers_on
from ddnewton.trees import as_real, chunks, tree_leaves


class OwnProducts(NamedTuple):
    """Products with the Jacobian of samples, a chunk at a time."""

    number: int  # of the linearization
    wanted: Sequence[int]
    samples: Int[Tensor, " n"] | slice | None  # of the whole batch
    visit: Callable[[], list[Products]]

    def is_of(
        self, number: int, wanted: Sequence[int], samples: Int[Tensor, " n"] | slice | None
    ) -> bool:
        """Return whether they are those that are asked for."""
        if (self.number, list(self.wanted)) != (number, list(wanted)):
            return False
        if isinstance(samples, Tensor) and isinstance(self.samples, Tensor):
            return torch.equal(samples, self.samples)
        return samples is None and self.samples is None


class FreeShard(ShardTerms):
    """The samples of this rank, by matrices and by products."""

    def __init__(self, team: Team, arguments: Arguments, stack: ExitStack) -> None:
        super().__init__(team, arguments, stack)
        self._operators: dict[tuple[tuple[int, ...], tuple[int, ...]], SampleOperator] = {}
        self._products: list[OwnProducts] = []

    def free_pushed(
        self,
        number: int,
        wanted: Sequence[int],
        samples: Int[Tensor, " n"] | None,
        vector: Sequence[Tensor],
    ) -> list[Float[Tensor, "n c"] | None]:
        """Return J v of samples, None for all, for a vector given leaf by leaf."""
        indices = numbers_on(self._samples(self._entries[number].term), samples)

        def pushed(linearization: FreeLinearization) -> Tensor:
            visits = self._visited(number, wanted, samples)
            own_vector = [
                x.to(linearization.leaves[i]) for i, x in zip(wanted, vector, strict=True)
            ]
            parts = [partial(products.push, own_vector) for products in visits]
            return torch.cat([self._refusing([number], part) for part in parts])

        linearization = self._entries[number].linearization
        return self._collected(linearization if len(indices) else None, pushed, "slopes")

    def free_pulled(
        self,
        number: int,
        wanted: Sequence[int],
        samples: Int[Tensor, " n"] | None,
        cotangents: Sequence[Float[Tensor, "n c"]] = (),
    ) -> list[Tensor]:
        """Return Jᵀu of samples leaf by leaf, of what the leader has for them."""
        # The leader has a part for every rank.
        cotangent = self._team.scattered(cotangents, "slopes")
        entry, leaves = self._entries[number], self._leaves

        def pulled() -> list[Tensor]:
            totals = [torch.zeros_like(leaves[i], dtype=torch.float64) for i in wanted]
            if entry.linearization is None or not len(cotangent):
                return totals
            start = 0
            for products in self._visited(number, wanted, samples):
                stop = start + len(products.outputs)
                u = cotangent[start:stop].to(products.outputs.dtype)
                for leaf, part in enumerate(products.pull(u)):
                    totals[leaf] += part
                start = stop
            return totals

        return self._team.summed(pulled, [leaves[i].shape for i in wanted], "products")

    def free_product(
        self, entries: Sequence[int], numbers: Sequence[int], vectors: Float[Tensor, "k d"]
    ) -> list[Tensor]:
        """Return this rank's part of G v of every vector v."""
        return self._summed(entries, numbers, lambda x: x.product(vectors), vectors.shape)

    def free_curvatures(
        self, entries: Sequence[int], numbers: Sequence[int], vectors: Float[Tensor, "k d"]
    ) -> list[Tensor]:
        """Return this rank's part of vᵀG v of every vector."""
        return self._summed(entries, numbers, lambda x: x.curvatures(vectors), vectors.shape[:1])

    def free_gradient(self, entries: Sequence[int], numbers: Sequence[int]) -> list[Tensor]:
        """Return this rank's part of the gradient."""
        return self._summed(entries, numbers, lambda x: x.gradient(), [self._count(numbers)])

    def free_parameters(
        self,
        entries: Sequence[int],
        numbers: Sequence[int],
        count: int,
        weights: Sequence[Sequence[Float[Tensor, "k m n"]]] = (),
    ) -> list[Tensor]:
        """Return this rank's part of B u, for as many weights of the columns of every term."""
        of_rank = self._team.scattered(weights, "weights")

        def to_parameters(operator: SampleOperator) -> Tensor:
            pairs = zip(entries, of_rank, strict=True)
            parts = [w.flatten(1) for entry, w in pairs if self._entries[entry].losses is not None]
            return operator.to_parameters(torch.cat(parts, 1))

        return self._summed(entries, numbers, to_parameters, [count, self._count(numbers)])

    def free_columns(
        self, entries: Sequence[int], numbers: Sequence[int], vectors: Float[Tensor, "k d"]
    ) -> list[list[list[Tensor] | None]]:
        """Return Bᵀv of every vector v, of every term."""

        def columns(operator: SampleOperator) -> list[list[Tensor]]:
            return [[part] for part in operator.to_columns_of_terms(vectors)]

        return self._of_terms(entries, numbers, columns)

    def free_derivatives(
        self, entries: Sequence[int], numbers: Sequence[int], vectors: Float[Tensor, "k d"]
    ) -> list[list[list[Tensor] | None]]:
        """Return slopes and curvatures of samples along vectors, of every term."""

        def derivatives(operator: SampleOperator) -> list[list[Tensor]]:
            return [list(part) for part in operator.derivatives_of_terms(vectors)]

        return self._of_terms(entries, numbers, derivatives)

    def _summed(
        self,
        entries: Sequence[int],
        numbers: Sequence[int],
        make: Callable[[SampleOperator], Tensor],
        shape: Sequence[int],
    ) -> list[Tensor]:
        """Return the sum of what all ranks make of their samples."""

        def parts() -> list[Tensor]:
            operator = self._operator(entries, numbers)
            return [] if operator is None else [self._refusing(entries, partial(make, operator))]

        return self._team.summed(parts, [shape], "products")

    def _of_terms(
        self,
        entries: Sequence[int],
        numbers: Sequence[int],
        make: Callable[[SampleOperator], list[list[Tensor]]],
    ) -> list[list[list[Tensor] | None]]:
        """Return the results of every rank for every term, None where it has no samples."""

        def parts() -> list[list[Tensor] | None]:
            operator = self._operator(entries, numbers)
            made = iter(
                [] if operator is None else self._refusing(entries, partial(make, operator))
            )
            return [None if self._entries[x].losses is None else next(made) for x in entries]

        return self._team.collected(parts, "slopes")

    def _operator(self, entries: Sequence[int], numbers: Sequence[int]) -> SampleOperator | None:
        """Return the operator of terms along leaves, None without samples."""
        key = tuple(entries), tuple(numbers)
        if key not in self._operators:
            terms = [self._entries[entry].losses for entry in entries]
            present = [term for term in terms if term is not None]
            if not present:
                return None
            self._operators[key] = sample_operator(present, numbers, None)
        return self._operators[key]

    def _visited(
        self, number: int, wanted: Sequence[int], samples: Int[Tensor, " n"] | None
    ) -> list[Products]:
        """Return products of samples, a chunk at a time, whose graphs are kept if they are few."""
        # Those of before, or new ones of the samples that are on this rank.
        for products in self._products:
            if products.is_of(number, wanted, samples):
                return products.visit()
        term, linearization, _ = self._entries[number]
        assert linearization is not None
        indices = numbers_on(self._samples(term), samples)
        parts = [indices[part] for part in chunks(len(indices), linearization.samples_at_once)]

        def visit() -> list[Products]:
            return [linearization.products(wanted, part) for part in parts]

        if linearization.graphs_fit(len(indices)):
            kept = visit()
            self._products.append(OwnProducts(number, wanted, samples, lambda: kept))
            return kept
        return visit()

    def _count(self, numbers: Sequence[int]) -> int:
        """Return the number of parameters in a block."""
        return sum(self._sizes[leaf] for leaf in numbers)

    @property
    def _leaves(self) -> list[Tensor]:
        """The parameters, as reals."""
        leaves: list[Tensor] = tree_leaves(as_real(self._arguments.params))
        return leaves
