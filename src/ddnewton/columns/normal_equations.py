"""The normal equations of a block, G = A₁ diag(w) A₁ᵀ and g = A₁ z, in one pass over the columns.

On the side of the parameters G and g are all that a damped step and its promise ask for, and to
write the columns out takes as long as to multiply them: it is done once, for as many samples at a
time as stay in a processor's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.columns.alignment import Leaves
from ddnewton.columns.contraction import completed, product
from ddnewton.columns.factors import Factor, Jacobian, entry_count, joined_places, joined_rows
from ddnewton.columns.gram import cuts_to, of_chunk, order_of
from ddnewton.transforms import scaled, summed
from ddnewton.trees import chunks

CACHED_ENTRIES, ROWS_PER_ENTRY = 2**17, 4
"""How many entries of dense rows are made at a time, and how many rows at least for each entry of
one, so that the sum of their products is not what takes the time."""


class NormalEquations(NamedTuple):
    """G and g of a block, in the order of its parameters."""

    matrix: Float[Tensor, "d d"]
    gradient: Float[Tensor, " d"]


def normal_equations(
    jacobians: Sequence[Jacobian],
    blocks: Sequence[Leaves],
    weights: Float[Tensor, " i"],
    gradient_weights: Float[Tensor, " i"],
) -> list[NormalEquations]:
    """Return A diag(w) Aᵀ and A z for every block, with the columns of several Jacobians as A."""
    totals: list[NormalEquations | None] = [None for _ in blocks]
    counts = [jacobian.samples * jacobian.columns for jacobian in jacobians]
    both = torch.stack([weights, gradient_weights]).split(counts, 1)
    for jacobian, weights_of_both in zip(jacobians, both, strict=True):
        for b, sums in enumerate(_of_jacobian(jacobian, blocks, weights_of_both)):
            totals[b] = _sum(totals[b], sums)
    return [total for total in totals if total is not None]


def _of_jacobian(
    jacobian: Jacobian, blocks: Sequence[Leaves], weights: Float[Tensor, "2 i"]
) -> list[NormalEquations]:
    """Return the same for the columns of one Jacobian."""
    cut = cuts_to(jacobian, blocks)
    totals: list[NormalEquations | None] = [None for _ in blocks]
    places: list[Int[Tensor, " d"] | None] = [None for _ in blocks]
    for chunk in jacobian.chunks:
        of_curvature, of_gradient = of_chunk(jacobian, weights, chunk)
        for b, factors in enumerate(cut(jacobian.visit(chunk))):
            places[b] = joined_places(factors, order_of(jacobian, blocks[b]))
            for samples in _at_once(jacobian, factors, chunk):
                # The rows a for g, and √w a in their place for G.
                z, root = of_gradient[samples], of_curvature[samples].sqrt()
                rows = joined_rows(factors, z, samples)
                gradient = z.reshape(-1) @ rows
                rows = scaled(rows, root.reshape(-1, 1)).mT
                totals[b] = _sum(totals[b], NormalEquations(product(rows, rows), gradient))
    pairs = zip(totals, places, strict=True)
    return [_in_order(total, order) for total, order in pairs if total is not None]


def _at_once(jacobian: Jacobian, factors: Sequence[Factor], chunk: slice) -> list[slice]:
    """Return so many samples of a chunk at a time that their rows stay in the cache."""
    d = sum(map(entry_count, factors))
    rows = max(CACHED_ENTRIES // max(1, d), ROWS_PER_ENTRY * d)
    return chunks(chunk.stop - chunk.start, max(1, rows // jacobian.columns))


def _sum(total: NormalEquations | None, part: NormalEquations) -> NormalEquations:
    """Return a sum, in the memory of the total where there is one."""
    return part if total is None else NormalEquations(*map(summed, total, part))


def _in_order(total: NormalEquations, order: Int[Tensor, " d"] | None) -> NormalEquations:
    """Return sums over the entries of rows in the order of the parameters."""
    matrix, gradient = completed(total.matrix, symmetric=True), total.gradient
    if order is None:
        return NormalEquations(matrix, gradient)
    if len(order) != len(gradient):  # a parameter that no factor has is one past the last
        matrix, gradient = F.pad(matrix, (0, 1, 0, 1)), F.pad(gradient, (0, 1))
    return NormalEquations(matrix[order[:, None], order], gradient[order])
