"""What holds for every adaptation: where there is nothing to gain, and where no loss is finite."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ddnewton import directional_newton, spring, top_k, trust_region
from ddnewton.damping import constant
from tests.methods import ADAPTATIONS, DTYPES, FLOAT32, FLOAT64, Adaptation
from tests.models import problem
from tests.optim.textbook import (
    Pulls,
    along,
    at,
    error,
    far,
    growth,
    loss_of,
    moved,
    optimizer_of,
    updated,
    walled,
)
from tests.reference import directions, flat

# --- Levenberg and Marquardt ----------------------------------------------------------------


EVERY = ADAPTATIONS | {"zero": Adaptation(lambda: 0.0)}


@DTYPES
@pytest.mark.parametrize("damping", EVERY)
def test_an_exact_fit_stays(damping, dtype):
    given = problem("tanh_mlp", dtype)
    given = given._replace(y=given.model_fn(given.params, given.X))
    for options in ({}, {"momentum": 0.9}, {"momentum": "exact", "learning_rate": "exact"}):
        optimizer = optimizer_of(given, EVERY[damping].make(), **options)
        params, state = given.params, optimizer.init(given.params)
        for _ in range(4):
            params, state, info = optimizer.update(params, state, given.X, given.y)
            assert all(bool(x.isfinite()) for x in (state.damping, info.ratio, info.step_norm))
            assert state.control.isfinite() or EVERY[damping].starts_anew
        assert error(params, given.params) < (1e-5 if dtype == FLOAT32 else 1e-12)


@pytest.mark.parametrize("damping", EVERY)
def test_a_start_at_a_stationary_point_is_no_end(damping):
    """The first batch is fitted exactly; the next is not."""
    X = torch.linspace(1, 2, 6, dtype=FLOAT64)[:, None]
    optimizer = directional_newton(
        lambda p, x: p * x, nn.MSELoss(), EVERY[damping].make(), learning_rate=1.0, momentum=0.0
    )
    params = torch.ones(1, dtype=FLOAT64)
    params, state, _ = optimizer.update(params, optimizer.init(params), X, X)
    for _ in range(40):
        params, state, _ = optimizer.update(params, state, X, 3 * X)
    assert error(params, torch.tensor([3.0])) < 1e-3


# --- steps to no finite loss ----------------------------------------------------------------


@pytest.mark.parametrize("damping", EVERY)
def test_a_step_that_overflows_is_not_taken(damping):
    given = growth()
    optimizer = optimizer_of(given, EVERY[damping].make(), learning_rate=1.0, momentum=0.0)
    if damping == "trust_region":  # whose first steps are no longer than the parameters
        optimizer = optimizer_of(given, trust_region(1e6))
    elif not EVERY[damping].adapts and damping != "zero":
        given = growth(-5.0, 1e9)
    params, state = given.params, optimizer.init(given.params)
    attempts = []
    for _ in range(20):
        params, state, info = optimizer.update(params, state, given.X, given.y)
        attempts.append(int(info.attempts))
        assert bool(info.loss_after.isfinite())
        assert all(bool(x.isfinite()) for x in (state.control, state.damping, info.step_norm))
        assert bool(flat(params).isfinite().all())
    assert max(attempts) > 1


@pytest.mark.parametrize(
    ("damping", "bad", "momentum"),
    [*((damping, 1, 0.9) for damping in EVERY), ("number", 25, 0.0), ("held_out", 25, 0.9)],
)
def test_batches_without_any_finite_step_are_passed_over(damping, bad, momentum):
    X = torch.linspace(1, 2, 6, dtype=FLOAT64)[:, None]
    optimizer = directional_newton(
        walled, nn.MSELoss(), EVERY[damping].make(), learning_rate=1.0, momentum=momentum
    )
    params = torch.ones(1, dtype=FLOAT64)
    state = optimizer.init(params)
    for _ in range(bad):
        new, state, info = optimizer.update(params, state, X + 10, 2 * X)
        assert torch.equal(new, params)
        assert error(info.loss, info.loss_after) < 1e-12
        if not info.accepted:  # a step that is rounded away may be taken
            assert float(info.step_norm) == float(info.predicted_decrease) == 0
            assert not any(bool(leaf.any()) for leaf in tree_leaves(state.previous))
        assert bool(state.control.isfinite()), "nothing brings it back"
    for _ in range(150):
        params, state, info = optimizer.update(params, state, X, 2 * X)
        if error(params, torch.tensor([2.0])) < 1e-2:
            return
    raise AssertionError("nothing is learned any more")


def test_undamped_steps_of_all_the_gradient():
    """Without damping outside, the part outside has no length."""
    given = problem("relu_mlp")
    for damping in (0.0, constant(0.1)):
        _, _, info = updated(given, damping, complement="damping", learning_rate=0.01)
        assert int(info.attempts) == 1
        assert float(info.damping) == 0


def test_a_complement_of_its_own_does_not_stop_what_adapts():
    given = far("relu_mlp", 2.0)
    for adaptation in ADAPTATIONS.values():
        if not adaptation.adapts or not adaptation.whole_batch or adaptation.function is spring:
            continue  # it lets the loss rise where the model does: the next test
        damping = adaptation.make()
        _, _, info = updated(given, damping, select=top_k(1), complement=1e-4, times=3)
        assert bool(info.accepted)


def test_spring_damps_beside_a_complement_of_its_own_until_the_model_is_right():
    """What it asks is no fall of the loss: here the model rises, and the loss as it says."""
    given = far("tanh_mlp", 2.0)
    reference, theta = at(given, given.params), flat(given.params)
    g, G = reference.gradient, reference.ggn
    kept = directions(reference, lambda evals: [len(evals) - 1])
    gamma, none, zero = kept.gammas.mean(0), torch.zeros(1, dtype=FLOAT64), 0 * theta
    for attempts in range(1, 10):
        delta = 1e-3 * float(G.trace()) * 2.0 ** (attempts - 1)
        outside = (g, 1e-4 + delta)
        s = along(kept.vectors, gamma, kept.evals, none, theta, zero, Pulls(delta), outside)
        predicted = -float(g @ s + s @ G @ s / 2)
        fall = float(reference.loss) - loss_of(given, moved(given.params, s))
        if predicted - fall <= abs(predicted) / 2:
            break
    options = {"select": top_k(1), "complement": 1e-4, "learning_rate": 1.0, "momentum": 0.0}
    params, _, info = updated(given, spring(), **options)
    assert (int(info.attempts), bool(info.accepted)) == (attempts, True)
    assert attempts > 1
    assert predicted < 0
    assert error(info.damping, delta) < 1e-9
    assert error(info.predicted_decrease, predicted) < 1e-9
    assert error(flat(params) - theta, s) < 1e-9
