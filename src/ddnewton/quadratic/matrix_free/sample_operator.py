"""The Gauss-Newton matrix of a block by products with samples that can be visited."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.quadratic.derivatives import Derivatives, over_all_samples
from ddnewton.quadratic.matrix_free.free_term import FreeTerm, Visit
from ddnewton.quadratic.matrix_free.operator import Operator

Visits: TypeAlias = Callable[[], Iterator[Visit]]
"""The samples of a term, a chunk at a time; they may be visited again."""

Derivative: TypeAlias = Callable[[Visit, Float[Tensor, "n c"]], Float[Tensor, " n"]]
"""A derivative of every sample along a vector v, from J_n v."""


@dataclass(frozen=True, eq=False)
class SampleOperator(Operator):
    """G of a block, by products with samples that can be visited.

    Where these are a part of those of all ranks, results are their parts of the sums.
    """

    visits: Sequence[Visits]  # of the samples that give the directions, of every term

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Of every term, columns of a sample and samples that give the directions."""
        samples = [term.objective.samples.directions for term in self.terms]
        pairs = zip(self.terms, samples, strict=True)
        return [(term.root.columns, term.count(some)) for term, some in pairs]

    def product(self, vectors: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        """Return G v of every vector v."""
        totals = torch.zeros_like(vectors)
        for term, visits in zip(self.terms, self.visits, strict=True):
            for visit in visits():
                for number, vector in enumerate(vectors):
                    pushed = visit.products.push(self._as_leaves(vector)).double()
                    image = visit.root.product(pushed) / term.directions_count
                    totals[number] += self._pulled(visit, image)
        return totals

    def to_columns(self, vectors: Float[Tensor, "k d"]) -> Float[Tensor, "k i"]:
        """Return Bᵀv of every vector v, columns counted by m·N + n."""
        return torch.cat([part.flatten(1) for part in self.to_columns_of_terms(vectors)], 1)

    def to_columns_of_terms(self, vectors: Float[Tensor, "k d"]) -> list[Float[Tensor, "k m n"]]:
        """Return Bᵀv of every vector v, of every term by itself."""
        # Samples on the last axis, where those of every visit follow one another.
        parts = []
        for term, visits, shape in zip(self.terms, self.visits, self.shapes, strict=True):
            by_sample, start = vectors.new_zeros(len(vectors), *shape), 0
            for visit in visits():
                stop = start + len(visit.products.outputs)
                for row, vector in zip(by_sample, vectors, strict=True):
                    pushed = visit.products.push(self._as_leaves(vector)).double()
                    row[:, start:stop] = visit.transposed(pushed).mT
                start = stop
            parts.append(by_sample / term.directions_count**0.5)
        return parts

    def to_parameters(self, weights: Float[Tensor, "k i"]) -> Float[Tensor, "k d"]:
        """Return B u of every vector u of weights of the columns."""
        # The weights of every term's columns, and of these those of every chunk.
        totals = weights.new_zeros(len(weights), self.d)
        split = weights.split([m * n for m, n in self.shapes], 1)
        for term, visits, shape, part in zip(
            self.terms, self.visits, self.shapes, split, strict=True
        ):
            by_sample = part.unflatten(1, shape).mT / term.directions_count**0.5
            start = 0
            for visit in visits():
                stop = start + len(visit.products.outputs)
                for number, row in enumerate(by_sample[:, start:stop]):
                    totals[number] += self._pulled(visit, visit.times(row))
                start = stop
        return totals

    def gradient(self) -> Float[Tensor, " d"]:
        """Return the gradient g of the loss, of the samples of the slopes."""
        total = torch.zeros(self.d, dtype=torch.float64, device=self.device)
        for term, visits in zip(self.terms, self.visits, strict=True):
            slopes = term.objective.samples.slopes
            for visit in visits() if term.is_one_sample else term.visits(self.numbers, slopes):
                total += self._pulled(visit, visit.root.gradient / term.slopes_count)
        return total

    def derivatives(self, vectors: Float[Tensor, "k d"]) -> Derivatives:
        """Return slopes γ_nk and curvatures λ_nk of the samples asked for along some vectors."""
        return of_all_terms(self.derivatives_of_terms(vectors))

    def derivatives_of_terms(self, vectors: Float[Tensor, "k d"]) -> list[Derivatives]:
        """Return slopes and curvatures along some vectors, of every term by itself."""
        parts = []
        for term, visits in zip(self.terms, self.visits, strict=True):
            samples = term.objective.samples
            of_lambdas = samples.directions if samples.curvatures is None else samples.curvatures
            # The samples of both are pushed along once.
            if samples.slopes is of_lambdas:
                both = (_slope, _curvature)
                gammas, lambdas = self._along(term, visits, of_lambdas, vectors, both)
            else:
                (gammas,) = self._along(term, visits, samples.slopes, vectors, (_slope,))
                (lambdas,) = self._along(term, visits, of_lambdas, vectors, (_curvature,))
            parts.append(Derivatives(gammas, lambdas))
        return parts

    def curvatures(self, vectors: Float[Tensor, "k d"]) -> Float[Tensor, " k"]:
        """Return vᵀG v of every vector, for half of a product each."""
        total = vectors.new_zeros(len(vectors))
        for term, visits in zip(self.terms, self.visits, strict=True):
            samples = term.objective.samples.directions
            (lambdas,) = self._along(term, visits, samples, vectors, (_curvature,))
            total += lambdas.sum(0) / term.directions_count
        return total

    def _along(
        self,
        term: FreeTerm,
        visits: Visits,
        samples: Int[Tensor, " _"] | None,
        vectors: Float[Tensor, "k d"],
        derivatives: Sequence[Derivative],
    ) -> list[Float[Tensor, "n k"]]:
        """Return some derivatives of every sample along some vectors."""
        same = samples is term.objective.samples.directions
        n, start = term.count(samples), 0
        columns = [vectors.new_zeros(n, len(vectors)) for _ in derivatives]
        for visit in visits() if same else term.visits(self.numbers, samples):
            # A column of every derivative for every vector, which is pushed once.
            stop = start + len(visit.products.outputs)
            for number, vector in enumerate(vectors):
                pushed = visit.products.push(self._as_leaves(vector)).double()
                for column, derivative in zip(columns, derivatives, strict=True):
                    column[start:stop, number] = derivative(visit, pushed)
            start = stop
        return columns

    def _as_leaves(self, vector: Float[Tensor, " d"]) -> list[Tensor]:
        """Return a vector leaf by leaf, in the units and the dtypes of the leaves."""
        vector = vector if self.scale is None else self.scale * vector
        parts = vector.split([leaf.numel() for leaf in self.leaves])
        pairs = zip(parts, self.leaves, strict=True)
        return [part.reshape(leaf.shape).to(leaf) for part, leaf in pairs]

    def _pulled(self, visit: Visit, cotangent: Float[Tensor, "n c"]) -> Float[Tensor, " d"]:
        """Return Jᵀu of the samples of a visit."""
        parts = visit.products.pull(cotangent.to(visit.products.outputs.dtype))
        vector = torch.cat([part.double().reshape(-1) for part in parts])
        return vector if self.scale is None else self.scale * vector


def of_all_terms(parts: Sequence[Derivatives]) -> Derivatives:
    """Return the derivatives of several terms as those of one, whose means are the sums."""
    slopes, curvatures = zip(*parts, strict=True)
    return Derivatives(over_all_samples(slopes), over_all_samples(curvatures))


def _slope(visit: Visit, pushed: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """Return r_nᵀ J_n v of every sample."""
    slopes: Tensor = (visit.root.gradient * pushed).sum(1)
    return slopes


def _curvature(visit: Visit, pushed: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """Return vᵀJ_nᵀ ∇²ℓ_n J_n v of every sample."""
    curvatures: Tensor = (pushed * visit.root.product(pushed)).sum(1)
    return curvatures


def sample_operator(
    terms: Sequence[FreeTerm], numbers: Sequence[int], scale: Float[Tensor, " d"] | None
) -> SampleOperator:
    """Return the operator along some leaves; the graphs of its samples are kept if they are few."""
    every = terms[0].linearization.leaves
    leaves = [every[number] for number in numbers]
    visits = [_visits(term, numbers) for term in terms]
    return SampleOperator(terms, leaves, scale, numbers, visits)


def _visits(term: FreeTerm, leaves: Sequence[int]) -> Visits:
    """Return the visits of the samples that give the directions, the same ones if they fit."""
    samples = term.objective.samples.directions
    if term.linearization.graphs_fit(term.count(samples)):
        kept = list(term.visits(leaves, samples))
        return lambda: iter(kept)
    return lambda: term.visits(leaves, samples)
