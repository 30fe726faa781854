"""When fits end: MINPACK's and SciPy's tests, rounding, and steps that are only damped."""

import math
from itertools import pairwise

import pytest
import torch
from torch.func import jacrev

from ddnewton import fit, levenberg_marquardt, trust_region
from tests.methods import DTYPES, FLOAT32, FLOAT64, seeded

X = torch.linspace(0, 4, 30, dtype=FLOAT64)
Y = 2.5 * torch.exp(-1.3 * X) + 0.5 + 0.05 * torch.randn(30, generator=seeded(), dtype=FLOAT64)
START = torch.tensor([1.0, 0.5, 0.0], dtype=FLOAT64)
NONE = {"ftol": None, "xtol": None, "gtol": None}


def decay(p, x):
    return p[0] * torch.exp(-p[1] * x) + p[2]


def test_ftol_is_that_of_scipy():
    seen = []
    result = fit(decay, START, X, Y, callback=seen.append, **{**NONE, "ftol": 1e-6})
    assert result.reason == "converged: the loss falls by less than ftol = 1e-06 of itself"
    falls = [1 - float(one.info.loss_after / one.info.loss) for one in seen]
    assert falls[-1] < 1e-6 <= min(falls[:-1])
    assert seen[-1].info.ratio > 0.25


def test_xtol_is_that_of_scipy():
    seen = [START]
    result = fit(
        *(decay, START, X, Y), callback=lambda f: seen.append(f.params), **{**NONE, "xtol": 1e-4}
    )
    assert result.reason == "converged: a step is shorter than xtol = 0.0001 of the parameters"
    steps = [
        float((after - before).norm() / (1e-4 + before.norm())) for before, after in pairwise(seen)
    ]
    assert steps[-1] < 1e-4 <= min(steps[:-1])


def test_gtol_is_that_of_minpack():
    seen = [START]
    result = fit(
        *(decay, START, X, Y), callback=lambda f: seen.append(f.params), **{**NONE, "gtol": 1e-5}
    )
    assert result.reason.startswith("converged: the gradient is zero to gtol = 1e-05, ")
    cosines = []
    for params in seen[:-1]:
        J, r = jacrev(decay)(params, X), decay(params, X) - Y
        cosines.append(((J.T @ r).abs() / (J.norm(dim=0) * r.norm())).max())
    torch.testing.assert_close(result.history.cosines, torch.stack(cosines), rtol=1e-6, atol=1e-12)
    assert cosines[-1] <= 1e-5 < min(cosines[:-1])


def test_cosines_have_no_units():
    units = torch.tensor([1e6, 1e-6, 1.0], dtype=FLOAT64)
    first = fit(decay, START, X, Y, max_updates=1)
    scaled = fit(lambda p, x: 1e3 * decay(p * units, x), START / units, X, 1e3 * Y, max_updates=1)
    torch.testing.assert_close(scaled.history.cosines, first.history.cosines)


def test_weight_decay_is_part_of_the_slope():
    # At the minimum of the whole loss, not of the squared errors alone.
    result = fit(decay, START, X, Y, weight_decay=0.05, **{**NONE, "gtol": 1e-7})
    assert result.reason.startswith("converged: the gradient")
    loss = lambda p: (decay(p, X) - Y).square().mean() + 0.025 * p.square().sum()  # noqa: E731
    assert torch.func.grad(loss)(result.params).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["ftol", "xtol", "gtol"])
def test_a_step_that_is_short_for_its_damping_is_no_end(name):
    # Steps of 1e-9 of the parameters, along each of which the loss falls by some 1e-10.
    result = fit(decay, START, X, Y, damping=1e9, max_updates=5, **{**NONE, name: 1e-6})
    assert result.reason == "ended after max_updates = 5"
    assert result.history.losses.diff().max() < 0


@DTYPES
@pytest.mark.parametrize("tolerance", [None, 0.0, 1e-30])
@pytest.mark.parametrize("damping", [levenberg_marquardt, trust_region])
def test_tolerances_below_the_rounding_end_too(dtype, tolerance, damping):
    tolerances = dict.fromkeys(NONE, tolerance)
    start, x, y = (part.to(dtype) for part in (START, X, Y))
    result = fit(decay, start, x, y, damping=damping(), **tolerances)
    assert result.reason.startswith("converged")
    assert result.updates < 30
    expected = fit(decay, START, x.double(), y.double(), ftol=1e-15, xtol=1e-15, gtol=1e-15)
    tolerance = 1e-7 if dtype == FLOAT64 else 1e-5
    torch.testing.assert_close(result.params.double(), expected.params, rtol=tolerance, atol=0.0)


@DTYPES
def test_data_without_noise_are_fitted_to_rounding(dtype):
    start, x = START.to(dtype), X.to(dtype)
    truth = torch.tensor([2.5, 1.25, 0.5], dtype=dtype)
    result = fit(decay, start, x, decay(truth.double(), X))
    assert result.reason.startswith("converged")
    torch.testing.assert_close(result.params, truth, rtol=1e-6, atol=0.0)


def test_a_start_at_the_minimum():
    truth = torch.tensor([2.0, 1.0, 0.5], dtype=FLOAT64)
    result = fit(decay, truth, X, decay(truth, X))
    assert result.updates == 1
    assert result.reason.startswith("converged: the gradient is zero")
    assert float(result.loss) == 0.0
    assert torch.equal(result.params, truth)
    assert float(result.history.cosines) == 0.0


def uphill(p, x):
    """A model whose derivative has the wrong sign."""
    return (2 * p.detach() - p) * x


@pytest.mark.parametrize("damping", [levenberg_marquardt, trust_region])
def test_a_fit_that_cannot_move_says_so(damping):
    start = torch.tensor([1.0], dtype=FLOAT64)
    result = fit(uphill, start, X, 3 * X, damping=damping())
    assert result.reason.startswith("stalled: no step lowers the loss")
    assert "converged" not in result.reason
    assert torch.equal(result.params, start)
    assert not result.history.accepted.any()
    assert result.updates < 10
    # With new points the next ones may do.
    result = fit(uphill, start, lambda t: X, 3 * X, damping=damping(), max_updates=12)
    assert result.reason == "ended after max_updates = 12"


def test_a_kink_is_no_minimum():
    # |p - 1| + 2 |p - 1|² has its minimum at the kink, where squared residuals have a slope.
    kink = lambda p, x: 1 + (p - 1).abs() * x  # noqa: E731
    start = torch.tensor([3.0], dtype=FLOAT64)
    result = fit(kink, start, X[1:], torch.zeros(29, dtype=FLOAT64))
    assert abs(float(result.params) - 1) < 1e-6
    assert result.reason.startswith("stalled")


def test_more_parameters_than_residuals():
    features = torch.randn(5, 12, generator=seeded(), dtype=FLOAT64)
    line = lambda p, x: x @ p  # noqa: E731
    start, y = torch.zeros(12, dtype=FLOAT64), torch.ones(5, dtype=FLOAT64)
    result = fit(line, start, features, y)
    assert result.reason.startswith("converged")
    torch.testing.assert_close(features @ result.params, y, rtol=0.0, atol=1e-7)


def test_losses_that_pass_through_zero():
    # The negative logarithm of a likelihood has no sign.
    shift = 2 * float(fit(decay, START, X, Y).loss)
    criterion = lambda f, y: (f - y).square().mean() - shift  # noqa: E731
    result = fit(decay, START, X, Y, criterion)
    assert result.reason.startswith("converged")
    torch.testing.assert_close(result.params, fit(decay, START, X, Y).params, rtol=1e-5, atol=0.0)


def test_float32_ends_where_it_cannot_tell_losses_apart():
    noisy = (Y + 0.3 * torch.randn(30, generator=seeded(1), dtype=FLOAT64)).to(FLOAT32)
    result = fit(decay, START.to(FLOAT32), X.to(FLOAT32), noisy, **NONE)
    assert result.reason == "converged: what is left to gain is lost in the rounding of the loss"
    assert math.isfinite(float(result.loss))
