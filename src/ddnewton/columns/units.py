"""Columns along parameters in other units: S A, with a positive number for every parameter.

An outer product b ⊗ a stays one where the numbers along its entries are a product u ⊗ v themselves:
(b ∘ u) ⊗ (a ∘ v). That is so for one number a leaf, or one for every row or column of a weight.
Where they are not, all columns are dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ddnewton.columns.factors import (
    Factor,
    Jacobian,
    Outer,
    Stack,
    dense_pieces,
    from_order,
    in_order,
)
from ddnewton.transforms import any_possible

PRODUCT_ROUNDINGS = 8
"""By how many roundings numbers may differ from a product and count as one."""


class OuterUnits(NamedTuple):
    """The numbers along the entries of an outer product, u ⊗ v."""

    u: Float[Tensor, "g o 1"]
    v: Float[Tensor, "g 1 p"]


def in_units(jacobian: Jacobian) -> Jacobian:
    """Return the same columns, with the scale of their parameters taken into the factors."""
    if jacobian.scale is None or len(jacobian.chunks) == 0:
        return jacobian
    # The numbers along the entries of every factor, as they lie there.
    counts = [sum(size for _, size in pieces) for pieces in jacobian.pieces]
    entries = from_order(jacobian.scale[None], jacobian.order, sum(counts))[0].split(counts)
    # The shapes of the factors are those of the first chunk, which is then not visited again.
    chunk = jacobian.chunks[0]
    start, stop, factors = chunk.start, chunk.stop, jacobian.visit(chunk)
    units = list(map(_units, factors, entries))
    scale = jacobian.scale

    def visit(chunk: slice) -> Sequence[Factor]:
        is_first = chunk.start == start and chunk.stop == stop
        return factors if is_first else jacobian.visit(chunk)

    if all(numbers is not None for numbers in units):
        return jacobian._replace(
            visit=lambda chunk: [
                _scaled(factor, numbers)
                for factor, numbers in zip(visit(chunk), units, strict=True)
                if numbers is not None
            ],
            scale=None,
        )

    by_leaf = densely(jacobian._replace(visit=visit))
    scales = scale.split(list(jacobian.sizes))
    return by_leaf._replace(
        visit=lambda chunk: [
            factor * numbers for factor, numbers in zip(by_leaf.visit(chunk), scales, strict=True)
        ],
        scale=None,
    )


def densely(jacobian: Jacobian) -> Jacobian:
    """Return the same columns, dense in float64, with a factor for every leaf in its order."""

    def dense(chunk: slice) -> Sequence[Factor]:
        factors = jacobian.visit(chunk)
        parts = [piece.double() for factor in factors for piece in dense_pieces(factor)]
        columns = in_order(torch.cat(parts, 1), jacobian.order)
        return list(columns.split(list(jacobian.sizes), 1))

    pieces = [[(leaf, size)] for leaf, size in enumerate(jacobian.sizes)]
    return jacobian._replace(visit=dense, pieces=pieces, order=None)


def _units(factor: Factor, entries: Float[Tensor, " _"]) -> Tensor | OuterUnits | None:
    """Return the numbers along a factor's entries; None where they are no product of two."""
    if isinstance(factor, Stack):
        return _units(factor.parts[0], entries)
    if not isinstance(factor, Outer):
        return entries
    g, o = factor.b.shape[2:4]
    parts = entries.split([g * o * width for width in factor.widths])
    numbers = torch.cat([part.reshape(g, o, -1) for part in parts], -1)
    if 0 in numbers.shape:
        return OuterUnits(numbers.new_ones(g, o, 1), numbers.new_ones(g, 1, numbers.shape[2]))
    # The first column and row of the numbers make all of them, if u and v do.
    u, v = numbers[:, :, :1], numbers[:, :1] / numbers[:, :1, :1]
    tolerance = PRODUCT_ROUNDINGS * torch.finfo(numbers.dtype).eps * numbers
    return None if any_possible(~((u * v - numbers).abs() <= tolerance)) else OuterUnits(u, v)


def _scaled(factor: Factor, units: Tensor | OuterUnits) -> Factor:
    """Return a factor with its entries times their numbers."""
    if isinstance(factor, Tensor):
        assert isinstance(units, Tensor)
        return factor * units.to(factor.dtype)
    assert isinstance(units, OuterUnits)
    if isinstance(factor, Stack):
        return Stack(tuple(_scaled_outer(part, units) for part in factor.parts))
    return _scaled_outer(factor, units)


def _scaled_outer(factor: Outer, units: OuterUnits) -> Outer:
    """Return outer products with the numbers taken into a and b."""
    u, v = (numbers.to(factor.b.dtype) for numbers in units)
    b = factor.b * u
    if factor.a.is_floating_point():
        return factor._replace(a=factor.a * v, b=b)
    # Rows of a with a single one stay what they are: b takes the number at its place.
    at = F.pad(v[0, 0], (0, 1))[factor.a]  # [n 1 t], 0 for a row without a one
    return factor._replace(b=b * at[:, None, :, None])
