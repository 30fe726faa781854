"""The Gauss-Newton matrix of a block by products, on the leader of the ranks that have the samples.

Vectors are told to all ranks, each multiplies with its own samples, and the products are summed.
Numbers of samples are collected, and put in the order in which the samples were asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.distributed.service import Leader
from ddnewton.quadratic.derivatives import Derivatives
from ddnewton.quadratic.matrix_free.free_term import FreeTerm
from ddnewton.quadratic.matrix_free.operator import Operator
from ddnewton.quadratic.matrix_free.sample_operator import SampleOperator, of_all_terms
from ddnewton.quadratic.ranks.messages import rows_on


@dataclass(frozen=True, eq=False)
class RankOperator(Operator):
    """G of a block, by products with samples on several ranks.

    Of some terms the losses are here, and only the products with Jacobians are made there.
    """

    leader: Leader
    here: SampleOperator | None  # of the terms whose losses are here, without the scale

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Of every term, columns of a sample and samples that give the directions."""
        return [(term.root.columns, term.directions_count) for term in self.terms]

    def product(self, vectors: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        """Return G v of every vector v."""
        vectors = self._scaled(vectors)
        total = self._summed("free_product", vectors, like=vectors)
        return self._scaled(total if self.here is None else total + self.here.product(vectors))

    def to_columns(self, vectors: Float[Tensor, "k d"]) -> Float[Tensor, "k i"]:
        """Return Bᵀv of every vector v, columns counted by m·N + n."""
        # Term by term, of the ranks or of here.
        vectors = self._scaled(vectors)
        there = self._collected("free_columns", vectors)
        here = iter([] if self.here is None else self.here.to_columns_of_terms(vectors))
        parts = []
        for term, shape in zip(self.terms, self.shapes, strict=True):
            if term.on_ranks is None:
                parts.append(next(here))
                continue
            of_term = vectors.new_zeros(len(vectors), *shape)
            samples = term.objective.samples.directions
            for rows, (part,) in self._of_ranks(term, samples, next(there)):
                of_term[:, :, rows] = part
            parts.append(of_term)
        return torch.cat([part.flatten(1) for part in parts], 1)

    def to_parameters(self, weights: Float[Tensor, "k i"]) -> Float[Tensor, "k d"]:
        """Return B u of every vector u of weights of the columns."""
        # The weights of every rank's columns, and of those whose losses are here.
        here, there = [], []
        split = weights.split([m * n for m, n in self.shapes], 1)
        for term, shape, part in zip(self.terms, self.shapes, split, strict=True):
            if term.on_ranks is None:
                here.append(part)
                continue
            samples, by_column = term.objective.samples.directions, part.unflatten(1, shape)
            there.append([by_column[:, :, rows_on(x, samples)] for x in term.on_ranks.shards])
        total = weights.new_zeros(len(weights), self.d)
        if there:
            of_ranks = [
                [of_term[rank] for of_term in there] for rank in range(self.leader.team.size)
            ]
            total = self._summed("free_parameters", len(weights), like=total, weights=of_ranks)
        if self.here is not None:
            total = total + self.here.to_parameters(torch.cat(here, 1))
        return self._scaled(total)

    def gradient(self) -> Float[Tensor, " d"]:
        """Return the gradient g of the loss, of the samples of the slopes."""
        like = torch.zeros(self.d, dtype=torch.float64, device=self.device)
        total = self._summed("free_gradient", like=like)
        return self._scaled(total if self.here is None else total + self.here.gradient())

    def derivatives(self, vectors: Float[Tensor, "k d"]) -> Derivatives:
        """Return slopes γ_nk and curvatures λ_nk of the samples asked for along some vectors."""
        # Term by term, of the ranks or of here.
        vectors = self._scaled(vectors)
        there = self._collected("free_derivatives", vectors)
        here = iter([] if self.here is None else self.here.derivatives_of_terms(vectors))
        parts = []
        for term in self.terms:
            if term.on_ranks is None:
                parts.append(next(here))
                continue
            slopes, directions, curvatures = term.objective.samples
            of_lambdas, of_ranks = directions if curvatures is None else curvatures, next(there)
            both = []
            for number, samples in enumerate((slopes, of_lambdas)):
                whole = vectors.new_zeros(term.count(samples), len(vectors))
                for rows, part in self._of_ranks(term, samples, of_ranks):
                    whole[rows] = part[number]
                both.append(whole)
            parts.append(Derivatives(*both))
        return of_all_terms(parts)

    def curvatures(self, vectors: Float[Tensor, "k d"]) -> Float[Tensor, " k"]:
        """Return vᵀG v of every vector, for half of a product each."""
        vectors = self._scaled(vectors)
        like = vectors.new_zeros(len(vectors))
        total = self._summed("free_curvatures", vectors, like=like)
        return total if self.here is None else total + self.here.curvatures(vectors)

    def _scaled(self, vectors: Float[Tensor, "*k d"]) -> Float[Tensor, "*k d"]:
        """Return vectors times the scale: B is so of its rows."""
        return vectors if self.scale is None else self.scale * vectors

    @property
    def _entries(self) -> list[int]:
        """The numbers, on the ranks, of the terms whose losses are there."""
        return [term.on_ranks.number for term in self.terms if term.on_ranks is not None]

    def _summed(self, order: str, *parts: object, like: Tensor, **for_ranks: object) -> Tensor:
        """Return the sum of what all ranks make of their samples, zeros where nothing is there."""
        if not self._entries:
            return torch.zeros_like(like)
        (total,) = self.leader.order(order, self._entries, list(self.numbers), *parts, **for_ranks)
        summed: Tensor = total
        return summed

    def _collected(self, order: str, vectors: Tensor) -> Iterator[list[list[Tensor] | None]]:
        """Yield what the ranks make of their samples of every term there, None for none."""
        if not self._entries:
            return
        of_ranks = self.leader.order(order, self._entries, list(self.numbers), vectors)
        yield from map(list, zip(*of_ranks, strict=True))

    def _of_ranks(
        self,
        term: FreeTerm,
        samples: Int[Tensor, " _"] | None,
        parts: Sequence[list[Tensor] | None],
    ) -> Iterator[tuple[slice | Tensor, list[Tensor]]]:
        """Yield where the samples of every rank are among those asked for, and its part."""
        assert term.on_ranks is not None
        for shard, part in zip(term.on_ranks.shards, parts, strict=True):
            if part is not None:
                yield rows_on(shard, samples), part


def rank_operator(
    leader: Leader,
    terms: Sequence[FreeTerm],
    numbers: Sequence[int],
    scale: Float[Tensor, " d"] | None,
    here: SampleOperator | None,
) -> RankOperator:
    """Return the operator along some leaves, of samples on several ranks."""
    every = terms[0].linearization.leaves
    return RankOperator(terms, [every[leaf] for leaf in numbers], scale, numbers, leader, here)
