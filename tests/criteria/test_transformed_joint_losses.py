"""Transformers of criteria whose samples have no losses of their own: a mean over what is valid."""

import pytest
import torch
import torch.nn.functional as F

from ddnewton import clipped, directional_newton, majorized, newton_step_and_info, weighted
from ddnewton import with_curvature as combined
from tests.models import problem
from tests.reference import error

FLOAT64 = torch.float64


def valid_mean(term):
    """The mean of a term over the targets that are there."""

    def criterion(outputs, y):
        return (y["mask"] * term(outputs - y["value"])).sum() / y["mask"].sum()

    return criterion


def squared(outputs, y):
    return (outputs - y["value"]).square().mean()


def huber(r):
    return F.huber_loss(r, torch.zeros_like(r), reduction="none", delta=0.1)


SQUARES = valid_mean(torch.square)
CASES = {
    "weighted": (weighted(SQUARES, 3.0), lambda f, y: 3 * SQUARES(f, y)),
    "clipped": (clipped(SQUARES), SQUARES),
    "majorized": (majorized(valid_mean(huber)), valid_mean(huber)),
    "with_curvature": (combined(SQUARES, squared), SQUARES),
}


def given_with(criterion):
    given = problem("tanh_mlp")
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], dtype=FLOAT64)
    return given._replace(y={"value": given.y, "mask": mask}, criterion=criterion)


@pytest.mark.parametrize("name", CASES)
def test_losses_are_the_criterion_itself(name):
    transformed, plain = CASES[name]
    given = given_with(transformed)

    def loss(params):
        return plain(given.model_fn(params, given.X), given.y)

    options = {"complement": 0.1} if name == "with_curvature" else {}
    optimizer = directional_newton(given.model_fn, transformed, **options)
    params, state = given.params, optimizer.init(given.params)
    for _ in range(3):
        before = loss(params)
        params, state, info = optimizer.update(params, state, given.X, given.y)
        assert error(info.loss, before) < 1e-12
        assert error(info.loss_after, loss(params)) < 1e-12
        assert info.accepted
        assert loss(params) < before


def test_a_weight_is_a_factor_of_gradient_and_curvature():
    _, plain = newton_step_and_info(*given_with(SQUARES), 0.1)
    _, info = newton_step_and_info(*given_with(weighted(SQUARES, 3.0)), 0.1)
    assert error(info.loss, 3 * plain.loss) < 1e-12
    assert error(info.evals, 3 * plain.evals) < 1e-10
    assert error(info.gradient_norm, 3 * plain.gradient_norm) < 1e-12


def test_the_curvature_of_another_is_divided_as_that_is():
    """Gradient of the mean over valid ones, curvature of the mean over all."""
    _, mean = newton_step_and_info(*given_with(squared), 0.1)
    _, valid = newton_step_and_info(*given_with(SQUARES), 0.1)
    _, info = newton_step_and_info(*given_with(combined(SQUARES, squared)), 0.1, complement=0.1)
    assert error(info.evals, mean.evals) < 1e-10
    assert error(info.gradient_norm, valid.gradient_norm) < 1e-12
