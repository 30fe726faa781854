"""Levenberg and Marquardt: the textbook's loop, and a loss that never rises."""

import itertools
import math

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, settings
from hypothesis import given as drawn

from ddnewton import levenberg_marquardt, trust_region
from tests.methods import FLOAT32
from tests.models import problem
from tests.optim.textbook import (
    LOSSLESS,
    Pulls,
    error,
    far,
    growth,
    loss_of,
    marquardt,
    optimizer_of,
    teacher,
)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.01}, {"momentum": 0.7}], ids=str)
@pytest.mark.parametrize(
    ("name", "times"), [("tanh_mlp", 8.0), ("many_points", 6.0), ("poisson", 3.0), ("growth", 1.0)]
)
def test_the_textbook_loop(name, times, options):
    given = growth(-1.0, 5.0) if name == "growth" else far(name, times)
    optimizer = optimizer_of(given, levenberg_marquardt(1e-4), **options)
    params, state = given.params, optimizer.init(given.params)
    pulls = Pulls(0.0, options.get("momentum", 0.0), options.get("weight_decay", 0.0))
    delta, previous, sizes, attempts = None, None, None, []
    for _ in range(10):
        expected = marquardt(given, params, delta, pulls, previous, 1e-4, sizes)
        params, state, info = optimizer.update(params, state, given.X, given.y)
        assert int(info.attempts) == expected.attempts
        assert bool(info.accepted) == expected.accepted
        assert error(params, expected.params) < 1e-6
        assert error(info.damping, expected.damping) < 1e-4
        assert error(state.control, expected.following) < 1e-4
        assert error(info.loss, expected.before) < 1e-9
        if expected.accepted and expected.after > 1e-20:
            assert error(info.loss_after, expected.after) < 1e-5
        params = expected.params
        delta, previous, sizes = float(state.control), expected.vector, expected.sizes
        attempts.append(expected.attempts)
        if expected.after < 1e-20 or expected.before - expected.after < 1e-9 * expected.before:
            break  # from here on rounding decides
    if name in ("many_points", "growth"):
        assert max(attempts) > 1


@settings(max_examples=8, phases=(Phase.generate,))
@drawn(
    st.sampled_from(["relu_mlp", *LOSSLESS]),
    st.integers(0, 1000),
    st.floats(0.3, 10),
    st.sampled_from([{}, {"weight_decay": 0.01}, {"momentum": 0.9}, {"momentum": "exact"}]),
    st.booleans(),
)
def test_the_loss_never_rises(name, seed, times, options, by_radius):
    given = far(name, times, seed=seed)
    damping = trust_region() if by_radius else levenberg_marquardt()
    optimizer = optimizer_of(given, damping, **options)
    params, state = given.params, optimizer.init(given.params)
    decay, loss = options.get("weight_decay", 0.0), math.inf
    for _ in range(6):
        params, state, info = optimizer.update(params, state, given.X, given.y)
        now = loss_of(given, params, decay)
        assert now <= loss * (1 + 1e-14)
        assert error(info.loss_after, now) < 1e-10
        assert all(bool(x.isfinite()) for x in (state.control, state.damping, info.damping))
        loss = now


@pytest.mark.parametrize("damping", [levenberg_marquardt(), trust_region()], ids=["δ", "radius"])
def test_a_teacher_is_found_again_and_kept(damping):
    given = teacher(3)
    optimizer = optimizer_of(given, damping)
    params, state = given.params, optimizer.init(given.params)
    losses = []
    for _ in range(80):
        params, state, info = optimizer.update(params, state, given.X, given.y)
        losses.append(float(info.loss_after))
    assert losses[60] < 1e-25
    assert all(a >= b for a, b in itertools.pairwise(losses))
    assert all(bool(x.isfinite()) for x in (*state[:3], info.ratio, info.step_norm))


def test_the_end_of_a_long_run_in_float32():
    given = problem("tanh_mlp", FLOAT32)
    for damping in (levenberg_marquardt(), trust_region()):
        optimizer = optimizer_of(given, damping)
        params, state = given.params, optimizer.init(given.params)
        before = math.inf
        for _ in range(25):
            params, state, info = optimizer.update(params, state, given.X, given.y)
            assert float(info.loss_after) <= before
            before = float(info.loss_after)
            assert all(bool(x.isfinite()) for x in (state.control, state.damping))
        # What comes afterwards is learned all the same.
        for _ in range(25):
            params, state, info = optimizer.update(params, state, given.X, given.y + 1)
        assert float(info.loss_after) < 0.05
