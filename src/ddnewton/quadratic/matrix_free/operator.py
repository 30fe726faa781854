"""The Gauss-Newton matrix of a block as an operator: products with G, and with its two factors.

G = B Bᵀ with B = Jᵀ S / √N [d, i], the columns of all samples of all terms side by side. Vectors
are rows, in float64; products are in the dtype of the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.quadratic.derivatives import Derivatives
from ddnewton.quadratic.matrix_free.free_term import FreeTerm


@dataclass(frozen=True, eq=False)
class Operator(ABC):
    """G of a block, by products; in the units of the parameters over their scale."""

    terms: Sequence[FreeTerm]
    leaves: Sequence[Tensor]  # of the block
    scale: Float[Tensor, " d"] | None
    numbers: Sequence[int]  # of the leaves

    @property
    @abstractmethod
    def shapes(self) -> list[tuple[int, int]]:
        """Of every term, columns of a sample and samples that give the directions."""

    @property
    def d(self) -> int:
        """The number of parameters."""
        return sum(leaf.numel() for leaf in self.leaves)

    @property
    def i(self) -> int:
        """The number of columns."""
        return sum(m * n for m, n in self.shapes)

    @property
    def has_columns(self) -> bool:
        """Whether the losses have roots, and not products with their Hessians alone."""
        return all(term.root.times is not None for term in self.terms)

    @property
    def eps(self) -> float:
        """The rounding of a product."""
        return max(term.linearization.eps for term in self.terms)

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""
        return self.leaves[0].device

    def in_units(self, scale: Float[Tensor, " d"]) -> Self:
        """Return the same in other units."""
        return replace(self, scale=scale)

    def along(self, vector: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """Return G v."""
        return self.product(vector[None])[0]

    @abstractmethod
    def product(self, vectors: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        """Return G v of every vector v."""

    @abstractmethod
    def to_columns(self, vectors: Float[Tensor, "k d"]) -> Float[Tensor, "k i"]:
        """Return Bᵀv of every vector v, columns counted by m·N + n."""

    @abstractmethod
    def to_parameters(self, weights: Float[Tensor, "k i"]) -> Float[Tensor, "k d"]:
        """Return B u of every vector u of weights of the columns."""

    @abstractmethod
    def gradient(self) -> Float[Tensor, " d"]:
        """Return the gradient g of the loss, of the samples of the slopes."""

    @abstractmethod
    def derivatives(self, vectors: Float[Tensor, "k d"]) -> Derivatives:
        """Return slopes γ_nk and curvatures λ_nk of the samples asked for along vectors."""

    @abstractmethod
    def curvatures(self, vectors: Float[Tensor, "k d"]) -> Float[Tensor, " k"]:
        """Return vᵀG v of every vector, for half of a product each."""
