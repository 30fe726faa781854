"""The longest step: the least damping for a radius, and how the radius follows the model."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import given as drawn

from ddnewton import Group, fit, top_k, trust_region
from ddnewton.damping import relative
from tests.methods import ADAPTATIONS, SMALL_AND_LARGE
from tests.optim.textbook import (
    RULES,
    at,
    error,
    far,
    loss_of,
    moved,
    optimizer_of,
    sizes_of,
    updated,
)
from tests.reference import dense, flat, solve


def sorensen(g, G, radius: float) -> float:
    """The least δ ≥ 0 with ‖(G + δI)⁻¹g‖ ≤ radius, by bisection."""
    evals, E = torch.linalg.eigh(G)
    slopes = E.T @ g

    def length(delta):
        return float((slopes / (evals.clamp(min=0) + delta)).norm())

    low, high = 0.0, float(g.norm()) / radius
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if length(middle) > radius else (low, middle)
    return high


@settings(max_examples=8, phases=(Phase.generate,))
@drawn(
    st.sampled_from([*SMALL_AND_LARGE, "poisson"]),
    st.integers(0, 100),
    st.floats(0.2, 5),
    st.floats(-5, 0),
)
def test_the_least_damping_for_a_radius(name, seed, times, exponent):
    given = far(name, times, seed=seed)
    reference = dense(*given)
    g, G = reference.gradient, reference.ggn
    radius = 10.0**exponent * float(solve(reference, 1e-9 * float(G.trace())).norm())
    _, _, info = updated(given, 0.0, trust_radius=radius)
    if info.attempts > 1:
        return
    assert float(info.step_norm) <= radius * (1 + 1e-9)
    if float(info.damping) > 0:
        assert float(info.step_norm) > 0.9 * radius * (1 - 1e-9)
        tightest, loosest = sorensen(g, G, radius), sorensen(g, G, 0.9 * radius)
        assert tightest * (1 - 1e-4) <= float(info.damping) <= loosest * (1 + 1e-4)
        params, *_ = updated(given, float(info.damping))
        assert error(params, updated(given, 0.0, trust_radius=radius)[0]) < 1e-9


@pytest.mark.parametrize("factors", [{}, {"grow": 3.0, "shrink": 0.6}], ids=str)
@pytest.mark.parametrize("name", ["many_points", "tanh_mlp", "more_columns_than_parameters"])
def test_the_longest_arc_with_which_the_loss_falls(name, factors):
    """The loop in dense matrices, in units of the largest sizes of the columns so far."""
    grow = factors.get("grow", 2.0)
    given = far(name, 5.0)
    optimizer = optimizer_of(given, trust_region(0.5, **factors))
    params, state = given.params, optimizer.init(given.params)
    radius, sizes = None, None
    for _ in range(12):
        reference, theta = at(given, params), flat(params)
        sizes, scale = sizes_of(reference, sizes)
        g, G = scale * reference.gradient, scale[:, None] * reference.ggn * scale
        radius = 0.5 * float((theta / scale).norm()) if radius is None else radius
        params, state, info = optimizer.update(params, state, given.X, given.y)
        length, delta, trace = float(info.step_norm), float(info.damping), float(G.trace())
        if float(info.loss_after) < 1e-10 or delta < 1e-6 * trace or int(info.attempts) > 10:
            break  # from here on rounding decides
        # The damped step s, within the radius; the control follows the share t that is taken.
        step, taken = damped(g, G, delta), (flat(params) - theta) / scale
        share = float(state.control / (grow * step.norm()))
        assert float(step.norm()) <= radius * (1 + 1e-9)
        assert error(taken.norm(), length) < 1e-9
        if error(taken, step) < 1e-7:
            assert error(share, 1.0) < 1e-9
        else:
            start = moved(params, theta - flat(params))
            check_arc(given, start, scale, (step, delta, share), (taken, info))
        # What is promised is that of t s.
        predicted = -(share * g @ step + share**2 * step @ G @ step / 2)
        assert error(info.predicted_decrease, predicted) < 1e-7
        assert error(info.ratio, (info.loss - info.loss_after) / predicted) < 1e-7
        assert float(info.loss_after) < float(info.loss)
        radius = float(state.control)


def check_arc(given, start, scale, arc, update):
    """The arc t s + t² c was taken, where neither s nor s + c lowers the loss."""
    (step, delta, share), (taken, info) = arc, update
    second = second_step(given, start, scale, step, delta)
    assert error(taken, share * step + share**2 * second) < 1e-7
    least = float(info.loss) * (1 - 1e-3)
    assert loss_of(given, moved(start, scale * step)) > least
    if share < 0.95 and second.norm() < step.norm():
        assert loss_of(given, moved(start, scale * (step + second))) > least


def test_valleys_take_few_updates():
    """Rosenbrock's, as residuals."""

    def valley(p, x):
        return torch.stack([10 * (p[1] - p[0] ** 2), 1 - p[0]])[x]

    x, start = torch.arange(2), torch.tensor([-1.2, 1.0]).double()
    result = fit(valley, start, x, torch.zeros(2).double())
    assert error(result.params, torch.ones(2).double()) < 1e-9
    assert result.updates <= 10


def second_step(given, params, scale, step, delta):
    """−(G + δI)⁻¹ Jᵀ H ρ / N with ρ what the outputs after a step are off the linear ones."""
    reference = at(given, params)
    J = reference.jacobians * scale
    before, after = (
        given.model_fn(p, given.X).reshape(len(J), -1)
        for p in (params, moved(params, scale * step))
    )
    bent = after - before - J @ step
    slopes = torch.einsum("ncd,nce,ne->d", J, reference.hessians, bent) / len(J)
    return damped(slopes, scale[:, None] * reference.ggn * scale, delta)


def damped(g, G, delta):
    """−(G + δI)⁻¹ g."""
    return -torch.linalg.solve(G + delta * torch.eye(len(g)).double(), g)


RADIUS = {
    **{name: (one.make(), {}) for name, one in ADAPTATIONS.items()},
    "small number": (0.01, {}),
    "rule": (relative(1e-3), {}),
    "skip some": (RULES["skip some"](), {}),
    "momentum": (0.01, {"momentum": 0.9}),
    "exact momentum": (0.01, {"momentum": "exact"}),
    "weight decay": (0.01, {"weight_decay": 1.0}),
    "exact rate": (0.01, {"learning_rate": "exact"}),
    "small rate": (0.01, {"momentum": 0.9, "learning_rate": 0.1}),
    "rising rate": (0.01, {"momentum": 0.9, "learning_rate": lambda t: 0.01 * 4.0**t}),
    "radius with momentum": (trust_region(), {"momentum": 0.9}),
    "complement": (0.01, {"select": top_k(1), "complement": "damping"}),
    "complement of its own": (0.01, {"select": top_k(1), "complement": 1e-3}),
    "groups": (0.01, {"groups": [Group("0", damping=0.5), Group("2")]}),
    "half": (0.01, {"subsampling_ggn": [0, 1], "complement": "damping"}),
}


@pytest.mark.parametrize("case", RADIUS)
def test_no_step_is_longer_than_the_radius(case):
    given = far("relu_mlp", 2.0)
    damping, options = RADIUS[case]
    optimizer = optimizer_of(given, damping, trust_radius=0.05, scale=None, **options)
    params, state = given.params, optimizer.init(given.params)
    for _ in range(5):
        new, state, info = optimizer.update(params, state, given.X, given.y)
        assert float((flat(new) - flat(params)).norm()) <= 0.05 * (1 + 1e-9)
        assert float(info.step_norm) <= 0.05 * (1 + 1e-9)
        params = new


@pytest.mark.parametrize(
    ("name", "learning_rate"), [("many_points", 1.0), ("many_points", 0.2), ("tanh_mlp", 1.0)]
)
def test_no_step_is_longer_than_what_is_trusted(name, learning_rate):
    """Not even the pull to a step before that was longer."""
    for times in (1.0, 4.0):
        given = far(name, times)
        options = {"momentum": 0.9, "learning_rate": learning_rate}
        optimizer = optimizer_of(given, trust_region(1e-2), **options)
        params, state = given.params, optimizer.init(given.params)
        for _ in range(12):
            radius = float(state.control)
            params, state, info = optimizer.update(params, state, given.X, given.y)
            if not math.isnan(radius):
                assert float(info.step_norm) <= radius * (1 + 1e-9)
