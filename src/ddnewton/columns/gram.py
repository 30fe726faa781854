"""Products of the columns A [d, i], assembled without ever holding all of A.

Sums over parameters are accumulated in float64, whatever the columns are: small eigenvalues are
differences that float32 sums do not resolve. What counts columns runs m·N + n; inside a chunk
samples come first, n·m, as they come out of ``vmap``.

Columns come in batches: first those that make the curvature, then, where the gradient has parts
that these do not span, its own. A block is some of the parameters, with columns cut to them; all
blocks are served by one visit of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.columns.contraction import completed, inner, product
from ddnewton.columns.factors import (
    Factor,
    Jacobian,
    dense_columns,
    entry_count,
    from_order,
    in_order,
    inner_products,
    pieces,
    weighted_sums,
)
from ddnewton.inputs.checks import check_derivatives
from ddnewton.transforms import summed

Leaves: TypeAlias = Sequence[int]
"""The numbers of the leaves that make up a block."""


class Columns(NamedTuple):
    """What the spectrum asks of the columns of a block."""

    rmatmat: Callable[[Float[Tensor, "d k"]], Float[Tensor, "i k"]]  # AᵀE
    matmat: Callable[[Float[Tensor, "k a"]], Float[Tensor, "k d"]]  # W Aᵀ
    eps: float  # the rounding of a column
    sums: float  # the rounding of sums of products of columns, 0 for that of float64


def columns_of(batches: Sequence[Jacobian], block: Leaves) -> Columns:
    """Return what is to be had of the columns of a block, as they come."""
    return Columns(
        rmatmat=partial(rmatmat, batches, block),
        matmat=lambda weights: matmat(batches, [block], [weights])[0],
        eps=max(jacobian.eps for jacobian in batches),
        sums=max(jacobian.sums for jacobian in batches),
    )


def small_matrices(
    batches: Sequence[Jacobian], blocks: Sequence[Leaves], weights: Float[Tensor, " i"]
) -> list[Float[Tensor, "_ _"]]:
    """Return for every block AᵀA₁, or A₁ diag(w) A₁ᵀ [d, d] where that is smaller.

    A₁ are the columns of the curvature; the rows of AᵀA₁ are theirs, and then all others.
    """
    first, sizes = batches[0], batches[0].sizes
    ds = [sum(sizes[leaf] for leaf in block) for block in blocks]
    by_columns = [weights.shape[0] <= d or d == 0 for d in ds]
    chosen = [block for block, yes in zip(blocks, by_columns, strict=True) if yes]
    rows = [products(jacobian, first, chosen) for jacobian in batches] if chosen else []
    tall = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*rows, strict=True))
    others = [block for block, yes in zip(blocks, by_columns, strict=True) if not yes]
    square = iter(_outers(first, others, weights) if others else [])
    matrices = [next(tall) if yes else next(square) for yes in by_columns]
    for matrix in matrices:
        # What is not finite in a column shows in its square: no need to look at every product.
        check_derivatives(matrix.diagonal())
        check_derivatives(matrix[matrix.shape[1] :])
    return matrices


def is_gram(matrix: Float[Tensor, "side side2"], weights: Float[Tensor, " i"]) -> bool:
    """Return whether it is AᵀA₁, as also where both sides are equally long."""
    return matrix.shape[1] == weights.shape[0]


def products(
    left: Jacobian, right: Jacobian, blocks: Sequence[Leaves]
) -> list[Float[Tensor, "i j"]]:
    """Return AᵀB for every block; of one batch with itself half of it, and its mirror image."""
    same = left is right
    cut_left, cut_right = _cuts(left, blocks), _cuts(right, blocks)
    rows: list[list[list[Tensor]]] = [[[] for _ in left.chunks] for _ in blocks]
    for i, chunk in enumerate(left.chunks):
        mine = cut_left(left.visit(chunk))
        for j, other in enumerate(right.chunks):
            if same and j < i:
                continue
            theirs = mine if same and i == j else cut_right(right.visit(other))
            for row, a, b in zip(rows, mine, theirs, strict=True):
                shape = (*_shape(left, chunk), *_shape(right, other))
                terms = (inner(x, y, shape[1::2]) for x, y in zip(a, b, strict=True))
                # A block of which the model makes no use has no factors, and no products.
                row[i].append(reduce(summed, terms) if a else _zeros(shape, left))
                if same and i != j:
                    row[j].append(row[i][-1].permute(2, 3, 0, 1))
    return [_counted(_beside([_beside(parts, 2) for parts in row], 0)) for row in rows]


def matmat(
    batches: Sequence[Jacobian], blocks: Sequence[Leaves], weights: Sequence[Float[Tensor, "_ i"]]
) -> list[Float[Tensor, "_ _"]]:
    """Return W Aᵀ for every block and its own weights."""
    counts = [jacobian.samples * jacobian.columns for jacobian in batches]
    shares = [each.split(counts, 1) for each in weights]
    totals: list[list[Tensor]] = [[] for _ in blocks]
    for number, jacobian in enumerate(batches):
        cut = _cuts(jacobian, blocks)
        sums: list[list[Tensor]] = [[] for _ in blocks]
        for chunk in jacobian.chunks:
            for b, factors in enumerate(cut(jacobian.visit(chunk))):
                mine = _of_chunk(jacobian, shares[b][number], chunk)
                parts = [part for factor in factors for part in weighted_sums(factor, mine)]
                sums[b].append(torch.cat([mine.new_zeros(len(mine), 0), *parts], 1))
        for b, block in enumerate(blocks):
            totals[b].append(in_order(_total(sums[b]), _order(jacobian, block)))
    return [_total(each) for each in totals]


def _total(parts: Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, parts)


def _outers(
    jacobian: Jacobian, blocks: Sequence[Leaves], weights: Float[Tensor, " i"]
) -> list[Float[Tensor, "_ _"]]:
    cut = _cuts(jacobian, blocks)
    orders = [_order(jacobian, block) for block in blocks]
    totals: list[list[Tensor]] = [[] for _ in blocks]
    for chunk in jacobian.chunks:
        root = _of_chunk(jacobian, weights[None], chunk).sqrt().reshape(-1, 1)
        for b, factors in enumerate(cut(jacobian.visit(chunk))):
            a = (root * _side_by_side(factors, orders[b], root)).mT
            totals[b].append(product(a, a))
    return [completed(_total(each), symmetric=True) for each in totals]


def rmatmat(
    batches: Sequence[Jacobian], block: Leaves, vectors: Float[Tensor, "d k"]
) -> Float[Tensor, "a k"]:
    """Return AᵀE, the slopes of all columns along directions of a block."""
    parts = []
    for jacobian in batches:
        cut, order = _cuts(jacobian, [block]), _order(jacobian, block)
        slopes = []
        for chunk in jacobian.chunks:
            factors = cut(jacobian.visit(chunk))[0]
            widths = [entry_count(factor) for factor in factors]
            entries = from_order(vectors.mT, order, sum(widths)).split(widths, 1)
            none = vectors.new_zeros(math.prod(_shape(jacobian, chunk)), vectors.shape[1])
            slopes.append(sum(map(inner_products, factors, entries), start=none))
        parts.append(torch.cat(slopes).unflatten(0, (-1, jacobian.columns)).transpose(0, 1))
    return torch.cat([part.flatten(0, 1) for part in parts])


def _beside(parts: Sequence[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), axis)


def _zeros(shape: Sequence[int], jacobian: Jacobian) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=jacobian.device)


def _shape(jacobian: Jacobian, chunk: slice) -> tuple[int, int]:
    return chunk.stop - chunk.start, jacobian.columns


def _cuts(
    jacobian: Jacobian, blocks: Sequence[Leaves]
) -> Callable[[Sequence[Factor]], list[list[Factor]]]:
    """Return how to cut the factors of all parameters to those of every block."""
    whole = len(jacobian.sizes)
    if all(len(block) == whole for block in blocks):
        return lambda factors: [list(factors) for _ in blocks]
    which = [[[leaf in block for leaf, _ in each] for each in jacobian.pieces] for block in blocks]

    def cut(factors: Sequence[Factor]) -> list[list[Factor]]:
        found = (map(pieces, factors, wanted) for wanted in which)
        return [[factor for factor in each if factor is not None] for each in found]

    return cut


def _order(jacobian: Jacobian, block: Leaves) -> Int[Tensor, " d"] | None:
    """Return for every parameter of a block which entry of its factors it is."""
    order, entries = jacobian.order, [piece for each in jacobian.pieces for piece in each]
    if order is None or len(block) == len(jacobian.sizes):
        return order
    kept = torch.cat([order.new_full((size,), leaf in block) for leaf, size in entries])
    place = torch.where(kept.bool(), kept.cumsum(0) - 1, kept.sum())
    place = torch.cat([place, kept.sum()[None]])
    own = order.split(list(jacobian.sizes))
    mine: Tensor = place[torch.cat([own[leaf] for leaf in block])]
    return mine


def _counted(whole: Float[Tensor, "n m n2 m2"]) -> Float[Tensor, "i j"]:
    """Return a matrix over columns in the order in which they are counted."""
    return whole.permute(1, 0, 3, 2).flatten(0, 1).flatten(1, 2)


def _side_by_side(
    factors: Sequence[Factor], order: Int[Tensor, " d"] | None, rows: Float[Tensor, "nm _"]
) -> Float[Tensor, "nm d"]:
    """Return the columns themselves; as many as there are ``rows``."""
    entries = [dense_columns(factor).double() for factor in factors]
    columns: Tensor = in_order(torch.cat([rows[:, :0], *entries], 1), order)
    return columns


def _of_chunk(
    jacobian: Jacobian, weights: Float[Tensor, "k i"], chunk: slice
) -> Float[Tensor, "k n m"]:
    """Return the weights of a chunk's columns."""
    mine: Tensor = weights.unflatten(1, (jacobian.columns, jacobian.samples))[:, :, chunk].mT
    return mine
