"""An update of the optimizer of pure functions is the textbook's, with momentum and decay too."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from ddnewton import Group, directional_newton, fixed, levenberg_marquardt, top_k
from ddnewton.damping import constant, signal_to_noise
from tests.methods import (
    ADAPTATIONS,
    DTYPES,
    FLOAT32,
    FLOAT64,
    REALS,
    REDUCTIONS,
    SMALL_AND_LARGE,
    TORCH_LOSSES,
)
from tests.models import Problem, cast, normal, problem
from tests.optim.textbook import (
    RULES,
    Pulls,
    along,
    at,
    error,
    loss_of,
    moved,
    optimizer_of,
    spring,
    updated,
)
from tests.reference import dense, directions, flat, solve

# --- one number for all directions ----------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("gram", ["dense", "structured"])
@pytest.mark.parametrize("name", [*SMALL_AND_LARGE, "poisson", "one_sample", "tied_autoencoder"])
def test_an_update_is_a_damped_step(name, gram, dtype):
    given, reference = problem(name, dtype), dense(*problem(name))
    params, state, info = updated(given, 0.1, learning_rate=0.7, gram=gram)
    expected = 0.7 * solve(reference, 0.1)
    assert error(params, flat(given.params) + expected) < (1e-6 if dtype == FLOAT32 else 1e-11)
    for old, new in zip(tree_leaves(given.params), tree_leaves(params), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
    assert int(state.updates) == 1
    assert bool(info.accepted)
    assert int(info.attempts) == 1
    assert float(info.learning_rate) == 0.7
    assert error(info.loss, reference.loss) < 1e-6
    assert error(info.loss_after, loss_of(problem(name), moved(problem(name).params, expected))) < (
        1e-5 if dtype == FLOAT32 else 1e-10
    )
    s, g, G = expected, reference.gradient, reference.ggn
    assert error(info.predicted_decrease, -g @ s - s @ G @ s / 2) < 1e-5
    assert error(info.gradient_norm, g.norm()) < 1e-5
    assert error(info.step_norm, s.norm()) < 1e-5
    ratio = (info.loss - info.loss_after) / info.predicted_decrease
    assert error(info.ratio, ratio) < 1e-12


def custom(f, y, reduction):
    each = ((f - y) ** 4).sum(1) + f.logsumexp(1)
    return each.mean() if reduction == "mean" else each.sum()


@REDUCTIONS
@pytest.mark.parametrize("name", [*TORCH_LOSSES, "custom"])
def test_every_loss_and_reduction(name, reduction):
    y, loss, options = REALS, partial(custom, reduction=reduction), {}
    criterion = loss
    if name in TORCH_LOSSES:
        case = TORCH_LOSSES[name]
        y, loss, criterion = case.y, case.plain(reduction), case.module(reduction=reduction)
        options = {} if case.curved else {"complement": "damping"}
    textbook = problem("relu_mlp")._replace(y=cast(y, FLOAT64), criterion=loss)
    reference, theta = dense(*textbook), flat(textbook.params)
    params, _, info = updated(
        textbook._replace(criterion=criterion), 0.3, weight_decay=0.05, **options
    )
    g, G, zero = reference.gradient, reference.ggn, torch.zeros_like(theta)
    assert error(flat(params) - theta, spring(g, G, theta, zero, Pulls(0.3, 0.0, 0.05))) < 1e-11
    assert error(info.loss, loss_of(textbook, textbook.params, 0.05)) < 1e-12
    assert error(info.loss_after, loss_of(textbook, params, 0.05)) < 1e-12


# --- momentum and weight decay --------------------------------------------------------------


WAYS = {
    "cholesky": {},
    "structured": {"gram": "structured"},
    "dense in chunks": {"gram": "dense", "chunk_size": 2},
    "outside too": {"complement": "damping"},
    "eigenpairs": {"select": lambda evals: range(len(evals))},
}


SIDES = ("relu_mlp", "many_points")  # one with few columns and one with many


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *itertools.product(SIDES, WAYS),
        ("more_columns_than_parameters", "cholesky"),
        ("poisson", "eigenpairs"),
    ],
)
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_momentum_and_weight_decay_over_several_updates(name, decay, way):
    given = problem(name)
    options = {"momentum": 0.8, "weight_decay": decay, "learning_rate": 0.5} | WAYS[way]
    optimizer = optimizer_of(given, 0.3, **options)
    params, state = given.params, optimizer.init(given.params)
    previous = torch.zeros_like(flat(params))
    for _ in range(4):
        reference, theta = at(given, params), flat(params)
        g, G = reference.gradient, reference.ggn
        vector = spring(g, G, theta, previous, Pulls(0.3, 0.8, decay))
        params, state, info = optimizer.update(params, state, given.X, given.y)
        assert error(flat(params) - theta, 0.5 * vector) < 1e-9
        assert error(state.previous, vector) < 1e-9
        s = 0.5 * vector
        slope = g @ s + decay * theta @ s
        predicted = -slope - (s @ G @ s + decay * s @ s) / 2
        assert abs(info.predicted_decrease - predicted) < 1e-9 * slope.abs()
        assert error(info.step_norm, s.norm()) < 1e-9
        previous = vector


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("pulls", [(0.8, 0.0), (0.0, 0.05), (0.8, 0.05)], ids=str)
@pytest.mark.parametrize(
    ("name", "adaptation"), [("relu_mlp", "fixed"), ("relu_mlp", "more"), ("many_points", "fixed")]
)
def test_what_a_rule_adds_pulls_to_the_step_before(name, adaptation, pulls, rule):
    given, theta = problem(name), flat(problem(name).params)
    momentum, decay = pulls
    previous = 0.1 * normal(len(theta)).double()
    delta = 0.0
    damping = fixed(RULES[rule]())
    if adaptation == "more":
        delta = 0.25
        damping = damping._replace(damping=lambda control, curvature: control * 0 + delta)
    options = {"momentum": momentum, "weight_decay": decay, "learning_rate": 1e-3}
    optimizer = optimizer_of(given, damping, **options)
    state = optimizer.init(given.params)
    if momentum:
        zero = tree_map(torch.zeros_like, given.params)
        state = state._replace(previous=moved(zero, previous))
    else:
        previous = torch.zeros_like(previous)
    params, _, info = optimizer.update(given.params, state, given.X, given.y)
    assert bool(info.accepted)
    kept = directions(dense(*given))
    more = RULES[rule]()(kept.evals, None, kept.gammas, kept.lambdas)
    gamma, curvature = kept.gammas.mean(0), kept.lambdas.mean(0)
    pull = Pulls(delta, momentum, decay)
    expected = along(kept.vectors, gamma, curvature, more, theta, previous, pull)
    found = (flat(params) - theta) / 1e-3
    assert (found - expected).norm() < 1e-7 * (expected.norm() + theta.norm())


def test_weight_decay_that_vanishes_is_none():
    given = problem("relu_mlp")
    for damping in (0.2, constant(0.2), levenberg_marquardt(rule=constant(0.2))):
        for select in (None, top_k(3)):
            options = {"momentum": 0.9, "learning_rate": 0.1, "select": select, "times": 3}
            expected, *_ = updated(given, damping, complement="damping", **options)
            if callable(damping):  # δ = 0 outside
                expected, *_ = updated(given, damping, complement=0.5, **options)
                options["complement"] = 0.5
            else:
                options["complement"] = "damping"
            found, *_ = updated(given, damping, weight_decay=1e-10, **options)
            assert error(found, expected) < 1e-6


FIXED_POINTS = {
    **{name: (one.make(), {}) for name, one in ADAPTATIONS.items() if one.whole_batch},
    "noise": (signal_to_noise(), {}),
    "skip some": (RULES["skip some"](), {}),
    "complement of its own": (0.3, {"complement": 0.7, "select": top_k(2)}),
    "complement": (0.3, {"complement": "damping", "select": top_k(2)}),
    "groups": (0.3, {"groups": [Group("bias"), Group("weight", damping=0.1)]}),
    "exact": (0.3, {"momentum": "exact", "learning_rate": "exact"}),
}


@pytest.fixture(scope="module")
def minimum() -> Problem:
    """Where a penalised loss is lowest: of softmax regression, whose G is the Hessian."""
    torch.manual_seed(0)
    params = {"weight": normal(6, 3).double(), "bias": normal(3).double()}
    y = torch.tensor([0, 2, 1, 1, 0])
    given = Problem(
        lambda p, x: x @ p["weight"] + p["bias"],
        params,
        normal(5, 6).double(),
        y,
        nn.CrossEntropyLoss(),
    )
    for _ in range(40):
        reference, theta = at(given, given.params), flat(given.params)
        g, G = reference.gradient, reference.ggn
        step = spring(g, G, theta, 0 * g, Pulls(0.0, 0.0, 0.1))
        while loss_of(given, moved(given.params, step), 0.1) > loss_of(given, given.params, 0.1):
            step = step / 2
            if step.norm() < 1e-9:
                return given
        given = given._replace(params=moved(given.params, step))
    return given


@pytest.mark.parametrize("case", FIXED_POINTS)
def test_at_a_minimum_of_the_penalised_loss_nothing_moves(case, minimum):
    damping, options = FIXED_POINTS[case]
    params, _, _ = updated(minimum, damping, weight_decay=0.1, **options)
    assert error(params, minimum.params) < 1e-7


@pytest.mark.parametrize("delta", [1e-12, 1e-3, 10.0])
def test_a_promise_by_the_matrix_is_that_by_the_columns(delta, monkeypatch):
    """On the side of the parameters a step's predicted decrease needs no columns."""
    model_fn, params, X, y, criterion = problem("many_points")
    promises = []
    for share in (0.0, math.inf):
        monkeypatch.setattr("ddnewton.optim.promise.MATRIX_SHARE", share)
        optimizer = directional_newton(model_fn, criterion, fixed(delta))
        info = optimizer.update(params, optimizer.init(params), X, y)[2]
        promises.append(info.predicted_decrease)
    assert error(*promises) < 1e-10
