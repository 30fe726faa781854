"""Inner products of outer products, whatever the order of contraction."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ddnewton.columns.column_sums import inner_products, weighted_sums
from ddnewton.columns.contraction import inner
from ddnewton.columns.factors import Outer, dense_columns
from tests.methods import DTYPES, FLOAT32, FLOAT64
from tests.models import normal
from tests.reference import error


class Shape(NamedTuple):
    n: int
    m: int
    g: int
    o: int
    t: int
    widths: tuple[int, ...]
    lookup: bool = False


def outer_products(shape: Shape, dtype=FLOAT64) -> Outer:
    n, m, g, o, t, widths, lookup = shape
    a = torch.randint(-1, sum(widths), (n, g, t)) if lookup else normal(n, g, t, sum(widths))
    return Outer(a if lookup else a.to(dtype), normal(n, m, g, o, t).to(dtype), widths)


def columns(outer: Outer):
    """Every column by itself: the weight's entries group by group, then the bias's."""
    a = outer.a
    if not a.is_floating_point():
        a = F.one_hot(a + 1, sum(outer.widths) + 1)[..., 1:]
    a, b = a.double(), outer.b.double()
    n, m, g = b.shape[:3]
    products = torch.stack(
        [b[i, j, k] @ a[i, k] for i in range(n) for j in range(m) for k in range(g)]
    ).unflatten(0, (n * m, g))
    return torch.cat([part.flatten(1) for part in products.split(outer.widths, -1)], 1)


SHAPES = {
    "one position": Shape(5, 2, 1, 4, 1, (3, 1)),
    "one column of many outputs": Shape(5, 1, 1, 6, 1, (2, 1)),
    "one column of many inputs": Shape(5, 1, 1, 2, 1, (6, 1)),
    "groups at one position": Shape(5, 2, 3, 4, 1, (3,)),
    "many groups at one position": Shape(5, 4, 40, 1, 1, (6,)),
    "many groups of columns first": Shape(4, 1, 300, 1, 3, (5,)),
    "scales": Shape(4, 2, 30, 1, 5, (1,)),
    "columns first": Shape(4, 2, 1, 2, 50, (2, 1)),
    "columns of groups first": Shape(4, 2, 3, 2, 30, (2,)),
    "positions first": Shape(4, 2, 1, 24, 2, (25,)),
    "positions of groups first": Shape(4, 3, 2, 20, 3, (20, 1)),
    "lookups": Shape(3, 2, 1, 2, 4, (7,), lookup=True),
    "lookups in a large table": Shape(4, 2, 1, 6, 3, (400,), lookup=True),
    "lookups of two kinds": Shape(3, 2, 1, 2, 3, (4, 1), lookup=True),
    "one lookup": Shape(4, 2, 1, 3, 1, (5,), lookup=True),
    "many columns at one position": Shape(37, 3, 1, 4, 1, (3,)),
    "many columns first": Shape(37, 3, 1, 2, 6, (2,)),
    "many positions first": Shape(30, 3, 1, 20, 2, (20,)),
}


def check_contraction(shape: Shape, others: int, dtype=FLOAT64) -> None:
    left = outer_products(shape, dtype)
    right = outer_products(shape._replace(n=others, m=shape.m + 1), dtype)
    mine, theirs = columns(left), columns(right)
    tolerance = {FLOAT32: 1e-6, FLOAT64: 1e-14}[dtype]
    assert error(dense_columns(left), mine) < tolerance
    m, m2 = shape.m, shape.m + 1
    pairs = {
        "one set": (left, left, (m, m), mine @ mine.T),
        "two sets": (left, right, (m, m2), mine @ theirs.T),
        "two sets, swapped": (right, left, (m2, m), theirs @ mine.T),
        "two kinds": (left, theirs.to(dtype), (m, m2), mine @ theirs.T),
        "as they are": (mine.to(dtype), mine.to(dtype), (m, m), mine @ mine.T),
    }
    for one, other, counts, expected in pairs.values():
        products = inner(one, other, counts).flatten(0, 1).flatten(1)
        assert error(products, expected) < tolerance
    weights = normal(3, shape.n, shape.m).double()
    for factor in (left, dense_columns(left)):
        sums = torch.cat(weighted_sums(factor, weights), 1)
        assert error(sums, weights.flatten(1) @ mine) < tolerance
        vectors = normal(3, mine.shape[1]).double()
        assert error(inner_products(factor, vectors), mine @ vectors.T) < tolerance


@DTYPES
@pytest.mark.parametrize("name", SHAPES)
def test_inner_products_in_every_order(name, dtype):
    check_contraction(SHAPES[name], 3, dtype)


@pytest.mark.parametrize("name", SHAPES)
def test_inner_products_in_small_blocks(name, monkeypatch):
    monkeypatch.setattr("ddnewton.columns.factors.INTERMEDIATE_BYTES", 2**9)
    check_contraction(SHAPES[name], 5)


COUNT = st.integers(1, 6)
WIDTHS = st.lists(COUNT, min_size=1, max_size=2).map(tuple)


@settings(max_examples=50)
@given(st.builds(Shape, COUNT, COUNT, COUNT, COUNT, COUNT, WIDTHS, st.booleans()), COUNT)
def test_inner_products_of_any_shape(shape, others):
    torch.manual_seed(0)
    shape = shape._replace(g=1) if shape.lookup else shape
    check_contraction(shape, others)
