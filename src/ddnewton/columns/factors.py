"""Columns of the Jacobian by layers: as they are, or as sums of outer products Σ_t b_t ⊗ a_t."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor

INTERMEDIATE_BYTES = 2**25
"""How large an intermediate may be: a few of them at once stay in a processor's cache."""


class Outer(NamedTuple):
    """Columns of some samples as outer products.

    Integers [n 1 t] in place of ``a`` are the positions of ones in rows of zeros; −1 is no one.
    """

    a: Num[Tensor, "n g t ..."]
    b: Float[Tensor, "n m g o t"]
    widths: tuple[int, ...]  # of the pieces, a weight and its bias, that make up axis p


Factor: TypeAlias = Tensor | Outer
"""Columns of some samples along some parameters: as they are [n·m, d], or as outer products."""


class Jacobian(NamedTuple):
    """The columns of a batch, to be had chunk by chunk, factors side by side.

    ``pieces`` says of which leaf, and how many of its entries, every factor's pieces are;
    ``order`` for every parameter where it is among the factors' entries, one past the last where
    it is in none; None where they follow each other.
    """

    visit: Callable[[slice], Sequence[Factor]]
    chunks: Sequence[slice]
    samples: int
    columns: int  # of one sample: m
    sizes: Sequence[int]  # of the leaves
    pieces: Sequence[Sequence[tuple[int, int]]]
    order: Int[Tensor, " d"] | None
    device: torch.device
    eps: float  # the rounding of a column
    sums: float  # and of sums of their products, where those are not in float64


def weighted_sums(factor: Factor, weights: Float[Tensor, "k n m"]) -> list[Float[Tensor, "k _"]]:
    """Return weighted sums of columns in float64, in pieces."""
    if isinstance(factor, Outer):
        few = max(1, INTERMEDIATE_BYTES // (factor.b[:, 0].numel() * factor.b.element_size()))
        if len(weights) <= few:
            return _weighted_sums_outer(factor, weights)
        sums = [_weighted_sums_outer(factor, some) for some in weights.split(few)]
        return [torch.cat(pieces) for pieces in zip(*sums, strict=True)]
    w = weights.flatten(1)
    return [w @ part.double() for part in factor.split(entries_at_once(factor), 1)]


def inner_products(factor: Factor, vectors: Float[Tensor, "k _"]) -> Float[Tensor, "nm k"]:
    """Return the inner products of columns with vectors, in float64.

    The transpose of `weighted_sums`: vectors hold the pieces that it returns, one after the other.
    """
    if not isinstance(factor, Outer):
        few = entries_at_once(factor)
        parts = zip(factor.split(few, 1), vectors.split(few, 1), strict=True)
        return torch.as_tensor(sum(part.double() @ vector.double().T for part, vector in parts))
    few = max(1, INTERMEDIATE_BYTES // (factor.b[:, 0].numel() * factor.b.element_size()))
    return torch.cat([_inner_products_outer(factor, some) for some in vectors.split(few)], 1)


def entry_count(factor: Factor) -> int:
    """Return along how many parameters the columns are."""
    if not isinstance(factor, Outer):
        return factor.shape[1]
    return math.prod(factor.b.shape[2:4]) * sum(factor.widths)


def pieces(factor: Factor, which: Sequence[bool]) -> Factor | None:
    """Return the columns along some of the pieces that a factor is made of, None for no piece."""
    if all(which):
        return factor
    if not (isinstance(factor, Outer) and any(which)):
        return None
    widths = tuple(width for width, wanted in zip(factor.widths, which, strict=True) if wanted)
    parts = zip(factor.a.split(factor.widths, -1), which, strict=True)
    return Outer(torch.cat([part for part, wanted in parts if wanted], -1), factor.b, widths)


def dense_columns(factor: Factor) -> Float[Tensor, "nm _"]:
    """Return the columns themselves."""
    if not isinstance(factor, Outer):
        return factor
    whole = torch.einsum("nmgot,ngtp->nmgop", factor.b, rows_of(factor))
    return torch.cat([part.flatten(2).flatten(0, 1) for part in whole.split(factor.widths, -1)], 1)


def in_order(
    entries: Float[Tensor, "*rows _"], order: Int[Tensor, " d"] | None
) -> Float[Tensor, "*rows d"]:
    """Return the parameters, each by its number among the entries; the one past the last is 0."""
    return entries if order is None else F.pad(entries, (0, 1))[..., order]


def from_order(
    vectors: Float[Tensor, "*rows d"], order: Int[Tensor, " d"] | None, count: int
) -> Float[Tensor, "*rows _"]:
    """Return entries from parameters: the transpose of `in_order`."""
    if order is None:
        return vectors
    entries: Tensor = vectors.new_zeros((*vectors.shape[:-1], count + 1))
    return entries.index_add(-1, order, vectors)[..., :-1]


def _weighted_sums_outer(
    outer: Outer, weights: Float[Tensor, "k n m"]
) -> list[Float[Tensor, "k _"]]:
    k, shape = weights.shape[0], outer.b.shape[2:]
    g, o, _ = shape
    b = (weights.to(outer.b.dtype).transpose(0, 1) @ outer.b.flatten(2)).unflatten(2, shape)
    if single_position(outer):
        total = (b.flatten(1).T @ outer.a[:, 0, 0]).unflatten(0, (k, o))
    elif outer.a.is_floating_point():
        total = torch.einsum("nkgot,ngtp->kgop", b, outer.a)
    else:
        size = sum(outer.widths)
        rows = b.permute(0, 4, 1, 2, 3).flatten(0, 1).flatten(1)
        places = torch.where(outer.a < 0, size, outer.a).flatten()
        sums = rows.new_zeros(size + 1, k * g * o).index_add(0, places, rows)
        total = sums[:-1].T.unflatten(0, (k, g * o))
    return [part.reshape(k, -1).double() for part in total.split(outer.widths, -1)]


def _inner_products_outer(outer: Outer, vectors: Float[Tensor, "k _"]) -> Float[Tensor, "nm k"]:
    _, _, g, o, _ = outer.b.shape
    parts = vectors.to(outer.b.dtype).split([g * o * width for width in outer.widths], 1)
    E = torch.cat([part.unflatten(1, (g, o, -1)) for part in parts], -1)
    if outer.a.is_floating_point():
        through = torch.einsum("kgop,ngtp->nkgot", E, outer.a)
    else:
        size = sum(outer.widths)
        places = torch.where(outer.a < 0, size, outer.a)[:, 0]
        through = F.pad(E, (0, 1))[..., places].movedim(3, 0)
    slopes: Tensor = outer.b.flatten(2) @ through.flatten(2).mT
    return slopes.flatten(0, 1).double()


def single_position(outer: Outer) -> bool:
    """Return whether there is but one position."""
    _, _, g, _, t = outer.b.shape
    return g == t == 1 and outer.a.is_floating_point()


def entries_at_once(rows: Tensor) -> int:
    """Return how many entries of all rows to take at a time."""
    return max(1, INTERMEDIATE_BYTES // (2 * rows.shape[0]))


def rows_of(outer: Outer) -> Float[Tensor, "n g t p"]:
    """Return a as numbers."""
    if outer.a.is_floating_point():
        return outer.a
    numbers = torch.arange(sum(outer.widths), device=outer.a.device)
    return (outer.a[..., None] == numbers).to(outer.b.dtype)
