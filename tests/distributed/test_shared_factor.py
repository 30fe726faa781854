"""A matrix that all ranks factorize has the factor that one process finds, and stays as it was."""

import pytest
import torch
from torch import distributed, nn
from torch.nn.functional import mse_loss

from ddnewton import directional_newton, levenberg_marquardt, newton_step
from ddnewton.distributed.shared_factor import PANEL, factorized_together, panel_starts
from ddnewton.distributed.wire import wire_of
from ddnewton.quadratic import cholesky
from tests.distributed.split_problems import assert_close, assert_same_bits, group_of, normal, own

SIDES = (1, PANEL - 1, PANEL, PANEL + 1, 5 * PANEL + 7)


def positive(side):
    A = normal(side, side, side)
    return A @ A.mT / side + 0.1 * torch.eye(side, dtype=torch.float64)


def factor(rank, matrix):
    """The factor of a matrix, whose panels every rank takes by itself."""
    size, side = distributed.get_world_size(), len(matrix)
    own_panels = {
        number: matrix[start:, start : start + PANEL].clone()
        for number, start in enumerate(panel_starts(side))
        if number % size == rank
    }
    whole = torch.zeros_like(matrix)

    def write(number, panel):
        start = PANEL * number
        whole[start:, start : start + PANEL] = panel

    wire = wire_of(distributed.group.WORLD, torch.device("cpu"))
    factorized_together(wire, side, own_panels, write)
    return whole.tril(), dict(wire.traffic)


@pytest.mark.parametrize("pool", ["one", "two", "four"])
@pytest.mark.parametrize("side", SIDES)
def test_the_factor_is_that_of_one_process(pool, side, request):
    matrix = positive(side)
    results = request.getfixturevalue(pool).results(factor, matrix)
    expected = torch.linalg.cholesky(matrix)
    for found, _ in results:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert_same_bits([found for found, _ in results])
    # Every panel of the factor is told once, by the rank that has it.
    sent = sum(traffic.get("panels", 0) for _, traffic in results)
    assert sent == 8 * sum((side - s) * min(PANEL, side - s) for s in panel_starts(side))


def test_without_a_factor_it_is_nan(two):
    matrix = positive(2 * PANEL + 5)
    matrix[PANEL + 3, PANEL + 3] = -1.0
    for found, _ in two.results(factor, matrix):
        assert found.diagonal().isnan().any()


def wide(p, x):
    return torch.tanh(x @ p["W"] + p["b"])


def problem(rank, size):
    """A problem of 48 columns along more parameters."""
    params = {"W": 0.3 * normal(1, 40, 2), "b": normal(2, 2)}
    X, y = normal(3, 24, 40), normal(4, 24, 2)
    return wide, params, own(X, rank, size), own(y, rank, size)


def step(rank, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cholesky, "SHARED_SIDE", 8)
        return newton_step(*problem(rank, size), mse_loss, 1e-3, process_group=group_of(size))


def updates(rank, size):
    """Updates that try several dampings of one matrix, which has to stay what it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cholesky, "SHARED_SIDE", 8)
        model_fn, params, X, y = problem(rank, size)
        options = {"damping": levenberg_marquardt(1e-8), "process_group": group_of(size)}
        optimizer = directional_newton(model_fn, nn.MSELoss(), **options)
        state, attempts = optimizer.init(params), []
        for _ in range(4):
            params, state, info = optimizer.update(params, state, X, y)
            attempts.append(int(info.attempts))
        return params, attempts


def test_steps_are_those_of_one_process(two, four):
    expected = step(0, 1)
    for pool, size in ((two, 2), (four, 4)):
        found = pool.results(step, size)
        assert_same_bits(found)
        assert_close(found[0], expected, 1e-12)


def test_a_matrix_that_is_factorized_again_is_what_it_was(two):
    expected, expected_attempts = updates(0, 1)
    found = two.results(updates, 2)
    assert found[0][1] == expected_attempts
    assert max(expected_attempts) > 1
    assert_same_bits([params for params, _ in found])
    assert_close(found[0][0], expected, 1e-10)
