"""Columns of the Jacobian, layer by layer: dense, or as sums of outer products Σ_t b_t ⊗ a_t."""

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


WRITTEN_ENTRIES, WRITTEN_PRODUCTS = 2**19, 2**25
"""Up to how many entries columns are kept dense, and of how many multiplications of their inner
products: so many take a few milliseconds."""


class Outer(NamedTuple):
    """Columns of some samples as outer products.

    Integers [n 1 t] in place of ``a`` stand for rows of zeros with a single one: each is the place
    of that one in its row, or −1 where there is none.
    """

    a: Num[Tensor, "n g t ..."]
    b: Float[Tensor, "n m g o t"]
    widths: tuple[int, ...]  # of the pieces, a weight and its bias, that make up axis p


Factor: TypeAlias = Tensor | Outer
"""Columns of some samples along some parameters: dense [n·m, d], or as outer products."""


class Jacobian(NamedTuple):
    """The columns of a batch, computed chunk by chunk, as factors that stand side by side.

    ``visit`` returns the factors of a chunk of samples. ``pieces`` says for every factor from which
    leaves its pieces are, and how many entries of the leaf each has. ``order`` is the place of
    every parameter among the entries of all factors, one past the last for a parameter that is in
    none; None if the parameters follow each other as they are.
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
    sums: float  # the rounding of sums of products of columns, 0 for that of float64
    scale: Float[Tensor, " d"] | None = None  # the columns are S A, with S = diag(scale)


def written_out(jacobian: Jacobian, factors: Sequence[Factor]) -> Jacobian:
    """Return a Jacobian with these factors, all in one chunk, as dense columns where they are few.

    Products of small matrices take less time than finding out how to leave them out. All pieces are
    of one factor.
    """
    count, d = jacobian.samples * jacobian.columns, sum(map(entry_count, factors))
    if count * d > WRITTEN_ENTRIES or count * d * min(count, d) > WRITTEN_PRODUCTS:
        return jacobian
    columns = torch.cat([piece for factor in factors for piece in dense_pieces(factor)], 1)
    pieces = [piece for of_factor in jacobian.pieces for piece in of_factor]
    return jacobian._replace(visit=lambda _: [columns], pieces=[pieces])


def weighted_sums(factor: Factor, weights: Float[Tensor, "k n m"]) -> list[Float[Tensor, "k _"]]:
    """Return the sums of columns with every row of weights, in float64, one tensor a piece."""
    if isinstance(factor, Outer):
        count = _vectors_at_once(factor)
        if len(weights) <= count:
            return _weighted_sums_outer(factor, weights)
        sums = [_weighted_sums_outer(factor, rows) for rows in weights.split(count)]
        return [torch.cat(pieces) for pieces in zip(*sums, strict=True)]
    w = weights.flatten(1)
    return [w @ part.double() for part in factor.split(entries_at_once(factor), 1)]


def inner_products(factor: Factor, vectors: Float[Tensor, "k _"]) -> Float[Tensor, "nm k"]:
    """Return the inner products of columns with vectors, in float64.

    This is the transpose of `weighted_sums`: a vector holds the pieces that it returns, one after
    the other.
    """
    if not isinstance(factor, Outer):
        width = entries_at_once(factor)
        parts = zip(factor.split(width, 1), vectors.split(width, 1), strict=True)
        return torch.as_tensor(sum(part.double() @ vector.double().T for part, vector in parts))
    groups = vectors.split(_vectors_at_once(factor))
    return torch.cat([_inner_products_outer(factor, group) for group in groups], 1)


def entry_count(factor: Factor) -> int:
    """Return the number of parameters along which the columns are."""
    if not isinstance(factor, Outer):
        return factor.shape[1]
    return math.prod(factor.b.shape[2:4]) * sum(factor.widths)


def pieces(factor: Factor, wanted: Sequence[bool], sizes: Sequence[int]) -> Factor | None:
    """Return a factor cut to the wanted ones of its pieces, None if it has none of them."""
    if all(wanted):
        return factor
    if not any(wanted):
        return None
    if not isinstance(factor, Outer):
        parts = zip(factor.split(list(sizes), 1), wanted, strict=True)
        return torch.cat([part for part, keep in parts if keep], 1)
    widths = tuple(width for width, keep in zip(factor.widths, wanted, strict=True) if keep)
    parts = zip(factor.a.split(factor.widths, -1), wanted, strict=True)
    return Outer(torch.cat([part for part, keep in parts if keep], -1), factor.b, widths)


def dense_columns(factor: Factor) -> Float[Tensor, "nm _"]:
    """Return columns as the rows of a matrix, outer products summed over positions."""
    return torch.cat(dense_pieces(factor), 1) if isinstance(factor, Outer) else factor


def dense_pieces(factor: Factor) -> list[Float[Tensor, "nm _"]]:
    """Return columns as rows along every piece, to be put beside those of other factors."""
    if not isinstance(factor, Outer):
        return [factor]
    columns = formed(factor.b, rows_of(factor))
    return [part.flatten(2).flatten(0, 1) for part in columns.split(factor.widths, -1)]


def formed(
    b: Float[Tensor, "n m g o t"], a: Float[Tensor, "n g t p"]
) -> Float[Tensor, "n m g o p"]:
    """Return Σ_t b_t ⊗ a_t; a single position takes no sum, and no small products."""
    if a.shape[2] == 1:
        return b * a[:, None]
    if b.shape[1] == 1:
        return (b[:, 0] @ a)[:, None]
    return torch.einsum("nmgot,ngtp->nmgop", b, a)


def in_order(
    entries: Float[Tensor, "*rows _"], order: Int[Tensor, " d"] | None
) -> Float[Tensor, "*rows d"]:
    """Return the entries of all factors in the order of the parameters, 0 for those in none."""
    if order is None:
        return entries
    return (entries if len(order) == entries.shape[-1] else F.pad(entries, (0, 1)))[..., order]


def from_order(
    vectors: Float[Tensor, "*rows d"], order: Int[Tensor, " d"] | None, count: int
) -> Float[Tensor, "*rows _"]:
    """Return vectors over parameters as over the factors' entries: the transpose of `in_order`."""
    if order is None:
        return vectors
    entries: Tensor = vectors.new_zeros((*vectors.shape[:-1], count + 1))
    return entries.index_add(-1, order, vectors)[..., :-1]


def _weighted_sums_outer(
    outer: Outer, weights: Float[Tensor, "k n m"]
) -> list[Float[Tensor, "k _"]]:
    """Return Σ_nm w_nm Σ_t b_nmt ⊗ a_nt for every row w of the weights."""
    k, shape = weights.shape[0], outer.b.shape[2:]
    g, o, _ = shape
    # First Σ_m w_nm b_nmt [n k g o t], then the sum over samples and positions with a. A product of
    # many small matrices takes several times as long as one of their entries.
    by_sample = weights.to(outer.b.dtype).transpose(0, 1)
    if outer.b.shape[1] == 1:
        b = by_sample[..., None, None] * outer.b
    else:
        b = (by_sample @ outer.b.flatten(2)).unflatten(2, shape)
    if single_position(outer):
        total = (b.flatten(1).T @ outer.a[:, 0, 0]).unflatten(0, (k, o))
    elif outer.a.is_floating_point():
        total = torch.einsum("nkgot,ngtp->kgop", b, outer.a)
    else:
        # A row of a has a single one: add b at its place, or, without one, in a row cut off below.
        size = sum(outer.widths)
        rows = b.permute(0, 4, 1, 2, 3).flatten(0, 1).flatten(1)
        places = torch.where(outer.a < 0, size, outer.a).flatten()
        sums = rows.new_zeros(size + 1, k * g * o).index_add(0, places, rows)
        total = sums[:-1].T.unflatten(0, (k, g * o))
    # The pieces, a weight and its bias, are summed at once and cut apart at the end.
    return [part.reshape(k, -1).double() for part in total.split(outer.widths, -1)]


def _inner_products_outer(outer: Outer, vectors: Float[Tensor, "k _"]) -> Float[Tensor, "nm k"]:
    """Return Σ_t b_nmtᵀ E_k a_nt, with every vector as a matrix E_k [g o p]."""
    _, _, g, o, _ = outer.b.shape
    parts = vectors.to(outer.b.dtype).split([g * o * width for width in outer.widths], 1)
    E = torch.cat([part.unflatten(1, (g, o, -1)) for part in parts], -1)
    if single_position(outer) and outer.b.shape[1] == 1:
        return _inner_products_single(outer.a[:, 0, 0], outer.b[:, 0, 0, :, 0], E[:, 0]).double()
    # First E a [n k g o t], which is a column of E where a is a one at a place.
    if outer.a.is_floating_point():
        Ea = torch.einsum("kgop,ngtp->nkgot", E, outer.a)
    else:
        size = sum(outer.widths)
        places = torch.where(outer.a < 0, size, outer.a)[:, 0]
        Ea = F.pad(E, (0, 1))[..., places].movedim(3, 0)
    products: Tensor = outer.b.flatten(2) @ Ea.flatten(2).mT
    return products.flatten(0, 1).double()


def _inner_products_single(
    a: Float[Tensor, "n p"], b: Float[Tensor, "n o"], E: Float[Tensor, "k o p"]
) -> Float[Tensor, "n k"]:
    """Return b_nᵀE_k a_n, one large product with the longer of a and b before sums of the other."""
    if b.shape[1] > a.shape[1]:
        a, b, E = b, a, E.mT
    products: Tensor = (a @ E.flatten(0, 1).mT).unflatten(1, E.shape[:2]) * b[:, None]
    return products.sum(2)


def single_position(outer: Outer) -> bool:
    """Return whether every column is one outer product: a single position, and one group."""
    _, _, g, _, t = outer.b.shape
    return g == t == 1 and outer.a.is_floating_point()


def entries_at_once(rows: Tensor) -> int:
    """Return the number of entries which, taken of all rows, fit into an intermediate."""
    return max(1, INTERMEDIATE_BYTES // (2 * rows.shape[0]))


def _vectors_at_once(outer: Outer) -> int:
    """Return the number of vectors k for which sums of b, [n k g o t], fit into an intermediate."""
    return max(1, INTERMEDIATE_BYTES // (outer.b[:, 0].numel() * outer.b.element_size()))


def rows_of(outer: Outer) -> Float[Tensor, "n g t p"]:
    """Return a, with the ones written out where it is given by their places."""
    if outer.a.is_floating_point():
        return outer.a
    numbers = torch.arange(sum(outer.widths), device=outer.a.device)
    return (outer.a[..., None] == numbers).to(outer.b.dtype)
