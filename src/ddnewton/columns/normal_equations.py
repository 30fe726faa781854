"""The normal equations of a block, G = A₁ diag(w) A₁ᵀ and g = A₁ z, in one pass over the columns.

On the side of the parameters G and g are all that a damped step and its promise ask for, and to
write the columns out takes as long as to multiply them: it is done once, for as many samples at a
time as stay in a processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.columns.alignment import Leaves
from ddnewton.columns.factors import (
    Factor,
    Jacobian,
    Outer,
    dense_columns,
    device_of,
    entry_count,
    formed,
    in_order,
    of_samples,
    rows_of,
)
from ddnewton.columns.gram import columns_first, cuts_to, of_chunk, order_of, scale_along
from ddnewton.columns.symmetric_products import completed, product
from ddnewton.transforms import concatenated, is_batched, summed
from ddnewton.trees import chunks

CACHED_ENTRIES, LEAST_ROWS = 2**18, 64
"""How many entries of dense rows are made at a time, and how many rows at least, so that the sum of
their products is not what takes the time."""

ROWS_PER_ENTRY = 4
"""How many rows at least are made for each entry of one where a triangle is made of them."""

STRIPS, LONG_STRIP = 8, 64
"""The number of strips into which a sum of products is cut, to leave out what lies below the
diagonal, and how many rows one has at least."""


class NormalEquations(NamedTuple):
    """G and g of a block, in the order of its parameters."""

    matrix: Float[Tensor, "d d"]
    gradient: Float[Tensor, " d"]


class RowPiece(NamedTuple):
    """The rows a_i of some samples along a block, an entry for every entry of its factors.

    ``order`` is where in a row the parameters of the block are, None if they are in order.
    """

    block: int  # its number
    rows: Float[Tensor, "nm d"]
    weights: Float[Tensor, "k n m"]
    order: Int[Tensor, " d"] | None


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
    roots_and_z = torch.stack([weights.sqrt(), gradient_weights]).split(counts, 1)
    for jacobian, root_and_z in zip(jacobians, roots_and_z, strict=True):
        of_all = (
            jacobian.of_ranks.equations
            if jacobian.of_ranks
            else partial(equations_of_one, jacobian)
        )
        for b, sums in enumerate(of_all(blocks, root_and_z)):
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
    """Yield the rows √w_i a_i of a block, in the order of its parameters, some at a time.

    Where several processes hold the samples, as many rows of every one with the same products.
    """
    counts = [jacobian.samples * jacobian.columns for jacobian in jacobians]
    for jacobian, root in zip(jacobians, weights.sqrt().split(counts), strict=True):
        if jacobian.of_ranks:
            yield from jacobian.of_ranks.triangles(block, root)
            continue
        for piece in _row_pieces(jacobian, [block], root[None], ROWS_PER_ENTRY):
            yield in_order(piece.weights.reshape(-1, 1) * piece.rows, piece.order)


def scaled_rows(
    jacobians: Sequence[Jacobian], block: Leaves, weights: Float[Tensor, " i"]
) -> Float[Tensor, "i d"]:
    """Return the rows √w_i a_i of a block, all of them as columns are counted, in its units."""
    parts = []
    counts = [jacobian.samples * jacobian.columns for jacobian in jacobians]
    for jacobian, jacobian_weights in zip(jacobians, weights.split(counts), strict=True):
        if jacobian.of_ranks:
            parts.append(jacobian.of_ranks.rows(block, jacobian_weights))
            continue
        by_sample = concatenated(list(weighted_rows([jacobian], block, jacobian_weights)))
        parts.append(columns_first(by_sample, jacobian.columns))
    scale, rows = scale_along(jacobians[0], block), concatenated(parts)
    return rows if scale is None else scale * rows


def equations_of_one(
    jacobian: Jacobian, blocks: Sequence[Leaves], root_and_z: Float[Tensor, "2 i"]
) -> list[NormalEquations]:
    """Return A diag(w) Aᵀ and A z for every block, with the columns of one Jacobian as A."""
    totals: list[NormalEquations | None] = [None for _ in blocks]
    orders: list[Int[Tensor, " d"] | None] = [None for _ in blocks]
    for piece in _row_pieces(jacobian, blocks, root_and_z):
        # The rows √w a for G, and a for g.
        root, z = piece.weights.unbind()
        rows, slope = root.reshape(-1, 1) * piece.rows, z.reshape(-1) @ piece.rows
        total = totals[piece.block]
        totals[piece.block] = (
            NormalEquations(product(rows.mT, rows.mT), slope)
            if total is None
            else NormalEquations(_with_products(total.matrix, rows), summed(total.gradient, slope))
        )
        orders[piece.block] = piece.order
    pairs = zip(totals, orders, strict=True)
    return [_in_order(total, order) for total, order in pairs if total is not None]


def _with_products(total: Float[Tensor, "d d"], rows: Float[Tensor, "_ d"]) -> Float[Tensor, "d d"]:
    """Return a sum with the products of some more rows, in its memory where possible.

    As of `product`, perhaps only the upper triangle: see `completed`.
    """
    if is_batched(rows):
        return total + rows.mT @ rows
    for strip in chunks(len(total), max(LONG_STRIP, -(-len(total) // STRIPS))):
        total[strip, strip.start :].addmm_(rows[:, strip].mT, rows[:, strip.start :])
    return total


def _row_pieces(
    jacobian: Jacobian,
    blocks: Sequence[Leaves],
    weights: Float[Tensor, "k i"],
    rows_per_entry: int = 0,
) -> Iterator[RowPiece]:
    """Yield the rows of every block with their weights, as many at a time as stay in the cache."""
    cut = cuts_to(jacobian, blocks)
    for chunk in jacobian.chunks:
        chunk_weights = of_chunk(jacobian, weights, chunk)
        for b, factors in enumerate(cut(jacobian.visit(chunk))):
            order = _places(factors, order_of(jacobian, blocks[b]))
            readers = [_reader(factor, jacobian.columns) for factor in factors]
            for samples in _at_once(factors, chunk_weights.shape[1:], rows_per_entry):
                # The entries of all factors side by side.
                w = chunk_weights[:, samples]
                parts = [read(samples) for read in readers] or [w.new_empty(w[0].numel(), 0)]
                yield RowPiece(b, concatenated(parts, 1), w, order)


def _at_once(factors: Sequence[Factor], shape: Sequence[int], rows_per_entry: int) -> list[slice]:
    """Return so many samples at a time, of n with m columns, that their rows stay in the cache."""
    (n, m), d = shape, sum(map(entry_count, factors))
    if torch.compiler.is_compiling():  # one graph for any number of samples
        return [slice(0, n)]
    count = max(CACHED_ENTRIES // max(1, d), LEAST_ROWS, rows_per_entry * d)
    return chunks(n, max(1, count // m))


def _reader(factor: Factor, m: int) -> Callable[[slice], Float[Tensor, "nm _"]]:
    """Return a function from some samples to the rows of a factor, in float64.

    Where each entry of an outer product is, `_by_piece` tells.
    """
    if not isinstance(factor, Outer):
        return lambda samples: dense_columns(of_samples(factor, samples, m)).double()
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
        count = entry_count(factor)
        places += _by_piece(factor, torch.arange(start, start + count, device=device_of(factor)))
        start += count
    all_places = torch.cat([*places, places[0].new_full((1,), start)])
    return all_places[:-1] if order is None else all_places[order]


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
    return NormalEquations(matrix[order[:, None], order], gradient[order])
