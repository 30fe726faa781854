"""How much is taken of a step, and of the one before."""

import pytest
import torch

from ddnewton import levenberg_marquardt, per_layer, top_k
from tests.methods import FLOAT64
from tests.models import problem
from tests.optim.textbook import Pulls, at, error, far, optimizer_of, spring, step_of, updated
from tests.reference import dense, flat


def test_learning_rates():
    given, seen = problem("relu_mlp"), []
    whole = flat(updated(given, 0.1)[0]) - flat(given.params)

    def schedule(updates):
        seen.append(updates)
        return 0.5 / (1 + updates)

    optimizer = optimizer_of(given, 0.1, learning_rate=schedule)
    params, state = given.params, optimizer.init(given.params)
    new, state, info = optimizer.update(params, state, given.X, given.y)
    assert error(flat(new) - flat(params), 0.5 * whole) < 1e-12
    assert float(info.learning_rate) == 0.5
    _, state, info = optimizer.update(params, state, given.X, given.y)
    assert float(info.learning_rate) == 0.25
    assert all(isinstance(x, torch.Tensor) and x.dtype == torch.int64 for x in seen)
    assert [int(x) for x in seen] == [0, 1]
    assert error(step_of(given, 0.1, learning_rate=lambda t: 0.25), 0.25 * whole) < 1e-12


def test_the_exact_learning_rate_is_one_where_the_step_is_the_minimum():
    given = problem("relu_mlp")
    for damping in (levenberg_marquardt(), levenberg_marquardt(rule=0.1), 0.1, 2.0):
        for decay in (0.0, 0.05):
            _, _, info = updated(given, damping, learning_rate="exact", weight_decay=decay)
            assert float(info.learning_rate) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("way", ["groups", "select"])
def test_the_exact_learning_rate_is_that_of_a_parabola(way, decay):
    given, theta = far("relu_mlp", 2.0), flat(far("relu_mlp", 2.0).params)
    options = {"groups": per_layer(given.params)} if way == "groups" else {"select": top_k(2)}
    optimizer = optimizer_of(given, learning_rate="exact", weight_decay=decay, **options)
    state = optimizer.init(given.params)
    params, _, info = optimizer.update(given.params, state, given.X, given.y)
    assert int(info.attempts) == 1
    reference = dense(*given)
    s = (flat(params) - theta) / info.learning_rate
    damped = reference.ggn + (float(info.damping) + decay) * torch.eye(len(s), dtype=FLOAT64)
    best = -(reference.gradient @ s + decay * theta @ s) / (s @ damped @ s)
    assert error(info.learning_rate, best) < 1e-9


@pytest.mark.parametrize("learning_rate", [1.0, "exact"])
@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("name", ["relu_mlp", "many_points", "poisson"])
def test_exact_momentum_minimises_over_two_vectors(name, decay, learning_rate):
    given = problem(name)
    optimizer = optimizer_of(
        given,
        levenberg_marquardt(),
        scale=None,
        momentum="exact",
        weight_decay=decay,
        learning_rate=learning_rate,
    )
    params, state = given.params, optimizer.init(given.params)
    previous = torch.zeros_like(flat(params))
    for _ in range(4):
        reference, theta = at(given, params), flat(params)
        g, G = reference.gradient, reference.ggn
        params, state, info = optimizer.update(params, state, given.X, given.y)
        if info.attempts > 1:
            previous = flat(params) - theta
            continue
        delta = float(info.damping)
        newton = spring(g, G, theta, 0 * g, Pulls(delta, 0.0, decay))
        both = torch.stack([newton, previous])
        damped = both @ (G + (delta + decay) * torch.eye(len(g), dtype=FLOAT64)) @ both.T
        weights = -torch.linalg.pinv(damped, rtol=1e-13) @ (both @ (g + decay * theta))
        vector = weights @ both
        assert error(flat(params) - theta, vector) < 1e-5
        previous = vector


def test_exact_momentum_and_a_number():
    """The damped quadratic model is that of the number."""
    given = problem("relu_mlp")
    optimizer = optimizer_of(given, 0.3, momentum="exact")
    params, state = given.params, optimizer.init(given.params)
    previous = torch.zeros_like(flat(params))
    for _ in range(3):
        reference, theta = at(given, params), flat(params)
        g, G = reference.gradient, reference.ggn
        params, state, _ = optimizer.update(params, state, given.X, given.y)
        vector = spring(g, G, theta, 0 * g, Pulls(0.3))
        assert error(flat(params) - theta, vector) < 1e-9  # its minimum over all vectors
        previous = vector
    assert previous.norm() > 0
