"""Products of the columns A [d, i], assembled without ever holding all of A.

Sums over parameters are accumulated in float64, whatever the columns are: small eigenvalues are
differences that float32 sums do not resolve. Columns are counted by m·N + n; inside a chunk the
samples come first, n·m, as they come out of ``vmap``.

The columns are given as Jacobians: first those of the curvature, one a term of the loss, then,
where the gradient has parts that these do not span, some whose columns are gradients of samples. A
block is some of the parameters, with columns cut to them; one visit of the model serves all blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.columns.alignment import Leaves, cut_to
from ddnewton.columns.column_sums import inner_products, sums_of_columns
from ddnewton.columns.factors import (
    Factor,
    Jacobian,
    entry_count,
    from_order,
    in_order,
)
from ddnewton.trees import along_block


class Columns(NamedTuple):
    """The columns A [d, a] of a block as a linear map, and the rounding that they carry."""

    matmat: Callable[[Float[Tensor, "k a"]], Float[Tensor, "k d"]]  # W Aᵀ
    rmatmat: Callable[[Float[Tensor, "d k"]], Float[Tensor, "a k"]]  # AᵀE
    eps: float  # the rounding of a column
    sums: float  # the rounding of sums of products of columns, 0 for that of float64


def columns_of(jacobians: Sequence[Jacobian], block: Leaves) -> Columns:
    """Return the columns of all Jacobians along the parameters of one block."""
    return Columns(
        matmat=lambda weights: matmat(jacobians, [block], [weights])[0],
        rmatmat=partial(rmatmat, jacobians, block),
        eps=max(jacobian.eps for jacobian in jacobians),
        sums=max(jacobian.sums for jacobian in jacobians),
    )


def matmat(
    jacobians: Sequence[Jacobian], blocks: Sequence[Leaves], weights: Sequence[Float[Tensor, "_ a"]]
) -> list[Float[Tensor, "_ _"]]:
    """Return W Aᵀ for every block and its own weights W."""
    # The weights of every Jacobian's columns, then its sums beside those that are visited alike.
    counts = [jacobian.samples * jacobian.columns for jacobian in jacobians]
    split_weights = [block_weights.split(counts, 1) for block_weights in weights]
    totals: list[list[Tensor]] = [[] for _ in blocks]
    for numbers in _visited_alike(jacobians):
        first = jacobians[numbers[0]]
        own_weights = [[split[number] for split in split_weights] for number in numbers]
        if first.of_ranks is not None:
            sums = first.of_ranks.sums(blocks, own_weights[0])
        else:
            sums = sums_of([jacobians[number] for number in numbers], blocks, own_weights)
        for b, (block, entries) in enumerate(zip(blocks, sums, strict=True)):
            scale = scale_along(first, block)
            totals[b].append(entries if scale is None else scale * entries)
    return [_total(jacobian_sums) for jacobian_sums in totals]


def sums_of(
    jacobians: Sequence[Jacobian],
    blocks: Sequence[Leaves],
    weights: Sequence[Sequence[Float[Tensor, "_ _"]]],
) -> list[Float[Tensor, "_ _"]]:
    """Return W Aᵀ of the columns of Jacobians that are visited alike, for every block, in no units.

    There are weights of every Jacobian for every block.
    """
    # The sum over the columns of a chunk, for every block in the order of its factors.
    first = jacobians[0]
    cut = cuts_to(first, blocks)
    sums: list[list[Tensor]] = [[] for _ in blocks]
    for chunk in first.chunks:
        factors = []  # by loops: torch.compile makes constants of a slice's ends in a closure
        for jacobian in jacobians:
            factors.append(cut(jacobian.visit(chunk)))  # noqa: PERF401
        for b, of_block in enumerate(zip(*factors, strict=True)):
            w = []
            for jacobian, of_jacobian in zip(jacobians, weights, strict=True):
                w.append(of_chunk(jacobian, of_jacobian[b], chunk))
            same = zip(*of_block, strict=True)
            parts = [part for entries in same for part in sums_of_columns(entries, w)]
            sums[b].append(torch.cat([w[0].new_zeros(len(w[0]), 0), *parts], 1))
    # The sum over chunks, in the order of the parameters.
    pairs_of_sums = zip(sums, blocks, strict=True)
    return [in_order(_total(parts), order_of(first, block)) for parts, block in pairs_of_sums]


def _visited_alike(jacobians: Sequence[Jacobian]) -> list[list[int]]:
    """Return the numbers of Jacobians in groups of the same chunks of samples and factors."""
    if torch.compiler.is_compiling():  # which takes symbols of numbers of samples for constants
        return [[number] for number in range(len(jacobians))]
    groups: list[list[int]] = []
    for number, jacobian in enumerate(jacobians):
        for group in groups:
            if _are_alike(jacobian, jacobians[group[0]]):
                group.append(number)
                break
        else:
            groups.append([number])
    return groups


def _are_alike(left: Jacobian, right: Jacobian) -> bool:
    """Return whether two Jacobians have the same chunks of samples, and of factors."""
    same_pieces = list(map(list, left.pieces)) == list(map(list, right.pieces))
    here = left.of_ranks is None and right.of_ranks is None
    return here and left.order is right.order and same_pieces and left.chunks == right.chunks


def rmatmat(
    jacobians: Sequence[Jacobian], block: Leaves, vectors: Float[Tensor, "d k"]
) -> Float[Tensor, "a k"]:
    """Return AᵀE, the slopes of all columns along directions of a block."""
    parts = []
    for jacobian in jacobians:
        scale = scale_along(jacobian, block)
        entries_of = vectors.mT if scale is None else vectors.mT * scale
        of_all = jacobian.of_ranks.slopes if jacobian.of_ranks else partial(slopes_of, jacobian)
        parts.append(of_all(block, entries_of))
    return torch.cat(parts)


def slopes_of(
    jacobian: Jacobian, block: Leaves, vectors: Float[Tensor, "k d"]
) -> Float[Tensor, "i k"]:
    """Return the slopes of the columns of one Jacobian along vectors of a block, in no units."""
    cut, order = cuts_to(jacobian, [block]), order_of(jacobian, block)
    column_slopes = []
    for chunk in jacobian.chunks:
        # Cut the vectors into the entries of every factor, and sum over the factors.
        factors = cut(jacobian.visit(chunk))[0]
        counts = [entry_count(factor) for factor in factors]
        entries = from_order(vectors, order, sum(counts)).split(counts, 1)
        zeros = vectors.new_zeros(math.prod(_shape(jacobian, chunk)), len(vectors))
        column_slopes.append(sum(map(inner_products, factors, entries), start=zeros))
    return columns_first(torch.cat(column_slopes), jacobian.columns)


def columns_first(rows: Float[Tensor, "nm _"], m: int) -> Float[Tensor, "i _"]:
    """Return rows that come samples first, n·m, in the order of columns, m·N + n."""
    by_column: Tensor = rows.unflatten(0, (-1, m)).transpose(0, 1)
    return by_column.flatten(0, 1)


def scale_along(jacobian: Jacobian, block: Leaves) -> Float[Tensor, " d"] | None:
    """Return the scale of the parameters of a block, None where they have none."""
    if jacobian.scale is None or len(block) == len(jacobian.sizes):
        return jacobian.scale
    return along_block(jacobian.scale, block, jacobian.sizes)


def _total(parts: Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, parts)


def _shape(jacobian: Jacobian, chunk: slice) -> tuple[int, int]:
    """Return the number of samples in a chunk, and that of columns a sample."""
    return chunk.stop - chunk.start, jacobian.columns


def cuts_to(
    jacobian: Jacobian, blocks: Sequence[Leaves]
) -> Callable[[Sequence[Factor]], list[list[Factor]]]:
    """Return a function that cuts the factors of all parameters to those of every block."""
    cuts = [cut_to(jacobian, block) for block in blocks]
    return lambda factors: [cut(factors) for cut in cuts]


def order_of(jacobian: Jacobian, block: Leaves) -> Int[Tensor, " d"] | None:
    """Return for every parameter of a block which entry of its factors it is."""
    order, entries = jacobian.order, [piece for ps in jacobian.pieces for piece in ps]
    if order is None or len(block) == len(jacobian.sizes):
        return order
    kept = torch.cat([order.new_full((size,), leaf in block) for leaf, size in entries])
    place = torch.where(kept.bool(), kept.cumsum(0) - 1, kept.sum())
    place = torch.cat([place, kept.sum()[None]])
    by_leaf = order.split(list(jacobian.sizes))
    block_order: Tensor = place[torch.cat([by_leaf[leaf] for leaf in block])]
    return block_order


def of_chunk(
    jacobian: Jacobian, weights: Float[Tensor, "k i"], chunk: slice
) -> Float[Tensor, "k n m"]:
    """Return the weights of a chunk's columns."""
    by_sample: Tensor = weights.unflatten(1, (jacobian.columns, jacobian.samples))[:, :, chunk].mT
    return by_sample
