"""Columns that several processes hold, by what is asked of all of them together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from jaxtyping import Bool, Float
from torch import Tensor


class ColumnsOfRanks(Protocol):
    """The columns of samples that several processes hold, by what is asked of all of them.

    They are in the order of their samples, and in no units.
    """

    def sums(
        self, blocks: Sequence[Sequence[int]], weights: Sequence[Float[Tensor, "_ i"]], /
    ) -> list[Float[Tensor, "_ _"]]:
        """Return W Aᵀ for every block."""

    def slopes(
        self, block: Sequence[int], vectors: Float[Tensor, "k d"], /
    ) -> Float[Tensor, "i k"]:
        """Return AᵀE for vectors of a block."""

    def tiles(
        self, other: Any, blocks: Sequence[Sequence[int]], /, *, symmetric: bool
    ) -> Iterator[Any]:
        """Yield the tiles of the inner products with other columns."""

    def equations(
        self, blocks: Sequence[Sequence[int]], root_and_z: Float[Tensor, "2 i"], /
    ) -> list[Any]:
        """Return A diag(w) Aᵀ and A z for every block."""

    def rows(self, block: Sequence[int], weights: Float[Tensor, " i"], /) -> Float[Tensor, "i d"]:
        """Return the rows √w_i a_i of a block."""

    def factorized(
        self, matrix: Float[Tensor, "side side2"], shifts: Float[Tensor, " side"], /
    ) -> Bool[Tensor, ""]:
        """Factorize a matrix with shifts over its lower triangle; return whether it has none."""

    def triangles(
        self, block: Sequence[int], root: Float[Tensor, " i"], /
    ) -> Iterator[Float[Tensor, "_ d"]]:
        """Yield no more rows of every process than it has parameters, with the same products."""
