"""The normal equations of a block, G = A₁ diag(w) A₁ᵀ and g = A₁ z, in one pass over the columns.

On the side of the parameters G and g are all that a damped step and its promise ask for, and to
write the columns out takes as long as to multiply them: it is done once, for as many samples at a
time as stay in a processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.columns.alignment import Leaves
from ddnewton.columns.contraction import completed, product
from ddnewton.columns.factors import (
    Factor,
    Jacobian,
    Outer,
    entry_count,
    formed,
    in_order,
    rows_of,
)
from ddnewton.columns.gram import cuts_to, of_chunk, order_of, scale_along
from ddnewton.transforms import concatenated, summed
from ddnewton.trees import chunks

CACHED_ENTRIES, ROWS_PER_ENTRY = 2**16, 4
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
    # The sums over the columns of all Jacobians.
    totals: list[NormalEquations | None] = [None for _ in blocks]
    counts = [jacobian.samples * jacobian.columns for jacobian in jacobians]
    both = torch.stack([weights, gradient_weights]).split(counts, 1)
    for jacobian, weights_of_both in zip(jacobians, both, strict=True):
        for b, sums in enumerate(_of_jacobian(jacobian, blocks, weights_of_both)):
            totals[b] = _sum(totals[b], sums)
    equations = [total for total in totals if total is not None]
    # In other units of the parameters, S G S and S g.
    scales = [scale_along(jacobians[0], block) for block in blocks]
    return [
        total
        if scale is None
        else NormalEquations(scale[:, None] * total.matrix * scale, scale * total.gradient)
        for total, scale in zip(equations, scales, strict=True)
    ]


def weighted_rows(
    jacobians: Sequence[Jacobian], block: Leaves, weights: Float[Tensor, " i"]
) -> Iterator[Float[Tensor, "_ d"]]:
    """Yield the rows √w_i a_i of a block, in the order of its parameters, some at a time."""
    counts = [jacobian.samples * jacobian.columns for jacobian in jacobians]
    for jacobian, own_weights in zip(jacobians, weights.split(counts), strict=True):
        cut = cuts_to(jacobian, [block])
        for chunk in jacobian.chunks:
            root = of_chunk(jacobian, own_weights[None], chunk)[0].sqrt()
            factors = cut(jacobian.visit(chunk))[0]
            order = _places(factors, order_of(jacobian, block))
            readers = [_reader(factor, jacobian.columns) for factor in factors]
            for samples in _at_once(factors, *root.shape):
                # The entries of all factors side by side, then in the order of the parameters.
                rows = root[samples].reshape(-1, 1)
                parts = [read(samples) for read in readers] or [rows[:, :0]]
                yield in_order(rows * concatenated(parts, 1), order)


def scaled_rows(
    jacobians: Sequence[Jacobian], block: Leaves, weights: Float[Tensor, " i"]
) -> Float[Tensor, "i d"]:
    """Return the rows √w_i a_i of a block, all of them as columns are counted, in its units."""
    parts = []
    counts = [jacobian.samples * jacobian.columns for jacobian in jacobians]
    for jacobian, own_weights in zip(jacobians, weights.split(counts), strict=True):
        rows = concatenated(list(weighted_rows([jacobian], block, own_weights)))
        # From samples first, n·m, to columns first, m·N + n.
        parts.append(rows.unflatten(0, (-1, jacobian.columns)).transpose(0, 1).flatten(0, 1))
    scale = scale_along(jacobians[0], block)
    whole = concatenated(parts)
    return whole if scale is None else scale * whole


def _of_jacobian(
    jacobian: Jacobian, blocks: Sequence[Leaves], weights: Float[Tensor, "2 i"]
) -> list[NormalEquations]:
    """Return the same for the columns of one Jacobian."""
    cut = cuts_to(jacobian, blocks)
    totals: list[NormalEquations | None] = [None for _ in blocks]
    places: list[Int[Tensor, " d"] | None] = [None for _ in blocks]
    for chunk in jacobian.chunks:
        of_curvature, of_gradient = of_chunk(jacobian, weights, chunk).unbind()
        root = of_curvature.sqrt()
        for b, factors in enumerate(cut(jacobian.visit(chunk))):
            places[b] = _places(factors, order_of(jacobian, blocks[b]))
            readers = [_reader(factor, jacobian.columns) for factor in factors]
            for samples in _at_once(factors, *root.shape):
                # The rows a for g, and √w a for G.
                z = of_gradient[samples].reshape(-1)
                parts = [read(samples) for read in readers] or [z.new_empty(len(z), 0)]
                rows = concatenated(parts, 1)
                scaled = (root[samples].reshape(-1, 1) * rows).mT
                totals[b] = _sum(totals[b], NormalEquations(product(scaled, scaled), z @ rows))
    pairs = zip(totals, places, strict=True)
    return [_in_order(total, order) for total, order in pairs if total is not None]


def _at_once(factors: Sequence[Factor], n: int, m: int) -> list[slice]:
    """Return so many samples at a time, of n with m columns, that their rows stay in the cache."""
    d = sum(map(entry_count, factors))
    return chunks(n, max(1, max(CACHED_ENTRIES // max(1, d), ROWS_PER_ENTRY * d) // m))


def _reader(factor: Factor, m: int) -> Callable[[slice], Float[Tensor, "nm _"]]:
    """Return a function from some samples to the rows of a factor, in float64.

    Where each entry of an outer product is, `_by_piece` tells.
    """
    if not isinstance(factor, Outer):
        return lambda samples: factor[samples.start * m : samples.stop * m].double()
    b, a = factor.b, rows_of(factor)
    if b.shape[4] > 1:
        return lambda samples: formed(b[samples], a[samples]).flatten(2).flatten(0, 1).double()
    left, right = a[:, None], b
    if _is_a_first(factor):
        left, right = left.mT, right.mT
    return lambda samples: (left[samples] * right[samples]).flatten(2).flatten(0, 1).double()


def _is_a_first(outer: Outer) -> bool:
    """Return whether entries are counted [p o], not [o p].

    Of a single position they come of a broadcast, which takes half the time along the longer axis.
    """
    return outer.b.shape[4] == 1 and sum(outer.widths) < outer.b.shape[3]


def _places(factors: Sequence[Factor], order: Int[Tensor, " d"] | None) -> Int[Tensor, " d"] | None:
    """Return the places in rows of the parameters, given their order in the pieces of factors."""
    if not any(isinstance(factor, Outer) for factor in factors):
        return order
    # The places of all pieces, one after the other, and one past the last.
    places: list[Tensor] = []
    start = 0
    for factor in factors:
        device = factor.b.device if isinstance(factor, Outer) else factor.device
        count = entry_count(factor)
        places += _by_piece(factor, torch.arange(start, start + count, device=device))
        start += count
    whole = torch.cat([*places, places[0].new_full((1,), start)])
    return whole[:-1] if order is None else whole[order]


def _by_piece(factor: Factor, entries: Int[Tensor, " _"]) -> list[Int[Tensor, " _"]]:
    """Return the entries of a factor in rows, piece by piece as it has them."""
    if not isinstance(factor, Outer):
        return [entries]
    g, o = factor.b.shape[2:4]
    by_axes = entries.reshape(g, -1, o).mT if _is_a_first(factor) else entries.reshape(g, o, -1)
    return [piece.reshape(-1) for piece in by_axes.split(factor.widths, 2)]


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
    return NormalEquations(matrix[order][:, order], gradient[order])
