"""Factors of two Jacobians side by side, along the same parameters.

The factors of one model line up as they are. Those of two, the terms of a loss, need not: each has
been traced by itself, and one may see a weight and its bias as one layer, or a weight in another
order, that the other does not. They are lined up leaf by leaf: as outer products where both have
the whole leaf in one order, and else as dense columns in the order of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.columns.factors import (
    Factor,
    Jacobian,
    Outer,
    Stack,
    dense_columns,
    in_order,
    pieces,
)

Leaves: TypeAlias = Sequence[int]
"""The numbers of the leaves that make up a block."""

Cut: TypeAlias = Callable[[Sequence[Factor]], list[Factor]]
"""From the factors of all parameters to those along some of them."""


Pairing: TypeAlias = Callable[[Sequence[Factor], Sequence[Factor]], list[tuple[Factor, Factor]]]
"""From the factors of two Jacobians to pairs of them along the same entries."""


class Place(NamedTuple):
    """A piece of a factor: the entries of one leaf in it, from ``start`` on among all entries."""

    factor: int
    piece: int
    start: int
    size: int


def cut_to(jacobian: Jacobian, block: Leaves) -> Cut:
    """Return a function that cuts the factors of all parameters to those of a block."""
    if len(block) == len(jacobian.sizes):
        return list
    wanted = [[leaf in block for leaf, _ in ps] for ps in jacobian.pieces]
    sizes = [[size for _, size in ps] for ps in jacobian.pieces]

    def cut(factors: Sequence[Factor]) -> list[Factor]:
        cut_factors = map(pieces, factors, wanted, sizes)
        return [factor for factor in cut_factors if factor is not None]

    return cut


def paired(left: Jacobian, right: Jacobian, block: Leaves) -> Pairing:
    """Return a function that pairs the factors of two Jacobians along the leaves of a block."""
    same_pieces = list(map(list, left.pieces)) == list(map(list, right.pieces))
    if left.order is not right.order or not same_pieces:
        return _by_leaf(left, right, block)
    cut = cut_to(left, block)

    def one_by_one(x: Sequence[Factor], y: Sequence[Factor]) -> list[tuple[Factor, Factor]]:
        left_factors = cut(x)
        return list(zip(left_factors, left_factors if x is y else cut(y), strict=True))

    return one_by_one


def _by_leaf(left: Jacobian, right: Jacobian, block: Leaves) -> Pairing:
    """Return a function that pairs the factors of two Jacobians leaf by leaf."""
    # The leaves that both have, and those of which both have all entries in one order.
    left_places, right_places = _places(left), _places(right)
    leaves = [leaf for leaf in block if leaf in left_places and leaf in right_places]
    aligned = {
        leaf
        for leaf in leaves
        if _same_entries(left, left_places[leaf], right, right_places[leaf], leaf)
    }

    def leaf_by_leaf(
        left_factors: Sequence[Factor], right_factors: Sequence[Factor]
    ) -> list[tuple[Factor, Factor]]:
        pairs = []
        # As outer products where they fit each other, else as dense columns.
        for leaf in leaves:
            if leaf in aligned:
                x = _piece(left_factors, left, left_places[leaf][0])
                y = _piece(right_factors, right, right_places[leaf][0])
                fit = _fit(x, y)
                pairs.append((x, y) if fit else (dense_columns(x), dense_columns(y)))
            else:
                x = _dense(left_factors, left, left_places[leaf], leaf)
                y = _dense(right_factors, right, right_places[leaf], leaf)
                pairs.append((x, y))
        return pairs

    return leaf_by_leaf


def _places(jacobian: Jacobian) -> dict[int, list[Place]]:
    """Return where every leaf is: the pieces that hold entries of it."""
    places: dict[int, list[Place]] = {}
    start = 0
    for number, factor_pieces in enumerate(jacobian.pieces):
        for piece, (leaf, size) in enumerate(factor_pieces):
            places.setdefault(leaf, []).append(Place(number, piece, start, size))
            start += size
    return places


def _order_of_leaf(jacobian: Jacobian, leaf: int) -> Int[Tensor, " _"] | None:
    """Return the places of a leaf's entries among those of all factors; None: all in order."""
    if jacobian.order is None:
        return None
    start = sum(jacobian.sizes[:leaf])
    return jacobian.order[start : start + jacobian.sizes[leaf]]


def _same_entries(
    left: Jacobian, left_places: list[Place], right: Jacobian, right_places: list[Place], leaf: int
) -> bool:
    """Return whether both have all of a leaf in one piece, in the same order."""
    if len(left_places) != 1 or len(right_places) != 1 or torch.compiler.is_compiling():
        return False
    places, size = [], left.sizes[leaf]
    for jacobian, place in ((left, left_places[0]), (right, right_places[0])):
        if place.size != size:
            return False
        order = _order_of_leaf(jacobian, leaf)
        entries = torch.arange(size, device=jacobian.device)
        places.append(entries if order is None else order - place.start)
    return torch.equal(*places)


def _fit(left: Factor, right: Factor) -> bool:
    """Return whether two factors along the same entries are outer products of the same shapes."""
    left, right = (x.parts[0] if isinstance(x, Stack) else x for x in (left, right))
    if not (isinstance(left, Outer) and isinstance(right, Outer)):
        return not isinstance(left, Outer) and not isinstance(right, Outer)
    same_kind = left.a.is_floating_point() == right.a.is_floating_point()
    return same_kind and left.widths == right.widths and left.b.shape[2:4] == right.b.shape[2:4]


def _piece(factors: Sequence[Factor], jacobian: Jacobian, place: Place) -> Factor:
    """Return one piece of a factor."""
    sizes = [size for _, size in jacobian.pieces[place.factor]]
    wanted = [number == place.piece for number in range(len(sizes))]
    piece = pieces(factors[place.factor], wanted, sizes)
    assert piece is not None
    return piece


def _dense(
    factors: Sequence[Factor], jacobian: Jacobian, places: Sequence[Place], leaf: int
) -> Float[Tensor, "nm _"]:
    """Return the dense columns along a leaf, in the order of its entries."""
    parts = [dense_columns(_piece(factors, jacobian, place)) for place in places]
    order = _order_of_leaf(jacobian, leaf)
    if order is None:
        return torch.cat(parts, 1)
    # From places among all entries to those among the leaf's, one past the last for none.
    size = sum(place.size for place in places)
    local = torch.full_like(order, size)
    starts = accumulate((place.size for place in places), initial=0)
    for place, (start, _) in zip(places, pairwise(starts), strict=True):
        inside = (order >= place.start) & (order < place.start + place.size)
        local = torch.where(inside, order - place.start + start, local)
    return in_order(torch.cat(parts, 1), local)
