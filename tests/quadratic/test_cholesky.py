"""Cholesky's factorization, some columns at a time, and the steps that come of it."""

import pytest
import torch
from torch import nn

from ddnewton import newton_step
from ddnewton.quadratic.cholesky import CHOLESKY_BLOCK, _factorized, _put_back
from tests.models import normal, of_module
from tests.reference import dense, error, flat, solve

FLOAT64 = torch.float64
SIDES = (
    1,
    2,
    CHOLESKY_BLOCK - 1,
    CHOLESKY_BLOCK,
    CHOLESKY_BLOCK + 1,
    2 * CHOLESKY_BLOCK,
    2 * CHOLESKY_BLOCK + 53,
)


WIDTHS = {"columns": 40, "parameters": 8}
"""Of the hidden layer: which side is smaller, and longer than two blocks."""


def positive(side: int) -> torch.Tensor:
    root = torch.randn(side, side + 3, dtype=FLOAT64)
    products = root @ root.T / side
    return (products + products.T) / 2 + 0.01 * torch.eye(side, dtype=FLOAT64)


def factorized(matrix: torch.Tensor, shifts: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """A factor, of a matrix that is put back afterwards."""
    corners: list[torch.Tensor] = []
    failed = _factorized(matrix, shifts, corners)
    factor = matrix.tril()
    _put_back(matrix, corners)
    return factor, bool(failed)


@pytest.mark.parametrize("side", SIDES)
def test_one_matrix_has_the_factors_of_several_dampings(side):
    matrix = positive(side)
    before = matrix.clone()
    for delta in (0.1, 1e-3, 10.0):
        shifts = delta * torch.rand(side, dtype=FLOAT64)
        factor, failed = factorized(matrix, shifts)
        assert not failed
        assert error(factor, torch.linalg.cholesky(before + shifts.diag())) < 1e-12
        assert torch.equal(matrix, before)


@pytest.mark.parametrize("value", [-1.0, float("nan")])
@pytest.mark.parametrize("place", [0, CHOLESKY_BLOCK - 1, CHOLESKY_BLOCK, 2 * CHOLESKY_BLOCK + 52])
def test_a_matrix_without_a_factor_is_told_of_and_put_back(place, value):
    matrix = positive(2 * CHOLESKY_BLOCK + 53)
    matrix[place, place] = value
    before = matrix.clone()
    _, failed = factorized(matrix, torch.zeros(len(matrix), dtype=FLOAT64))
    assert failed
    assert torch.equal(matrix.triu().nan_to_num(7.0), before.triu().nan_to_num(7.0))


@pytest.mark.parametrize("delta", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("criterion", [nn.MSELoss(), nn.CrossEntropyLoss()])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_steps_of_many_columns(width, criterion, delta):
    net = nn.Sequential(nn.Linear(20, width), nn.Tanh(), nn.Linear(width, 4))
    y = normal(70, 4)
    y = y if isinstance(criterion, nn.MSELoss) else y.argmax(1)
    given = of_module(net, normal(70, 20), y, criterion, FLOAT64)
    step = newton_step(*given, delta)
    assert error(flat(step), solve(dense(*given), delta)) < 1e-10
