"""Fits: what they return, whatever ends them, and how they go on."""

import math
import pickle
import sys
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import curve_fit
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import ddnewton.optim.fit_loop
import ddnewton.optim.progress
from ddnewton import Fit, Group, criteria, directional_newton, fit, monte_carlo
from tests.methods import ADAPTATIONS, DTYPES, FLOAT64, seeded

X = torch.linspace(0, 4, 30, dtype=FLOAT64)
Y = 2.5 * torch.exp(-1.3 * X) + 0.5 + 0.05 * torch.randn(30, generator=seeded(), dtype=FLOAT64)
START = {
    "height": torch.tensor([1.0], dtype=FLOAT64),
    "others": (torch.tensor(0.5, dtype=FLOAT64), torch.tensor(0.0, dtype=FLOAT64)),
}


def decay(p, x):
    rate, offset = p["others"]
    return p["height"] * torch.exp(-rate * x) + offset


def same(ours, theirs):
    pairs = zip(tree_leaves(ours), tree_leaves(theirs), strict=True)
    return all(
        torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) if torch.is_tensor(a) else a == b
        for a, b in pairs
    )


def flat(tree):
    return torch.cat([leaf.double().reshape(-1) for leaf in tree_leaves(tree)])


# --- what comes out ----------------------------------------------------------------------------


@DTYPES
def test_a_fit_finds_what_curve_fit_finds(dtype):
    params, x, y = tree_map(lambda leaf: leaf.to(dtype), (START, X, Y))
    before = tree_map(torch.clone, params)
    result = fit(decay, params, x, y)

    def function(x, height, rate, offset):
        return height * math.e ** (-rate * x) + offset

    best, _ = curve_fit(function, X.numpy(), Y.numpy(), p0=[1.0, 0.5, 0.0], ftol=1e-14, xtol=1e-14)
    tolerance = 1e-6 if dtype == FLOAT64 else 1e-5
    torch.testing.assert_close(flat(result.params), torch.tensor(best), rtol=tolerance, atol=0.0)
    # Like the start, which stays as it was; and the loss is that of the parameters.
    leaves = zip(tree_leaves(result.params), tree_leaves(params), strict=True)
    assert all(a.dtype == b.dtype == dtype and a.shape == b.shape for a, b in leaves)
    assert same(params, before)
    loss = F.mse_loss(decay(tree_map(torch.Tensor.double, result.params), x.double()), y.double())
    torch.testing.assert_close(result.loss, loss)
    assert result.reason.startswith("converged: ")
    assert result.updates == len(result.history.losses) == int(result.state.updates) < 20


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_the_updates_are_those_of_the_optimizer(name):
    make = ADAPTATIONS[name].make
    optimizer = directional_newton(decay, nn.MSELoss(), make())
    params, state = START, optimizer.init(START)
    infos = []
    for _ in range(6):
        params, state, info = optimizer.update(params, state, X, Y)
        infos.append(info)
    seen = []
    no_test = dict.fromkeys(("ftol", "xtol", "gtol"))
    fit(decay, START, X, Y, damping=make(), max_updates=6, callback=seen.append, **no_test)
    assert same(seen[-1].params, params)
    assert same(tuple(seen[-1].state), tuple(state))
    history = seen[-1].history
    for column, field in (("losses", "loss_after"), ("dampings", "damping"), ("accepted",) * 2):
        assert torch.equal(
            getattr(history, column), torch.stack([getattr(i, field) for i in infos])
        )
    assert torch.equal(history.term_losses, torch.stack([info.losses for info in infos]))
    assert len(history.seconds) == 6


def test_a_fit_is_printed_as_a_line_and_can_be_pickled():
    result = fit(decay, START, X, Y)
    assert repr(result).startswith(f"Fit(loss={float(result.loss):.6g}, ")
    assert repr(result).endswith(f"updates={result.updates}, reason={result.reason!r})")
    again = pickle.loads(pickle.dumps(result))
    assert isinstance(again, Fit)
    assert same(tuple(again), tuple(result))


@pytest.mark.parametrize("criterion", [nn.MSELoss(reduction="sum"), nn.HuberLoss(delta=10.0)])
def test_another_criterion(criterion):
    result = fit(decay, START, X, Y, criterion)
    expected = fit(decay, START, X, Y)
    torch.testing.assert_close(flat(result.params), flat(expected.params), rtol=1e-5, atol=0.0)


def test_terms_make_one_fit_together():
    halves = {"first": slice(0, 12), "second": slice(12, 30)}
    parts = [{name: data[half] for name, half in halves.items()} for data in (X, Y)]
    result = fit(dict.fromkeys(halves, decay), START, *parts, nn.MSELoss(reduction="sum"))
    expected = fit(decay, START, X, Y, nn.MSELoss(reduction="sum"))
    torch.testing.assert_close(flat(result.params), flat(expected.params), rtol=1e-9, atol=0.0)
    terms = result.history.term_losses
    assert list(terms) == ["first", "second"]
    both = terms["first"] + terms["second"]
    torch.testing.assert_close(both[1:], result.history.losses[:-1])


def net(p, x):
    return torch.tanh(torch.tanh(x @ p["A"]) @ p["B"]) @ p["c"]


def net_problem(n=250):
    shapes = {"A": (1, 24), "B": (24, 24), "c": (24, 1)}
    params = {
        name: torch.randn(shape, generator=seeded(), dtype=FLOAT64) / shape[0] ** 0.5
        for name, shape in shapes.items()
    }
    x = torch.linspace(-1, 1, n, dtype=FLOAT64)[:, None]
    return params, x, torch.sin(5 * x)


def test_the_layers_of_a_net_are_found_once():
    params, x, y = net_problem()
    calls = []

    def counted(p, x):
        calls.append(len(x))
        return net(p, x)

    result = fit(counted, params, x, y, max_updates=1)
    once = len(calls)
    longer = fit(counted, params, x, y, max_updates=5)
    assert len(calls) == 2 * once
    # They change nothing but the time.
    dense = fit(net, params, x, y, max_updates=5, gram="dense")
    torch.testing.assert_close(longer.history.losses, dense.history.losses, rtol=1e-6, atol=0.0)
    assert result.loss > longer.loss


def test_what_cannot_be_traced_is_said_once():
    params, x, y = net_problem(1400)

    def untraceable(p, x):
        return net(p, x) * (1 + (x.abs().max() > 2).item())

    with pytest.warns(UserWarning, match="layers of the model are not found") as warned:
        result = fit(untraceable, params, x, y, max_updates=2)
    assert len(warned) == 1
    assert result.updates == 2


# --- new points --------------------------------------------------------------------------------


def test_functions_are_called_once_in_every_update():
    calls = []

    def draw(t):
        calls.append(t)
        return X + 0.001 * t

    result = fit(decay, START, draw, Y, max_updates=5)
    assert calls == [0, 1, 2, 3, 4]
    further = fit(decay, result.params, draw, Y, max_updates=2, state=result.state)
    assert calls[5:] == [5, 6]
    assert further.updates == 2
    # So are functions of single leaves.
    calls.clear()
    half = {"moving": slice(0, 15), "fixed": slice(15, 30)}
    points = {"moving": lambda t: draw(t)[:15], "fixed": X[15:]}
    targets = {name: Y[part] for name, part in half.items()}
    fit(dict.fromkeys(half, decay), START, points, targets, max_updates=3)
    assert calls == [0, 1, 2]


def test_points_that_do_not_change_make_the_same_fit():
    expected = fit(decay, START, X, Y)
    result = fit(decay, START, lambda t: X, lambda t: Y)
    assert same(result.params, expected.params)
    assert result.reason == expected.reason


def test_a_draw_that_is_remembered_is_made_once():
    made = []

    @lru_cache(1)
    def draw(k):
        made.append(k)
        x = 4 * torch.rand(20, generator=seeded(k), dtype=FLOAT64)
        return x, 2.5 * torch.exp(-1.3 * x) + 0.5

    points = {"X": lambda t: draw(t // 4)[0], "y": lambda t: draw(t // 4)[1]}
    result = fit(decay, START, **points, max_updates=10)
    assert made == [0, 1, 2][: len(made)]
    torch.testing.assert_close(
        flat(result.params), torch.tensor([2.5, 1.3, 0.5], dtype=FLOAT64), rtol=1e-6, atol=0.0
    )


def test_with_new_points_the_last_parameters_are_returned():
    # The loss of the first points is the lowest there is: zero.
    scales = [0.0, 1.0, 3.0]
    line = lambda p, x: p * x  # noqa: E731
    seen = []
    result = fit(
        *(line, torch.ones(1, dtype=FLOAT64), X, lambda t: scales[t] * (Y - 1)),
        max_updates=3,
        callback=seen.append,
    )
    assert result.loss > min(one.loss for one in seen)
    assert same(result.params, seen[-1].params)


# --- the best so far ---------------------------------------------------------------------------


def test_of_the_same_points_the_best_is_returned():
    seen = []

    def rate(t):  # which overshoots from the fourth update on
        return torch.where(t < 3, 0.5, 3.0)

    options = {"damping": 0.0, "learning_rate": rate, "max_updates": 6}
    result = fit(decay, START, X, Y, callback=seen.append, **options)
    losses = torch.stack([one.loss for one in seen])
    best = 2
    assert losses[3] > losses[best] == losses.min()
    assert same(result.params, seen[best].params)
    assert torch.equal(result.loss, losses[best])
    # Its state goes with it: what follows is what followed then.
    assert same(tuple(result.state), tuple(seen[best].state))
    assert result.updates == len(seen) == len(result.history.losses)


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_a_fit_goes_on_as_if_it_had_not_ended(name):
    options = {"damping": ADAPTATIONS[name].make(), **dict.fromkeys(("ftol", "xtol", "gtol"))}
    states = []
    whole = fit(decay, START, X, Y, max_updates=9, callback=states.append, **options)

    def stop(so_far):
        if so_far.updates == 4:
            raise StopIteration

    first = fit(decay, START, X, Y, callback=stop, **options)
    assert first.reason == "stopped: by the callback"
    assert first.updates == 4
    second = fit(decay, first.params, X, Y, max_updates=5, state=first.state, **options)
    assert same(second.params, whole.params)
    assert same(tuple(second.state), tuple(whole.state))
    assert torch.equal(second.history.losses, whole.history.losses[4:])


def test_momentum_goes_on_too():
    options = {"momentum": 0.5, "damping": 0.1, "ftol": None, "xtol": None, "gtol": None}
    whole = fit(decay, START, X, Y, max_updates=8, **options)
    first = fit(decay, START, X, Y, max_updates=3, **options)
    second = fit(decay, first.params, X, Y, max_updates=5, state=first.state, **options)
    assert same(second.params, whole.params)


# --- what ends it ------------------------------------------------------------------------------


def after(count, error):
    """A callback that raises after some updates."""

    def callback(so_far):
        assert so_far.reason == "running"
        if so_far.updates == count:
            raise error

    return callback


def test_an_interrupt_returns_what_there_is():
    result = fit(decay, START, X, Y, callback=after(3, KeyboardInterrupt()))
    assert result.reason == "interrupted: by the keyboard"
    expected = fit(decay, START, X, Y, max_updates=3)
    assert same(result.params, expected.params)
    assert result.updates == 3


@pytest.mark.parametrize("updates", [0, 2])
def test_an_interrupt_inside_the_model(updates):
    calls = []

    def interrupted(p, x):
        calls.append(None)
        if len(calls) > limit:
            raise KeyboardInterrupt
        return decay(p, x)

    limit = math.inf
    fit(interrupted, START, X, Y, max_updates=2)
    limit = len(calls) if updates else 0
    calls.clear()
    if updates:
        result = fit(interrupted, START, X, Y)
        assert result.updates == 2
        assert result.reason.startswith("interrupted")
    else:  # there is nothing to return
        with pytest.raises(KeyboardInterrupt):
            fit(interrupted, START, X, Y)


def test_other_exceptions_pass_on():
    with pytest.raises(RuntimeError, match="out of paper"):
        fit(decay, START, X, Y, callback=after(2, RuntimeError("out of paper")))


def test_what_is_not_finite_at_the_start_is_refused():
    with pytest.raises(ValueError, match=r"^fit: the outputs of model_fn must be finite"):
        fit(decay, START, X * math.nan, Y)
    # As derivatives that are not: that of the square root at zero.
    root = lambda p, x: torch.sqrt(p * x)  # noqa: E731
    with pytest.raises(ValueError, match=r"^fit: the derivatives of model_fn must be finite"):
        fit(root, torch.zeros(1, dtype=FLOAT64), X, Y)


def test_what_is_not_finite_later_ends_it():
    points = lambda t: X if t < 3 else X * math.nan  # noqa: E731
    result = fit(decay, START, points, Y)
    assert result.reason.startswith("ended where the next update is not defined: the outputs of")
    assert result.updates == 3
    assert same(result.params, fit(decay, START, X, Y, max_updates=3).params)
    # Another mistake in later points is one.
    with pytest.raises(ValueError, match=r"^fit: X and y must hold the same number of samples"):
        fit(decay, START, lambda t: X[: 30 - t], Y)


def test_seconds_end_it(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(
        ddnewton.optim.fit_loop, "time", SimpleNamespace(monotonic=lambda: float(next(clock)))
    )
    # It is read when the fit begins, twice in every update, and after it.
    result = fit(decay, START, X, Y, max_seconds=9.5)
    assert result.reason == "ended after max_seconds = 9.5"
    assert result.updates == 4
    assert result.history.seconds.tolist() == [1.0] * 4


def test_updates_end_it():
    result = fit(decay, START, X, Y, max_updates=2)
    assert result.reason == "ended after max_updates = 2"
    assert result.updates == 2


# --- what is shown -----------------------------------------------------------------------------


def test_a_bar_is_shown(capsys):
    result = fit(decay, START, X, Y, progress=True)
    shown = capsys.readouterr().err
    assert "fit:" in shown
    assert f"{result.updates}/1000" in shown
    assert f"loss={float(result.loss):.3g}" in shown


def test_lines_are_shown_where_there_is_no_tqdm(capsys, monkeypatch):
    monkeypatch.setattr(ddnewton.optim.progress, "find_spec", lambda name: None)
    monkeypatch.setattr(ddnewton.optim.progress, "SECONDS_BETWEEN_LINES", 0.0)
    result = fit(decay, START, X, Y, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == result.updates
    assert lines[-1].startswith(f"fit: update {result.updates}, loss {float(result.loss):.3g}, ")


def test_nothing_is_shown_unless_asked_for(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)  # an import of it would fail
    fit(decay, START, X, Y)
    assert capsys.readouterr() == ("", "")


# --- what is refused ---------------------------------------------------------------------------

POINTS = "X and y must be tensors, pytrees of tensors, or functions of the number of updates alone"
SWAPPED = "If it is the criterion, pass it after y: the order is model_fn, params, X, y, criterion"
S = SWAPPED[:20]
REFUSED = {
    "ftol below": ({"ftol": -1e-8}, ValueError, "ftol must be a number ≥ 0; got -1e-08"),
    "xtol a word": ({"xtol": "small"}, TypeError, "xtol must be a number ≥ 0; got 'small'"),
    "gtol nan": ({"gtol": math.nan}, ValueError, "gtol must be a number ≥ 0; got nan"),
    "no updates": ({"max_updates": 0}, ValueError, "max_updates must be an integer ≥ 1, or None;"),
    "half an update": ({"max_updates": 1.5}, TypeError, "max_updates must be an integer ≥ 1, or N"),
    "updates true": ({"max_updates": True}, TypeError, "max_updates must be an integer ≥ 1, or No"),
    "no time": ({"max_seconds": 0.0}, ValueError, "max_seconds must be positive; got 0.0"),
    "callback": ({"callback": 3}, TypeError, "callback must be a function of a Fit, or None; got"),
    "callback of nothing": (
        {"callback": lambda: None},
        TypeError,
        "callback must be a function of",
    ),
    "X of nothing": (
        {"X": lambda: X},
        TypeError,
        f"{POINTS}; got X: <lambda>. Pass what it returns, or, .* such as X=lambda t: draw",
    ),
    "y of two": ({"y": lambda t, k: Y}, TypeError, f"{POINTS}; got y: <lambda>. {SWAPPED}"),
    "a loss for y": (
        {"y": nn.MSELoss(), "criterion": Y},
        TypeError,
        f"{POINTS}; got y: MSELoss. {S}",
    ),
    "a function for y": ({"y": F.mse_loss, "criterion": Y}, TypeError, f"{POINTS}; got y: mse_l"),
    "a record for y": (
        {"y": criteria.mse(), "criterion": Y},
        TypeError,
        f"{POINTS}; got y: Loss. ",
    ),
    "drawn for y": (
        {"y": monte_carlo(nn.MSELoss(), 1, torch.Generator())},
        TypeError,
        f"{POINTS}; got y: MonteCarlo. {SWAPPED}",
    ),
    "a class for y": (
        {"y": nn.MSELoss, "criterion": Y},
        TypeError,
        f"{POINTS}; got y: MSELoss. {S}",
    ),
    "a loss for X": (
        {"X": nn.MSELoss(), "criterion": X},
        TypeError,
        f"{POINTS}; got X: MSELoss. {S}",
    ),
    "a loss for y of a term": (
        {"y": {"a": nn.MSELoss()}},
        TypeError,
        rf"{POINTS}; got y\['a'\]: MSE",
    ),
    "targets for criterion": (
        {"criterion": Y},
        TypeError,
        r"criterion must be a loss function; got a tensor of shape \[\d+\]. If it is y, pass it be",
    ),
    "X of lists": ({"X": lambda t: [1.0]}, TypeError, "X and y must be tensors or pytrees of ten"),
    "groups": ({"groups": [Group("none")]}, ValueError, "a group must name parameters that there"),
    "weight_decay": (
        {"weight_decay": {"height": 0.1}},
        ValueError,
        "weight_decay must be a number, or have the structure of params",
    ),
    "scale of others": (
        {"scale": {"a": 1.0}},
        ValueError,
        "scale must be a number, or have the st",
    ),
    "samples": ({"subsampling_grad": [40]}, ValueError, "subsampling_grad must hold distinct ind"),
    "scale": ({"scale": "x"}, ValueError, 'scale must be positive numbers, "jac" or None; got x'),
    "progress": ({"progress": "bar"}, TypeError, "progress must be True or False; got 'bar'"),
    "state": ({"state": {}}, TypeError, "state must be a State; got dict"),
    "damping": ({"damping": "small"}, TypeError, "damping must be a number"),
    "gram": ({"gram": "fast"}, ValueError, "gram must be one of"),
    "select": ({"select": 3}, TypeError, "select must be a function or None"),
    "criterion": ({"criterion": 3}, TypeError, "criterion must be a loss function; got 3"),
    "X": ({"X": [1.0]}, TypeError, "X and y must be tensors or pytrees of tensors"),
    "y": ({"y": Y[:3]}, ValueError, "X and y must hold the same number of samples"),
    "y of another shape": ({"y": Y[:, None]}, ValueError, ""),
    "params": ({"params": {"height": 1.0}}, TypeError, "params must hold floating-point tensors"),
    "no params": ({"params": {}}, ValueError, "params must hold at least one tensor"),
    "model": ({"model_fn": 3}, TypeError, "model_fn must be a function; got 3"),
    "model of X": (
        {"model_fn": nn.Linear(1, 1)},
        TypeError,
        "model_fn must take params and X; got the mod",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    options, kind, message = REFUSED[case]
    arguments = {"model_fn": decay, "params": START, "X": X, "y": Y, **options}
    with pytest.raises(kind, match=f"^fit: {message}"):
        fit(**arguments)


def test_what_is_refused_comes_before_any_work():
    def never(*args):
        raise AssertionError

    for options in (case[0] for name, case in REFUSED.items() if "y" not in name):
        arguments = {"model_fn": never, "params": START, "X": X, "y": Y, **options}
        with pytest.raises((ValueError, TypeError)):
            fit(**arguments)


def test_a_state_of_other_parameters_is_refused():
    heavy = fit(decay, START, X, Y, momentum=0.5, max_updates=1)
    with pytest.raises(
        ValueError, match=r"^fit: state must be of the same parameters, and of an op"
    ):
        fit(decay, START, X, Y, state=heavy.state)


def test_an_ensemble_is_refused():
    members = tree_map(lambda leaf: torch.stack([leaf, leaf]), START)
    with pytest.raises(ValueError, match=r"^fit: fit is of one set of parameters; got an ensemble"):
        torch.func.vmap(lambda params: fit(decay, params, X, Y).loss)(members)


def test_a_criterion_without_squares():
    counts = (5 * Y).round()
    rates = lambda p, x: decay(p, x) + 1  # noqa: E731
    result = fit(rates, START, X, counts, criteria.poisson_nll())
    assert result.reason.startswith("converged")
    slopes = torch.func.grad(lambda p: F.poisson_nll_loss(rates(p, X), counts))(result.params)
    assert flat(slopes).abs().max() < 1e-5
