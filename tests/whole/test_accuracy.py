"""How right a step is: float32 against float64 dense solves, where nets are confident, where
spectra are degenerate, where gradients vanish."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddnewton import above, newton_step, newton_step_and_info, top_k
from tests.methods import DTYPES, FLOAT32, FLOAT64
from tests.models import Problem
from tests.nets_in_training import (
    DELTAS,
    UPDATES,
    eigenpairs,
    exact,
    in_float32,
    in_float64,
    leading,
    mlp,
    truth,
)
from tests.reference import (
    dense,
    error,
    flat,
    logistic_derivatives,
    softmax_derivatives,
    solve,
    solve_in_decimals,
    step,
)

SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])
NETS = pytest.mark.parametrize("net", UPDATES)
SMOOTH_NETS = pytest.mark.parametrize("net", UPDATES[:-1])
"""Without the ReLU net trained for long: some of its units are within rounding of their kink, where
a net that exists in float32 only is another function than its float64 twin."""


# --- a net that learns its batch by heart ---------------------------------------------------


@SEEDS
@NETS
@pytest.mark.parametrize("delta", DELTAS)
def test_all_directions_in_float32(seed, net, delta):
    """The table of DESIGN.md, section 3."""
    result = newton_step(*in_float32(seed, net), delta)
    assert error(result, exact(seed, net, delta)) < 1e-5


@NETS
@pytest.mark.parametrize("delta", DELTAS)
def test_all_directions_in_float64(net, delta):
    result = newton_step(*in_float64(0, net), delta)
    assert error(result, exact(0, net, delta)) < 1e-9
    assert error(exact(0, net, delta), solve(truth(0, net), delta)) < 1e-8


@SEEDS
@SMOOTH_NETS
@pytest.mark.parametrize("delta", [1.0, 1e-4, 1e-8])
def test_a_net_that_exists_in_float32_only(seed, net, delta):
    """Whatever is done in float64 where that is possible, float32 alone is enough for 1e-5."""

    def narrow(params, X):
        if X.dtype != FLOAT32:
            raise TypeError("this kernel exists in float32 only")
        return mlp(net[0], params, X)

    result = newton_step(*in_float32(seed, net)._replace(model_fn=narrow), delta)
    assert error(result, exact(seed, net, delta)) < 1e-5


@SEEDS
@NETS
@pytest.mark.parametrize("delta", DELTAS)
def test_all_directions_and_the_complement_in_float32(seed, net, delta):
    """With damping = complement = δ nothing may be lost to the rank tolerance."""
    result = newton_step(*in_float32(seed, net), delta, complement=delta)
    assert error(result, exact(seed, net, delta)) < 1e-5


@SEEDS
@NETS
@pytest.mark.parametrize("complement", [None, 1e-2])
@pytest.mark.parametrize("delta", DELTAS)
def test_ten_directions_in_float32(seed, net, delta, complement):
    result = newton_step(*in_float32(seed, net), delta, select=top_k(10), complement=complement)
    assert error(result, exact(seed, net, delta, leading, complement)) < 1e-5


@SEEDS
@NETS
def test_derivatives_in_float32(seed, net):
    """γ and λ of the ten leading directions, which are apart; γ up to the sign of its direction."""
    _, info = newton_step_and_info(*in_float32(seed, net), 1.0, select=top_k(10))
    evals, _, gammas, lambdas = eigenpairs(seed, net, leading)
    gap = float(evals.diff().min() / evals[-1])
    loose = 10 * torch.finfo(FLOAT32).eps / gap
    assert error(info.evals, evals) < 1e-6
    assert error(info.gammas.abs(), gammas.abs()) < loose
    assert error(info.lambdas, lambdas) < loose
    assert error(info.lambdas.mean(0), info.evals) < 1e-6


# --- saturated probabilities ----------------------------------------------------------------


def shifted(params, X):
    """A linear model on top of given logits, so that they are exactly what a test says."""
    return X["logits"] + X["features"] @ params["W"] + params["b"]


FEATURES = torch.tensor([[0.3, -1.0], [1.2, 0.4], [-0.7, 0.9], [0.2, 0.8]])
NORMAL = torch.tensor([[0.5, -0.2, 0.1], [-1.0, 0.3, 0.8]])
SURE = torch.tensor([[200.0, -200.0, -200.0], [-200.0, -200.0, 200.0]])

SATURATED = {
    "right": (SURE, [0, 2]),
    "wrong": (SURE, [1, 0]),
    "right_and_wrong": (SURE, [0, 1]),
    "mixed_right": (torch.cat([NORMAL, SURE]), [1, 0, 0, 2]),
    "mixed_wrong": (torch.cat([NORMAL, SURE]), [1, 0, 1, 0]),
    "mixed_both": (torch.cat([NORMAL, SURE]), [1, 0, 0, 1]),
}


def saturated(logits, y, criterion, dtype) -> Problem:
    C = logits.shape[1]
    params = {"W": torch.zeros(2, C, dtype=dtype), "b": torch.zeros(C, dtype=dtype)}
    X = {"logits": logits.to(dtype), "features": FEATURES[: len(logits)].to(dtype)}
    return Problem(shifted, params, X, y, criterion)


def check_saturated(build, derivatives, delta, dtype) -> None:
    """The step is right to the last digit where it can be told from zero."""
    reference = dense(*build(FLOAT64), derivatives=derivatives)
    result, info = newton_step_and_info(*build(dtype), delta)
    expected = solve_in_decimals(reference, delta)
    # Largest entries: squares of 1e-174 underflow in a norm.
    distance, size = (flat(result) - expected).abs().max(), expected.abs().max()
    relative = {FLOAT32: 1e-5, FLOAT64: 1e-9}[dtype]
    assert distance <= relative * size + torch.finfo(dtype).tiny
    assert all(bool(torch.as_tensor(field).isfinite().all()) for field in info)


@DTYPES
@pytest.mark.parametrize("delta", [1.0, 1e-4, 1e-8])
@pytest.mark.parametrize("name", SATURATED)
def test_saturated_cross_entropy(name, delta, dtype):
    logits, labels = SATURATED[name]
    build = partial(saturated, logits, torch.tensor(labels), nn.CrossEntropyLoss())
    check_saturated(build, softmax_derivatives, delta, dtype)


@DTYPES
@pytest.mark.parametrize("delta", [1.0, 1e-4, 1e-8])
@pytest.mark.parametrize("name", SATURATED)
def test_saturated_binary_cross_entropy(name, delta, dtype):
    logits, labels = SATURATED[name]
    y = F.one_hot(torch.tensor(labels), 3).to(dtype)
    build = partial(saturated, logits, y, nn.BCEWithLogitsLoss())
    check_saturated(build, logistic_derivatives, delta, dtype)


@DTYPES
@pytest.mark.parametrize("logit", [5.0, 20.0, 40.0, 80.0])
def test_the_way_into_saturation(logit, dtype):
    """One sample of two classes, right: s = −r / (h + δ) along one direction, in closed form."""
    logits = torch.tensor([[logit, 0.0]])
    build = partial(saturated, logits, torch.tensor([0]), nn.CrossEntropyLoss())
    p = torch.sigmoid(torch.tensor(-logit, dtype=FLOAT64))
    features = torch.cat([FEATURES[0].double(), torch.ones(1, dtype=FLOAT64)])
    square = 2 * features.square().sum()
    expected = p / (p * (1 - p) * square + 1e-3) * torch.stack([features, -features], 1)
    result = newton_step(*build(dtype), 1e-3)
    found = torch.cat([result["W"], result["b"][None]]).double()
    assert error(found, expected) < {FLOAT32: 1e-6, FLOAT64: 1e-12}[dtype]


def test_undamped_when_saturated_is_finite():
    for name, (logits, labels) in SATURATED.items():
        given = saturated(logits, torch.tensor(labels), nn.CrossEntropyLoss(), FLOAT32)
        assert flat(newton_step(*given, 0.0, select=above(1e-6))).isfinite().all(), name


# --- samples that differ by little ----------------------------------------------------------


@pytest.mark.parametrize("complement", [False, True], ids=["all", "complement"])
@pytest.mark.parametrize("delta", [1.0, 1e-4, 1e-8])
@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6, 1e-8, 1e-10])
@pytest.mark.parametrize("side", ["fewer_columns", "more_columns"])
def test_two_nearly_equal_samples_with_different_labels(side, gap, delta, complement):
    """The direction between them has a curvature of gap², a slope of gap, and a step of gap/δ.

    Its eigenvalue may be rounding where its slope is not: an LU solve of (G + δI) s = −g in
    float64 is right to 6e-9 in all of these cases. Columns know their difference to eps / gap.
    """
    features = torch.tensor([[1.0, 1.0], [1.0, 1.0 + gap]], dtype=FLOAT64)
    y = torch.tensor([0, 1])
    if side == "more_columns":
        features, y = features.repeat(3, 1), y.repeat(3)
    W = torch.zeros(2, 2, dtype=FLOAT64)
    given = Problem(lambda W, X: X @ W, W, features, y, nn.CrossEntropyLoss())
    expected = solve_in_decimals(dense(*given), delta)
    result = newton_step(*given, delta, complement=delta if complement else None)
    assert error(result, expected) < max(1e-6, 16 * torch.finfo(FLOAT64).eps / gap)


# --- vanishing gradients, deficient ranks ---------------------------------------------------


def hinge_net(params, X):
    return torch.relu(X @ params["W1"] + params["b1"]) @ params["W2"] + params["b2"]


def small(dtype) -> Problem:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W1": (3, 4), "b1": (4,), "W2": (4, 2), "b2": (2,)}
    params = {k: torch.randn(s, generator=generator).to(dtype) for k, s in shapes.items()}
    X, y = (torch.randn(4, width, generator=generator).to(dtype) for width in (3, 2))
    return Problem(hinge_net, params, X, y, nn.MSELoss())


def with_params(given: Problem, **changes) -> Problem:
    return given._replace(params={**given.params, **changes})


DEFICIENT = {
    "duplicate_samples": lambda p: p._replace(X=p.X[[0, 0, 1, 1, 1]], y=p.y[[0, 2, 1, 1, 3]]),
    "all_alike": lambda p: p._replace(X=p.X[[0] * 20], y=p.y[[0, 1, 2, 3] * 5]),
    "dead_relus": lambda p: with_params(p, b1=p.params["b1"] - 100),
    "zero_output_layer": lambda p: with_params(p, W2=0 * p.params["W2"]),
    "equal_units": lambda p: with_params(
        p, W1=p.params["W1"][:, [0] * 4], b1=0 * p.params["b1"] + 1
    ),
    "zero_inputs": lambda p: p._replace(X=0 * p.X),
}
RANKS = {
    "duplicate_samples": 4,
    "all_alike": 2,
    "dead_relus": 2,
    "zero_output_layer": 8,
    "equal_units": 8,
    "zero_inputs": 2,
}


@DTYPES
@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("name", DEFICIENT)
def test_deficient_ranks(name, delta, dtype):
    reference = dense(*DEFICIENT[name](small(FLOAT64)))
    expected = step(reference, delta)
    result, info = newton_step_and_info(*DEFICIENT[name](small(dtype)), delta)
    assert error(result, expected) < {FLOAT32: 1e-5, FLOAT64: 1e-11}[dtype]
    assert int(info.rank) == len(info.evals) == RANKS[name]
    completed = newton_step(*DEFICIENT[name](small(dtype)), delta, complement=delta)
    assert error(completed, expected) < {FLOAT32: 1e-5, FLOAT64: 1e-9}[dtype]


@DTYPES
@pytest.mark.parametrize("name", DEFICIENT)
def test_undamped_on_deficient_ranks(name, dtype):
    """Without damping the step is the pseudo-inverse's: null directions do not blow it up."""
    expected = step(dense(*DEFICIENT[name](small(FLOAT64))), 0.0)
    result = newton_step(*DEFICIENT[name](small(dtype)), 0.0)
    assert error(result, expected) < {FLOAT32: 1e-4, FLOAT64: 1e-10}[dtype]


@DTYPES
def test_directions_of_no_curvature_may_be_asked_for(dtype):
    """All NM eigenvalues, the null ones too: nothing is divided by zero."""
    given = DEFICIENT["duplicate_samples"](small(dtype))
    result, info = newton_step_and_info(*given, 1e-4, select=lambda evals: range(len(evals)))
    expected = step(dense(*DEFICIENT["duplicate_samples"](small(FLOAT64))), 1e-4)
    assert error(result, expected) < {FLOAT32: 1e-5, FLOAT64: 1e-10}[dtype]
    assert all(bool(torch.as_tensor(field).isfinite().all()) for field in info)
