r"""Inner products of columns that are sums of outer products, in the cheapest order.

Columns Σ_t b_t ⊗ a_t of a weight, for groups g side by side, have the inner products

    Σ_g Σ_tt' (a_gt · a'_gt') (b_gt · b'_gt'),

which can be had from the columns themselves, or by contracting positions first, without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from opt_einsum import contract_path
from torch import Tensor

from ddnewton.trees import chunks

EQUATION = "ngtp,nmgot,NgTp,NMgoT->nmNM"

BYTES = 2**25
"""How large an intermediate may be: a few of them at once stay in a processor's cache."""

COLUMNS, POSITIONS = ((0, 1), (0, 1), (0, 1)), ((0, 2), (1, 2), (0, 1))
"""Two orders: each a with its b; and a with a', then b', then b."""

STRIPS, LONG = 4, 1024
"""Into how many strips of rows a symmetric product is cut, to leave out what lies below, and from
which length of the rows on that pays."""

ABREAST = 8
"""Of how many samples at a time a is multiplied with a', at best: few columns are slow ones."""

IRREGULAR = 1.6
"""How much longer a flop takes in many small products than in one large one."""


class Outer(NamedTuple):
    """Columns of some samples as outer products.

    Integers [n 1 t] in place of ``a`` are the positions of ones in rows of zeros; −1 is no one.
    """

    a: Num[Tensor, "n g t ..."]
    b: Float[Tensor, "n m g o t"]
    widths: tuple[int, ...]  # of the pieces, a weight and its bias, that make up axis p


Factor: TypeAlias = Tensor | Outer
"""Columns of some samples along some parameters: as they are [n·m, d], or as outer products."""


def inner(left: Factor, right: Factor) -> Float[Tensor, "nm nm2"]:
    """Return all inner products of two sets of columns, in float64; half the work for one set."""
    if not (isinstance(left, Outer) and isinstance(right, Outer)):
        return _of_rows(formed(left), formed(right))
    if _alone(left) and _alone(right):
        return _one_position(left, right)
    if _columns_pay(left, right):
        return _from_columns(left, right)
    return _positions_first(left, right)


def combined(factor: Factor, weights: Float[Tensor, "k n m"]) -> list[Float[Tensor, "k _"]]:
    """Return weighted sums of columns in float64, in pieces."""
    if isinstance(factor, Outer):
        few = max(1, BYTES // (factor.b[:, 0].numel() * factor.b.element_size()))
        if len(weights) <= few:
            return _combined_outer(factor, weights)
        sums = [_combined_outer(factor, some) for some in weights.split(few)]
        return [torch.cat(pieces) for pieces in zip(*sums, strict=True)]
    w = weights.flatten(1)
    return [w @ part.double() for part in factor.split(_width(factor), 1)]


def pieces(factor: Factor, which: Sequence[bool]) -> Factor | None:
    """Return the columns along some of the pieces that a factor is made of, None for no piece."""
    if all(which):
        return factor
    if not (isinstance(factor, Outer) and any(which)):
        return None
    widths = tuple(width for width, wanted in zip(factor.widths, which, strict=True) if wanted)
    parts = zip(factor.a.split(factor.widths, -1), which, strict=True)
    return Outer(torch.cat([part for part, wanted in parts if wanted], -1), factor.b, widths)


def formed(factor: Factor) -> Float[Tensor, "nm _"]:
    """Return the columns themselves."""
    if not isinstance(factor, Outer):
        return factor
    whole = torch.einsum("nmgot,ngtp->nmgop", factor.b, _rows(factor))
    return torch.cat([part.flatten(2).flatten(0, 1) for part in whole.split(factor.widths, -1)], 1)


def in_order(
    entries: Float[Tensor, "*rows _"], order: Int[Tensor, " d"] | None
) -> Float[Tensor, "*rows d"]:
    """Return the parameters, each by its number among the entries; the one past the last is 0."""
    return entries if order is None else F.pad(entries, (0, 1))[..., order]


def flops(outer: Outer) -> float:
    """Return how many operations the inner products of columns with each other take."""
    if _alone(outer):
        count = outer.b.shape[0] * outer.b.shape[1]
        return float(count**2 * outer.b.shape[3])
    return min(_flops(outer, outer, order) for order in (COLUMNS, POSITIONS))


def _columns_pay(left: Outer, right: Outer) -> bool:
    """Return whether forming the columns is cheaper than contracting positions first."""
    if torch.compiler.is_compiling():  # opt_einsum cannot be compiled
        return True
    return _flops(left, right, COLUMNS) <= IRREGULAR * _flops(left, right, POSITIONS)


def _alone(outer: Outer) -> bool:
    """Return whether there is but one position."""
    _, _, g, _, t = outer.b.shape
    return g == t == 1 and outer.a.is_floating_point()


def _flops(left: Outer, right: Outer, order: Sequence[tuple[int, int]]) -> float:
    """Return the cost of an order of contraction, half of which symmetry saves."""
    p = sum(left.widths)
    shapes = [shape for x in (left, right) for shape in ((*x.a.shape[:3], p), tuple(x.b.shape))]
    _, path = contract_path(EQUATION, *shapes, shapes=True, optimize=list(order))
    return float(path.opt_cost) / (2 if left is right else 1)


def _one_position(left: Outer, right: Outer) -> Float[Tensor, "nm nm2"]:
    """Return (a · a') (b · b'), all of one position."""
    m, m2 = left.b.shape[1], right.b.shape[1]
    a = left.a[:, 0, 0] @ right.a[:, 0, 0].T
    b = left.b.flatten(0, 1).flatten(1)
    products = product(b, b if left is right else right.b.flatten(0, 1).flatten(1))
    products = completed(products, left is right and b.shape[1] >= LONG)
    whole: Tensor = products.unflatten(1, (-1, m2)).unflatten(0, (-1, m)) * a[:, None, :, None]
    return whole.flatten(0, 1).flatten(1).double()


def _from_columns(left: Outer, right: Outer) -> Float[Tensor, "nm nm2"]:
    """Form the columns, some outputs at a time, and multiply them."""
    n, m, g, o, _ = left.b.shape
    total: Tensor | float = 0.0
    size = max(1, BYTES // (n * m * sum(left.widths) * left.b.element_size()))
    for group in range(g):
        for start in range(0, o, size):
            some = slice(start, start + size)
            mine = _some(left, group, some)
            theirs = mine if left is right else _some(right, group, some)
            total = total + product(mine, theirs).double()
    return completed(torch.as_tensor(total), left is right)


def _some(outer: Outer, group: int, outputs: slice) -> Float[Tensor, "nm op"]:
    b = outer.b[:, :, group, outputs]
    return (b.flatten(1, 2) @ _rows(outer)[:, group]).reshape(b.shape[0] * b.shape[1], -1)


def _positions_first(left: Outer, right: Outer) -> Float[Tensor, "nm nm2"]:
    """Contract a with a', then with b', then with b, for one sample of the left at a time."""
    n, _, g, o, t = left.b.shape
    m = right.b.shape[1]
    each = t * left.b.element_size()
    size = max(1, BYTES // (4 * m * o * each))
    abreast = max(1, min(ABREAST, BYTES // (each * right.b.shape[0] * right.b.shape[4])))
    total: Tensor | float = 0.0
    for group in range(g):
        mine = left.b[:, :, group].flatten(2)  # [n m ot]
        theirs = right.b[:, :, group].flatten(1, 2)  # [n mo t]
        rows = []
        for few in chunks(n, abreast):
            first = few.start if left is right else 0
            overlaps = _overlaps(left, right, group, few, slice(first, None))
            for sample, overlap in zip(range(few.start, few.stop), overlaps, strict=True):
                parts = [
                    mine[sample] @ (b @ a).unflatten(1, (m, o)).flatten(0, 1).flatten(1).T
                    for b, a in zip(theirs[first:].split(size), overlap.split(size), strict=True)
                ]
                rows.append(F.pad(torch.cat(parts, 1), (first * m, 0)))
        total = total + torch.cat(rows).double()
    return completed(torch.as_tensor(total), left is right)


def _overlaps(
    left: Outer, right: Outer, group: int, mine: slice, theirs: slice
) -> Float[Tensor, "n n2 t2 t"]:
    """Return a' · a for some samples on either side."""
    a, others = left.a[mine, group], right.a[theirs, group]
    if a.is_floating_point():
        products = others.flatten(0, 1) @ a.flatten(0, 1).T
        each: Tensor = products.unflatten(1, a.shape[:2]).unflatten(0, others.shape[:2])
        return each.movedim(2, 0)
    same = (others[None, :, :, None] == a[:, None, None, :]) & (a >= 0)[:, None, None, :]
    return same.to(left.b.dtype)


def product(left: Float[Tensor, "i d"], right: Float[Tensor, "j d"]) -> Float[Tensor, "i j"]:
    """Return left rightᵀ; of one tensor with itself perhaps the upper triangle: see `completed`."""
    count, length = left.shape
    if left is not right or length < LONG or count < LONG // 8:
        return left @ right.T
    starts = range(0, count, -(-count // STRIPS))
    ends = [*starts[1:], count]
    strips = [
        F.pad(left[start:end] @ left[start:].T, (start, 0))
        for start, end in zip(starts, ends, strict=True)
    ]
    return torch.cat(strips)


def completed(products: Float[Tensor, "i j"], symmetric: bool) -> Float[Tensor, "i j"]:
    """Return all products, given the upper triangle of those that are symmetric."""
    return products.triu() + products.triu(1).T if symmetric else products


def _combined_outer(outer: Outer, weights: Float[Tensor, "k n m"]) -> list[Float[Tensor, "k _"]]:
    k, shape = weights.shape[0], outer.b.shape[2:]
    g, o, _ = shape
    b = (weights.to(outer.b.dtype).transpose(0, 1) @ outer.b.flatten(2)).unflatten(2, shape)
    if _alone(outer):
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


def _of_rows(left: Float[Tensor, "nm d"], right: Float[Tensor, "nm2 d"]) -> Float[Tensor, "nm nm2"]:
    """Return the inner products of columns as they are, a few parameters at a time."""
    total: Tensor | float = 0.0
    width = min(_width(left), _width(right))
    for a, b in zip(left.split(width, 1), right.split(width, 1), strict=True):
        wide = a.double()
        total = total + product(wide, wide if left is right else b.double())
    return completed(torch.as_tensor(total), left is right)


def _width(rows: Tensor) -> int:
    return max(1, BYTES // (2 * rows.shape[0]))


def _rows(outer: Outer) -> Float[Tensor, "n g t p"]:
    """Return a as numbers."""
    if outer.a.is_floating_point():
        return outer.a
    numbers = torch.arange(sum(outer.widths), device=outer.a.device)
    return (outer.a[..., None] == numbers).to(outer.b.dtype)
