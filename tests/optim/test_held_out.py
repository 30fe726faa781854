"""Held-out samples choose the step and have to keep its promise."""

import math

import pytest
import torch
from torch import nn

from ddnewton import directional_newton, held_out
from ddnewton.optim.adaptation import Curvature, Outcome
from tests.methods import FLOAT64
from tests.models import problem
from tests.optim.textbook import (
    Pulls,
    at,
    error,
    growth,
    loss_of,
    moved,
    optimizer_of,
    some,
    spring,
    updated,
    walled,
)
from tests.reference import dense, flat, solve


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.01])
@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("name", ["more_columns_than_parameters", "tanh_mlp"])
def test_the_choice_of_held_out_samples(name, decay, fraction):
    given, grid = problem(name), (0.1, 1.0, 0.3, 10.0)
    damping = held_out(fraction, every=3, grid=grid, start=2.0)
    optimizer = optimizer_of(given, damping, weight_decay=decay)
    params, state = given.params, optimizer.init(given.params)
    multiple, previous = 2.0, torch.zeros_like(flat(params))
    n = len(given.X)
    kept = n - max(1, round(fraction * n))
    for t in range(7):
        whole, theta = at(given, params), flat(params)
        mine = whole
        if t % 3 == 0:
            mine = some(whole, list(range(kept)))
        g, G = mine.gradient, mine.ggn
        columns = len(mine.slopes) * (2 if name.startswith("more") else 1)
        mean = float(G.trace()) / min(columns, len(g))
        if t % 3 == 0:
            steps = [spring(g, G, theta, 0 * g, Pulls(m * mean, 0.0, decay)) for m in grid]
            losses = [loss_of(given, moved(params, s), 0.0, slice(kept, None)) for s in steps]
            multiple = math.sqrt(multiple * grid[losses.index(min(losses))])
        rate = 0.2 / math.sqrt(1 + t / 20)
        vector = spring(g, G, theta, previous, Pulls(multiple * mean, 0.9, decay))
        before = loss_of(given, params, decay, slice(0, kept) if t % 3 == 0 else slice(None))
        params, state, info = optimizer.update(params, state, given.X, given.y)
        assert error(state.control, multiple) < 1e-9
        assert error(info.damping, multiple * mean) < 1e-9
        assert error(info.learning_rate, rate) < 1e-6
        assert error(flat(params) - theta, float(info.learning_rate) * vector) < 1e-8
        assert error(info.loss, before) < 1e-12
        assert int(state.updates) == t + 1
        previous = vector


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_choice_where_the_gradient_has_columns_of_its_own(momentum):
    """It is of more samples than the curvature, and all of it is damped by δ."""
    given, grid, curved = problem("tanh_mlp"), (0.1, 1.0, 10.0), [0, 1]
    n = len(given.X)
    kept = n - max(1, round(0.25 * n))
    damping = held_out(0.25, every=2, grid=grid)
    options = {"complement": "damping", "momentum": momentum, "subsampling_ggn": curved}
    optimizer = optimizer_of(given, damping, **options)
    params, state = given.params, optimizer.init(given.params)
    multiple, previous = 1.0, torch.zeros_like(flat(params))
    for t in range(4):
        whole, theta = at(given, params), flat(params)
        first = some(whole, list(range(kept))) if t % 2 == 0 else whole
        g, G = first.gradient, some(whole, curved).ggn
        mean = float(G.trace()) / min(len(curved) * whole.hessians.shape[1], len(g))
        if t % 2 == 0:
            steps = [spring(g, G, theta, 0 * g, Pulls(m * mean)) for m in grid]
            losses = [loss_of(given, moved(params, s), 0.0, slice(kept, None)) for s in steps]
            multiple = math.sqrt(multiple * grid[losses.index(min(losses))])
        vector = spring(g, G, theta, previous, Pulls(multiple * mean, momentum))
        params, state, info = optimizer.update(params, state, given.X, given.y)
        assert error(state.control, multiple) < 1e-9
        assert error(info.damping, multiple * mean) < 1e-9
        # A share of the step, and what the quadratic model of both samples promises for it.
        step = float(info.learning_rate) * vector
        assert error(flat(params) - theta, step) < 1e-8
        assert error(info.predicted_decrease, -(g @ step + step @ G @ step / 2)) < 1e-8
        previous = vector


def test_of_several_that_will_do_the_largest_multiple_is_chosen():
    """And where none will, the largest as well."""
    X = torch.tensor([[1.0], [2.0], [20.0]], dtype=FLOAT64)
    params = torch.ones(1, dtype=FLOAT64)
    options = {"every": 1, "fraction": 0.3, "grid": (0.1, 100.0, 1.0), "start": 1.0}
    for model_fn in (walled, lambda p, x: torch.where(x > 10, 0 * x, p * x)):
        optimizer = directional_newton(model_fn, nn.MSELoss(), held_out(**options))
        new, state, info = optimizer.update(params, optimizer.init(params), X, 2 * X)
        assert float(state.control) == pytest.approx(10.0)
        assert bool(info.accepted)
        assert not torch.equal(new, params)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_a_step_that_keeps_less_than_half_of_its_promise_is_not_taken(rate):
    """From where curvature is small the whole step overshoots, to a finite loss."""
    given = growth(rate=-2.0, target=3.0)
    reference = some(dense(*given), range(4))
    first = rate * solve(reference, 0.001 * float(reference.ggn))
    after = loss_of(given, moved(given.params, first), 0.0, slice(4))
    assert loss_of(given, given.params, 0.0, slice(4)) < after < math.inf
    damping = held_out(grid=(0.001,), start=0.001)
    _, state, info = updated(given, damping, learning_rate=rate, momentum=0.0)
    assert bool(info.accepted)
    assert int(info.attempts) > 1
    assert float(info.ratio) >= 0.5
    assert float(state.control) == pytest.approx(0.001 * 4.0 ** (int(info.attempts) - 1))


@pytest.mark.parametrize(
    ("promised", "ratio", "after", "taken"),
    [
        (1.0, 0.5, 1.0, True),
        (1.0, 0.49, 1.0, False),
        (1.0, 3.0, 1.0, True),
        (1.0, -1.0, 3.0, False),
        (-1.0, 1.5, 3.0, True),  # momentum's rise, not much more than promised
        (-1.0, 1.6, 3.0, False),
        (-1.0, -2.0, 1.0, True),  # a rise that did not come
        (1.0, math.nan, math.nan, False),
        (1.0, math.inf, -math.inf, False),
    ],
)
def test_what_a_mini_batch_step_has_to_keep(promised, ratio, after, taken):
    one = torch.ones((), dtype=FLOAT64)
    outcome = Outcome(
        before=2 * one,
        after=after * one,
        predicted=promised * one,
        ratio=ratio * one,
        length=one,
        attempts=one,
        curvature=Curvature(one, one, one),
    )
    found, control = held_out().judge(3 * one, outcome)
    assert bool(found) is taken
    assert float(control) == (3.0 if taken else 12.0)


@pytest.mark.parametrize("every", [1, 2])
def test_a_batch_of_one_has_nothing_to_hold_out(every):
    given = problem("one_sample")
    optimizer = optimizer_of(given, held_out(every=every))
    params, state = given.params, optimizer.init(given.params)
    message = "^update: a batch to hold samples out of must have two of them or more; got 1"
    with pytest.raises(ValueError, match=message):
        optimizer.update(params, state, given.X, given.y)


def test_held_out_batches_of_different_sizes():
    given = problem("more_columns_than_parameters")
    optimizer = optimizer_of(given, held_out(every=2))
    params, state = given.params, optimizer.init(given.params)
    for size in (20, 2, 7, 3):
        params, state, info = optimizer.update(params, state, given.X[:size], given.y[:size])
        assert bool(info.accepted)
