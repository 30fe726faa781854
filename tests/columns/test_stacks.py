"""Columns in parts with positions of their own are the same columns with zeros elsewhere."""

import pytest
import torch

from ddnewton.columns.column_sums import inner_products, weighted_sums
from ddnewton.columns.factors import (
    Outer,
    Stack,
    dense_columns,
    device_of,
    entry_count,
    of_columns,
    of_samples,
    pieces,
    without_zeros,
)
from tests.columns.test_contraction import Shape, outer_products
from tests.methods import FLOAT64
from tests.models import normal
from tests.reference import error

SHAPES = {
    "positions": Shape(3, 6, 1, 4, 5, (3, 1)),
    "groups": Shape(2, 6, 3, 2, 5, (2, 2)),
    "lookups": Shape(3, 6, 1, 2, 5, (7,), lookup=True),
}
REACHED = {
    "those before": [[0], [0, 1, 2], [0, 1, 2, 3, 4]],
    "single ones": [[0], [2], [4]],
    "apart": [[0, 3], [1, 4], [0, 2, 4]],
    "none": [[], [1], []],
}


def stacked(shape, reached):
    """Columns with zeros, and a stack of three parts without them."""
    outer = outer_products(shape)
    keep = torch.zeros(3, shape.t)
    for part, positions in enumerate(reached):
        keep[part, positions] = 1
    b = outer.b * keep.repeat_interleave(2, 0)[None, :, None, None]
    outer = outer._replace(b=b.to(FLOAT64))
    parts = (outer._replace(b=outer.b[:, 2 * i : 2 * i + 2]) for i in range(3))
    return outer, Stack(tuple(map(without_zeros, parts)))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("reached", REACHED)
def test_a_stack_is_its_columns_with_zeros(name, reached):
    shape = SHAPES[name]
    outer, stack = stacked(shape, REACHED[reached])
    assert [part.b.shape[4] for part in stack.parts] == [max(1, len(r)) for r in REACHED[reached]]
    assert entry_count(stack) == entry_count(outer)
    assert device_of(stack) == device_of(outer)
    whole = dense_columns(outer)
    assert error(dense_columns(stack), whole) < 1e-14
    # Sums and inner products.
    weights, vectors = normal(2, shape.n, shape.m).double(), normal(3, whole.shape[1]).double()
    sums = torch.cat(weighted_sums(stack, weights), 1)
    assert error(sums, weights.flatten(1) @ whole) < 1e-13
    assert error(inner_products(stack, vectors), whole @ vectors.T) < 1e-13
    # Some of its samples, its columns, or its pieces.
    part, expected = (of_samples(x, slice(1, 2), shape.m) for x in (stack, outer))
    assert error(dense_columns(part), dense_columns(expected)) < 1e-14
    for factor in (stack, outer, whole):
        columns = dense_columns(of_columns(factor, slice(2, 4), shape.m))
        assert error(columns, whole.unflatten(0, (-1, 6))[:, 2:4].flatten(0, 1)) < 1e-14
    wanted, sizes = [True, *(False for _ in shape.widths[1:])], [0 for _ in shape.widths]
    part, expected = (pieces(x, wanted, sizes) for x in (stack, outer))
    assert error(dense_columns(part), dense_columns(expected)) < 1e-14


def test_what_has_no_zeros_is_kept_as_it_is():
    outer = outer_products(SHAPES["positions"])
    assert without_zeros(outer) is outer
    first = without_zeros(Outer(outer.a, outer.b * torch.tensor([1.0, 1, 0, 0, 0]), outer.widths))
    assert first.a.data_ptr() == outer.a.data_ptr()  # a view
    assert first.b.is_contiguous()
