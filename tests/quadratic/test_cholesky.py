"""Cholesky's factorization, some columns at a time, and the steps that come of it."""

import pytest
import torch
from torch import nn

from ddnewton import newton_step
from ddnewton.quadratic.cholesky import CHOLESKY_BLOCK, _factorized
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
    return root @ root.T / side + 0.01 * torch.eye(side, dtype=FLOAT64)


@pytest.mark.parametrize("side", SIDES)
def test_the_factor_is_that_of_the_whole(side):
    matrix = positive(side)
    factor, failed = _factorized(matrix.clone())
    assert not failed
    assert error(factor.tril(), torch.linalg.cholesky(matrix)) < 1e-12


@pytest.mark.parametrize("side", SIDES)
def test_what_is_above_the_diagonal_does_not_count(side):
    matrix = positive(side)
    factor, _ = _factorized(matrix.tril() + torch.full_like(matrix, torch.nan).triu(1))
    assert error(factor.tril(), torch.linalg.cholesky(matrix)) < 1e-12


@pytest.mark.parametrize("value", [-1.0, float("nan")])
@pytest.mark.parametrize("place", [0, CHOLESKY_BLOCK - 1, CHOLESKY_BLOCK, 2 * CHOLESKY_BLOCK + 52])
def test_a_matrix_without_a_factor_is_told_of(place, value):
    matrix = positive(2 * CHOLESKY_BLOCK + 53)
    matrix[place, place] = value
    _, failed = _factorized(matrix)
    assert failed


def test_nothing_has_a_factor_of_nothing():
    factor, failed = _factorized(torch.zeros(0, 0, dtype=FLOAT64))
    assert factor.shape == (0, 0)
    assert not failed


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
