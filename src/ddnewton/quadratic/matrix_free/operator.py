"""The Gauss-Newton matrix of a block as an operator: products with G, and with its two factors.

G = B Bᵀ with B = Jᵀ S / √N [d, i], the columns of all samples of all terms side by side. Vectors
are rows, in float64; products are in the dtype of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.quadratic.derivatives import Derivatives


class Operator(Protocol):
    """G of a block, by products; in the units of the parameters over their scale."""

    @property
    def numbers(self) -> Sequence[int]:
        """The numbers of the leaves of the block."""

    @property
    def scale(self) -> Float[Tensor, " d"] | None:
        """The units of the parameters."""

    @property
    def d(self) -> int:
        """The number of parameters."""

    @property
    def i(self) -> int:
        """The number of columns."""

    @property
    def has_columns(self) -> bool:
        """Whether the losses have roots, and not products with their Hessians alone."""

    @property
    def eps(self) -> float:
        """The rounding of a product."""

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""

    def in_units(self, scale: Float[Tensor, " d"], /) -> Operator:
        """Return the same in other units."""

    def product(self, vectors: Float[Tensor, "k d"], /) -> Float[Tensor, "k d"]:
        """Return G v of every vector v."""

    def along(self, vector: Float[Tensor, " d"], /) -> Float[Tensor, " d"]:
        """Return G v."""

    def to_columns(self, vectors: Float[Tensor, "k d"], /) -> Float[Tensor, "k i"]:
        """Return Bᵀv of every vector v, columns counted by m·N + n."""

    def to_parameters(self, weights: Float[Tensor, "k i"], /) -> Float[Tensor, "k d"]:
        """Return B u of every vector u of weights of the columns."""

    def gradient(self) -> Float[Tensor, " d"]:
        """Return the gradient g of the loss, of the samples of the slopes."""

    def derivatives(self, vectors: Float[Tensor, "k d"], /) -> Derivatives:
        """Return slopes γ_nk and curvatures λ_nk of the samples asked for along vectors."""

    def curvatures(self, vectors: Float[Tensor, "k d"], /) -> Float[Tensor, " k"]:
        """Return vᵀG v of every vector, for half of a product each."""
