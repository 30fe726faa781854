"""Factors of chunks that are asked for again and again, kept as long as they are not too large."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ddnewton.columns.factors import Factor, Jacobian
from ddnewton.trees import tree_leaves

KEPT_FACTOR_BYTES = 2**29
"""Up to how many bytes the factors of a Jacobian are kept; those of further chunks are made anew at
every visit."""


def keeping(jacobian: Jacobian) -> Jacobian:
    """Return the same columns, whose factors are kept after the first visit, up to a size."""
    kept: dict[tuple[int, int], Sequence[Factor]] = {}

    def visit(chunk: slice) -> Sequence[Factor]:
        key = chunk.start, chunk.stop
        if key in kept:
            return kept[key]
        factors = jacobian.visit(chunk)
        if sum(map(_bytes, (*kept.values(), factors))) <= KEPT_FACTOR_BYTES:
            kept[key] = factors
        return factors

    return jacobian._replace(visit=visit)


def _bytes(factors: Sequence[Factor]) -> int:
    """Return how many bytes some factors take."""
    return sum(leaf.nbytes for leaf in tree_leaves(factors) if isinstance(leaf, Tensor))
