"""The Gauss-Newton matrix of a block as an operator: products with G, and with its two factors.

G = B Bᵀ with B = Jᵀ S / √N [d, i], the columns of all samples of all terms side by side. Vectors
are rows, in float64; products are in the dtype of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.quadratic.derivatives import Derivatives, over_all_samples
from ddnewton.quadratic.matrix_free.free_model import FreeModel
from ddnewton.quadratic.matrix_free.free_term import FreeTerm, Visit
from ddnewton.trees import along_block

Visits: TypeAlias = Callable[[], Iterator[Visit]]
"""The samples of a term, a chunk at a time; they may be visited again."""

Derivative: TypeAlias = Callable[[Visit, Float[Tensor, "n c"]], Float[Tensor, " n"]]
"""A derivative of every sample along a vector v, from J_n v."""


class Operator(NamedTuple):
    """G of a block, by products; in the units of the parameters over their scale."""

    model: FreeModel
    leaves: Sequence[Tensor]  # of the block
    scale: Float[Tensor, " d"] | None
    visits: Sequence[Visits]  # of the samples that give the directions, of every term
    numbers: Sequence[int]  # of the leaves

    @property
    def d(self) -> int:
        """The number of parameters."""
        return sum(leaf.numel() for leaf in self.leaves)

    @property
    def counts(self) -> list[int]:
        """How many samples give the directions, of every term."""
        terms = self.model.terms
        return [term.count(term.objective.samples.directions) for term in terms]

    @property
    def i(self) -> int:
        """The number of columns."""
        columns = [term.root.columns for term in self.model.terms]
        return sum(n * m for n, m in zip(self.counts, columns, strict=True))

    @property
    def has_columns(self) -> bool:
        """Whether the losses have roots, and not products with their Hessians alone."""
        return all(term.root.times is not None for term in self.model.terms)

    @property
    def eps(self) -> float:
        """The rounding of a product."""
        return max(term.linearization.eps for term in self.model.terms)

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""
        return self.leaves[0].device

    def product(self, vectors: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        """Return G v of every vector v."""
        totals = torch.zeros_like(vectors)
        for visits, n in zip(self.visits, self.counts, strict=True):
            for visit in visits():
                for number, vector in enumerate(vectors):
                    pushed = visit.products.push(self._as_leaves(vector)).double()
                    totals[number] += self._pulled(visit, visit.root.product(pushed) / n)
        return totals

    def along(self, vector: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """Return G v."""
        return self.product(vector[None])[0]

    def to_columns(self, vectors: Float[Tensor, "k d"]) -> Float[Tensor, "k i"]:
        """Return Bᵀv of every vector v, columns counted by m·N + n."""
        if not len(vectors):
            return vectors.new_zeros(0, self.i)
        parts = []
        for visits, n in zip(self.visits, self.counts, strict=True):
            rows: list[list[Tensor]] = [[] for _ in vectors]
            for visit in visits():
                for row, vector in zip(rows, vectors, strict=True):
                    pushed = visit.products.push(self._as_leaves(vector)).double()
                    row.append(visit.transposed(pushed))
            by_sample = torch.stack([torch.cat(row) for row in rows])  # [k n m]
            parts.append(by_sample.mT.flatten(1) / n**0.5)
        return torch.cat(parts, 1)

    def to_parameters(self, weights: Float[Tensor, "k i"]) -> Float[Tensor, "k d"]:
        """Return B u of every vector u of weights of the columns."""
        # The weights of every term's columns, and of these those of every chunk.
        totals = weights.new_zeros(len(weights), self.d)
        columns = [term.root.columns for term in self.model.terms]
        split = weights.split([n * m for n, m in zip(self.counts, columns, strict=True)], 1)
        for visits, n, part in zip(self.visits, self.counts, split, strict=True):
            by_sample, start = part.unflatten(1, (-1, n)).mT / n**0.5, 0
            for visit in visits():
                stop = start + len(visit.products.outputs)
                for number, row in enumerate(by_sample[:, start:stop]):
                    totals[number] += self._pulled(visit, visit.times(row))
                start = stop
        return totals

    def gradient(self) -> Float[Tensor, " d"]:
        """Return the gradient g of the loss, of the samples of the slopes."""
        total = torch.zeros(self.d, dtype=torch.float64, device=self.device)
        for term, visits in zip(self.model.terms, self.visits, strict=True):
            samples = term.objective.samples
            n = term.count(samples.slopes)
            for visit in (
                visits() if term.is_one_sample else term.visits(self.numbers, samples.slopes)
            ):
                total += self._pulled(visit, visit.root.gradient / n)
        return total

    def derivatives(self, vectors: Float[Tensor, "k d"]) -> Derivatives:
        """Return slopes γ_nk and curvatures λ_nk of the samples asked for along some vectors."""
        slopes, curvatures = [], []
        for term, visits in zip(self.model.terms, self.visits, strict=True):
            samples = term.objective.samples
            of_lambdas = samples.directions if samples.curvatures is None else samples.curvatures
            # The samples of both are pushed along once.
            if samples.slopes is of_lambdas:
                both = (_slope, _curvature)
                gammas, lambdas = self._along(term, visits, of_lambdas, vectors, both)
            else:
                (gammas,) = self._along(term, visits, samples.slopes, vectors, (_slope,))
                (lambdas,) = self._along(term, visits, of_lambdas, vectors, (_curvature,))
            slopes.append(gammas)
            curvatures.append(lambdas)
        return Derivatives(over_all_samples(slopes), over_all_samples(curvatures))

    def curvatures(self, vectors: Float[Tensor, "k d"]) -> Float[Tensor, " k"]:
        """Return vᵀG v of every vector, for half of a product each."""
        total = vectors.new_zeros(len(vectors))
        for term, visits in zip(self.model.terms, self.visits, strict=True):
            samples = term.objective.samples.directions
            (lambdas,) = self._along(term, visits, samples, vectors, (_curvature,))
            total += lambdas.mean(0)
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
        rows: list[list[Tensor]] = [[] for _ in derivatives]
        for visit in visits() if same else term.visits(self.numbers, samples):
            # A column of every derivative for every vector, which is pushed once.
            n = len(visit.root.value)
            columns = [visit.root.value.new_zeros(n, len(vectors)) for _ in derivatives]
            for number, vector in enumerate(vectors):
                pushed = visit.products.push(self._as_leaves(vector)).double()
                for column, derivative in zip(columns, derivatives, strict=True):
                    column[:, number] = derivative(visit, pushed)
            for row, column in zip(rows, columns, strict=True):
                row.append(column)
        return [torch.cat(row) for row in rows]

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


def _slope(visit: Visit, pushed: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """Return r_nᵀ J_n v of every sample."""
    slopes: Tensor = (visit.root.gradient * pushed).sum(1)
    return slopes


def _curvature(visit: Visit, pushed: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """Return vᵀJ_nᵀ ∇²ℓ_n J_n v of every sample."""
    curvatures: Tensor = (pushed * visit.root.product(pushed)).sum(1)
    return curvatures


def operator_of(model: FreeModel, leaves: Sequence[int]) -> Operator:
    """Return the operator along some leaves; the graphs of its samples are kept if they are few."""
    scale, every = model.scaling.scale, model.terms[0].linearization.leaves
    return Operator(
        model=model,
        leaves=[every[leaf] for leaf in leaves],
        scale=None if scale is None else along_block(scale, leaves, model.sizes),
        visits=[_visits(term, leaves) for term in model.terms],
        numbers=leaves,
    )


def _visits(term: FreeTerm, leaves: Sequence[int]) -> Visits:
    """Return the visits of the samples that give the directions, the same ones if they fit."""
    samples = term.objective.samples.directions
    if term.linearization.graphs_fit(term.count(samples)):
        kept = list(term.visits(leaves, samples))
        return lambda: iter(kept)
    return lambda: term.visits(leaves, samples)
