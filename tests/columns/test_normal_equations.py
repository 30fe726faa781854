"""G and g in one pass over the columns, against the dense ones."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ddnewton.columns.factors import Factor, Jacobian, Outer, dense_columns, written_out
from ddnewton.columns.gram import matmat, rmatmat
from ddnewton.columns.normal_equations import normal_equations
from ddnewton.columns.tiles import products
from tests.columns.test_contraction import SHAPES, Shape, outer_products
from tests.models import normal
from tests.reference import error

FITTING = {name: shape for name, shape in SHAPES.items() if not shape.lookup} | {
    "lookups": SHAPES["lookups"],
    "as long as wide": Shape(6, 1, 1, 3, 1, (3, 1)),
}


def jacobian_of(factors: Sequence[Factor], n: int, m: int, at_once: int, unused: int) -> Jacobian:
    """A Jacobian whose pieces are leaves in another order, after a leaf that no factor has."""
    sizes, pieces = [], []
    for factor in factors:
        whole = [factor.shape[1]] if isinstance(factor, Tensor) else None
        g, o = (1, 1) if whole else factor.b.shape[2:4]
        widths = whole or [g * o * width for width in factor.widths]
        pieces.append([(len(sizes) + i, width) for i, width in enumerate(widths)])
        sizes += widths
    # Leaf k of the factors is leaf count − k of the parameters, and leaf 0 is unused.
    count = len(sizes)
    pieces = [[(count - leaf, size) for leaf, size in of_factor] for of_factor in pieces]
    starts = torch.tensor([0, *sizes]).cumsum(0)
    entries = [torch.arange(starts[k], starts[k + 1]) for k in reversed(range(count))]
    order = torch.cat([torch.full((unused,), int(starts[-1])), *entries])

    def visit(chunk: slice) -> list[Factor]:
        return [
            factor._replace(a=factor.a[chunk], b=factor.b[chunk])
            if isinstance(factor, Outer)
            else factor[chunk.start * m : chunk.stop * m]
            for factor in factors
        ]

    chunks = [slice(i, min(i + at_once, n)) for i in range(0, n, at_once)]
    sizes = [unused, *reversed(sizes)]
    return Jacobian(visit, chunks, n, m, sizes, pieces, order, torch.device("cpu"), 0.0, 0.0)


def dense(jacobian: Jacobian, factors: Sequence[Factor]) -> Tensor:
    """Its columns, one in every row, over the parameters, counted m·N + n."""
    n, m = jacobian.samples, jacobian.columns
    rows = torch.cat([dense_columns(factor) for factor in factors], 1)
    rows = rows.unflatten(0, (n, m)).transpose(0, 1).flatten(0, 1)
    return torch.cat([rows, rows.new_zeros(len(rows), 1)], 1)[:, jacobian.order]


def near(mine: Tensor, theirs: Tensor) -> bool:
    """Whether all entries agree up to rounding of the largest; where this is zero, exactly."""
    return bool((mine - theirs).abs().amax() <= 1e-14 * theirs.abs().amax())


@pytest.mark.parametrize("at_once", [2, 100])
@pytest.mark.parametrize("name", FITTING)
def test_sums_are_the_dense_ones(name, at_once, monkeypatch):
    monkeypatch.setattr("ddnewton.columns.normal_equations.CACHED_ENTRIES", 2)
    monkeypatch.setattr("ddnewton.columns.normal_equations.ROWS_PER_ENTRY", 0)
    monkeypatch.setattr("ddnewton.columns.normal_equations.LEAST_ROWS", 1)
    shape = FITTING[name]
    n, m = shape.n, shape.m
    factors = [outer_products(shape), normal(n * m, 4).double()]
    jacobian = jacobian_of(factors, n, m, at_once, unused=3)
    weights, z = torch.rand(n * m).double(), normal(n * m).double()
    weights[0] = 0
    every = range(len(jacobian.sizes))
    for block in (every, [0, 1], [1], [0]):
        (sums,) = normal_equations([jacobian], [block], weights, z)
        parts = dense(jacobian, factors).split(list(jacobian.sizes), 1)
        rows = torch.cat([parts[leaf] for leaf in block], 1)
        assert near(sums.matrix, rows.T @ (weights[:, None] * rows))
        assert near(sums.gradient, z @ rows)
    twice = torch.cat([weights, weights]), torch.cat([z, z])
    (doubled,) = normal_equations([jacobian, jacobian], [every], *twice)
    (once,) = normal_equations([jacobian], [every], weights, z)
    assert error(doubled.matrix, 2 * once.matrix) < 1e-14
    assert error(doubled.gradient, 2 * once.gradient) < 1e-14


@pytest.mark.parametrize("name", FITTING)
def test_columns_written_out_are_the_same(name, monkeypatch):
    shape = FITTING[name]
    n, m = shape.n, shape.m
    factors = [outer_products(shape), normal(n * m, 4).double()]
    jacobian = jacobian_of(factors, n, m, n, unused=2)
    whole = written_out(jacobian, factors)
    assert len(whole.visit(slice(0, n))) == 1
    weights = normal(2, n * m).double()
    for block in (range(len(jacobian.sizes)), [0, 1], [1], [0]):
        (mine,), (theirs,) = (products(x, x, [block]) for x in (whole, jacobian))
        assert near(mine, theirs)
        (mine,), (theirs,) = (matmat([x], [block], [weights]) for x in (whole, jacobian))
        assert near(mine, theirs)
        vectors = mine.T.contiguous()
        mine, theirs = (rmatmat([x], block, vectors) for x in (whole, jacobian))
        assert near(mine, theirs)
    monkeypatch.setattr("ddnewton.columns.factors.WRITTEN_ENTRIES", 0)
    assert written_out(jacobian, factors) is jacobian
