"""The competitors are what their papers say: identities, dense references, and SciPy's own runs."""

import threading
from functools import partial
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from torch.func import jacrev

from benchmarks import nets
from benchmarks.problem import Problem
from benchmarks.training import competitors, energy_natural_gradient, quasi_newton
from benchmarks.training.competitors import COMPETITORS
from benchmarks.training.installed_packages import is_missing
from benchmarks.training.instances import Instance, functional
from benchmarks.training.quasi_newton import Secant, scaled_bfgs, scaled_broyden, updated
from benchmarks.training.scipy_minimizers import iterations
from benchmarks.training.updates import TRANSFORMS, Finished, first_order, flat, objective, unflat
from benchmarks.training.wolfe import ARMIJO, CURVATURE, Trial, strong_wolfe

FULL_BATCH = {
    "SciPy BFGS": {},
    "SciPy L-BFGS-B": {"maxcor": 20},
    "SSBFGS": {},
    "SSBroyden": {},
    "Adam, SSBroyden": {"lr": 1e-2, "share": 0.5},
    "ENGD": {"rcond": 1e-11, "every": False},
    "ENGD-W": {"damping": 1e-10},
    "torch-LM": {},
}


@pytest.fixture
def small():
    """Return least squares of a tanh net with fewer parameters than samples."""
    torch.manual_seed(0)
    model_fn, params = functional(nets.mlp(2, 4, 1, activation=torch.nn.Tanh).double())
    X = torch.randn(40, 2, dtype=torch.float64)
    y = torch.sin(X.sum(1, keepdim=True))
    return Instance(Problem(model_fn, params, X, y, torch.nn.MSELoss()), None, dict)


def value_of(instance, params):
    _, _, X, y, criterion = instance.problem
    return float(criterion(instance.problem.model_fn(params, X), y).detach())


def losses(instance, method, count, progress=0.0, **settings):
    """Return the losses after each of some updates."""
    update = COMPETITORS[method](instance, **settings)
    X, y = instance.problem.X, instance.problem.y
    return [value_of(instance, update(X, y, progress)[0]) for _ in range(count)]


VALLEYS = {
    "quadratic": lambda t: 3 * (t - 1.7) ** 2,
    "far": lambda t: (t - 300.0) ** 2 / 1e4,
    "near": lambda t: 1e6 * (t - 1e-5) ** 2,
    "quartic": lambda t: (t - 2) ** 4 + 0.1 * t**2,
    "wave": lambda t: 0.02 * t**2 - torch.sin(t),
    "wall": lambda t: -torch.log(1.5 - t) - 3 * t,
    "kink": lambda t: torch.sqrt(1e-6 + (t - 1) ** 2),
}


@pytest.mark.parametrize("first", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("name", VALLEYS)
def test_a_search_ends_where_both_wolfe_conditions_hold(name, first):
    def at(length):
        t = torch.tensor(length, dtype=torch.float64, requires_grad=True)
        value = VALLEYS[name](t)
        (slope,) = torch.autograd.grad(value, t)
        return Trial(length, value.item(), slope.item(), slope)

    start = at(0.0)
    trial = strong_wolfe(at, start, first)
    assert trial.value <= start.value + ARMIJO * trial.length * start.slope
    assert abs(trial.slope) <= CURVATURE * abs(start.slope)
    assert at(trial.length)[:3] == trial[:3]


def test_a_search_uphill_finds_nothing():
    def at(length):
        return Trial(length, length, 1.0, torch.ones(1))

    assert strong_wolfe(at, Trial(0.0, 0.0, -1.0, torch.ones(1)), 1.0) is None


def random_step(size=7, seed=0):
    """Return a positive definite H, a step along −Hg, and a change of gradient that ascends."""
    g = torch.Generator().manual_seed(seed)
    A, C = (torch.randn(size, size, generator=g, dtype=torch.float64) for _ in range(2))
    H = A @ A.T + 0.1 * torch.eye(size, dtype=torch.float64)
    gradient = torch.randn(size, generator=g, dtype=torch.float64)
    length = 0.3
    s = -length * (H @ gradient)
    q = (C @ C.T + 0.1 * torch.eye(size, dtype=torch.float64)) @ s
    return H, s, q, gradient, length


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("rule", [scaled_bfgs, scaled_broyden])
def test_an_update_has_the_secant_and_is_the_inverse_of_broyden_s_family(rule, initial, seed):
    H, s, q, g, length = random_step(seed=seed)
    B, new = torch.linalg.inv(H), H.clone()
    kept = []

    def noted(secant):
        kept.append((secant, rule(secant, initial)))
        return kept[-1][1]

    assert updated(new, s, q, g, length, noted)
    torch.testing.assert_close(new @ q, s)
    torch.testing.assert_close(new, new.T)
    assert torch.linalg.eigvalsh(new).min() > 0

    # B₊ = τ (B − Bs sᵀB / sᵀBs + θ sᵀBs w wᵀ) + q qᵀ / sᵀq, w = q / sᵀq − Bs / sᵀBs.
    ((secant, (phi, tau)),) = kept
    Bs, sBs, sq = B @ s, s @ B @ s, s @ q
    torch.testing.assert_close(float(sBs / sq), secant.b)
    torch.testing.assert_close(float(q @ H @ q / sq), secant.h)
    theta = (1 - phi) / (1 + secant.a * phi)
    w = q / sq - Bs / sBs
    direct = B - torch.outer(Bs, Bs) / sBs + theta * sBs * torch.outer(w, w)
    direct = tau * direct + torch.outer(q, q) / sq
    torch.testing.assert_close(direct @ new, torch.eye(7, dtype=torch.float64))


def test_an_unscaled_update_is_bfgs_as_textbooks_have_it():
    H, s, q, g, length = random_step()
    new = H.clone()
    updated(new, s, q, g, length, lambda secant: quasi_newton.Member(1.0, 1.0))
    rho, one = 1 / (s @ q), torch.eye(7, dtype=torch.float64)
    left = one - rho * torch.outer(s, q)
    torch.testing.assert_close(new, left @ H @ left.T + rho * torch.outer(s, s))


def test_scales_only_ever_divide_by_less_than_one_and_broyden_s_bounds_hold():
    for b in (0.1, 0.9, 1.0, 1.1, 10.0):
        for a in (1e-12, 0.1, 10.0):
            secant = Secant(b, (1 + a) / b, a, 100)
            assert scaled_bfgs(secant, initial=False) == (1.0, min(1.0, 1 / b))
            phi, tau = scaled_broyden(secant, initial=False)
            theta = (1 - phi) / (1 + a * phi)
            c = (a / (1 + a)) ** 0.5
            lowest = min(1.0, secant.h * (1 - c))
            # Al-Baali's interval keeps B₊ positive definite: 1 + aθ > 0.
            assert (lowest - 1) / a - 1e-9 <= theta <= 1 / lowest + 1e-9
            assert 1 + a * theta > 0
            assert 0 < tau <= 1 + 1e-9


def test_a_change_of_gradient_that_descends_is_no_update():
    H, s, q, g, length = random_step()
    new = H.clone()
    assert not updated(new, s, -q, g, length, partial(scaled_broyden, initial=False))
    assert torch.equal(new, H)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_an_objective_is_the_transformed_loss_with_its_gradient(small, transform):
    _, params, X, y, _ = small.problem
    vector = flat(params)
    value, gradient = objective(small.problem, X, y, transform)(vector)
    expected = TRANSFORMS[transform](torch.tensor(value_of(small, params)))
    assert abs(value - float(expected)) < 1e-7
    step = torch.randn(len(vector), generator=torch.Generator().manual_seed(0)).double() * 1e-6
    sides = [objective(small.problem, X, y, transform)(vector + k * step)[0] for k in (1, -1)]
    torch.testing.assert_close(sides[0] - sides[1], float(2 * gradient @ step), rtol=1e-5, atol=0)
    back = unflat(vector, params)
    assert all(torch.equal(back[name], p) for name, p in params.items())


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("method", ["SSBFGS", "SSBroyden"])
def test_self_scaled_methods_lower_the_loss_at_every_step(small, method, transform):
    curve = losses(small, method, 300, transform=transform)
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(curve))
    assert curve[-1] < 1e-4 * value_of(small, small.problem.params)


def test_ssbroyden_solves_a_quadratic_to_the_last_digits_and_then_has_finished():
    g = torch.Generator().manual_seed(1)
    X, y = (torch.randn(30, k, generator=g, dtype=torch.float64) for k in (5, 1))
    start = {"w": torch.zeros(5, 1, dtype=torch.float64)}
    problem = Problem(lambda p, X: X @ p["w"], start, X, y, torch.nn.MSELoss())
    update = COMPETITORS["SSBroyden"](Instance(problem, None, dict))
    for _ in range(1000):
        try:
            params, _ = update(X, y, 0.0)
        except Finished:
            break
    else:
        pytest.fail("it goes on for ever")
    torch.testing.assert_close(params["w"], torch.linalg.lstsq(X, y).solution, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", FULL_BATCH)
def test_a_competitor_lowers_a_full_batch_loss_and_leaves_its_arguments(small, method):
    if is_missing(method):
        pytest.skip("not installed")
    before = {name: p.clone() for name, p in small.problem.params.items()}
    curve = losses(small, method, 60, **FULL_BATCH[method])
    assert curve[-1] < 0.2 * value_of(small, before)
    assert all(torch.equal(p, before[name]) for name, p in small.problem.params.items())
    assert not any(p.requires_grad for p in small.problem.params.values())


def test_soap_lowers_the_loss(small):
    pytest.importorskip("pytorch_optimizer")
    assert losses(small, "SOAP", 60, lr=1e-2)[-1] < value_of(small, small.problem.params) / 2


def test_scipy_s_iterates_are_those_of_scipy(small):
    from scipy.optimize import minimize

    _, params, X, y, _ = small.problem
    evaluate = objective(small.problem, X, y, "none")
    iterates = []
    minimize(
        lambda x: tuple(map(np.asarray, evaluate(torch.from_numpy(x)))),
        flat(params).numpy(),
        jac=True,
        method="L-BFGS-B",
        callback=lambda x: iterates.append(x.copy()),
        options={"maxcor": 7, "maxiter": 5, "ftol": 0, "gtol": 0},
    )
    update = COMPETITORS["SciPy L-BFGS-B"](small, maxcor=7)
    for x in iterates:
        assert np.array_equal(flat(update(X, y, 0.0)[0]).numpy(), x)


def test_iterations_are_made_as_they_are_asked_for_and_end_when_closed():
    made = []

    def minimize(callback):
        for k in range(100):
            made.append(k)
            callback(np.array([k]))

    threads = threading.active_count()
    iterates = iterations(minimize)
    assert [int(x[0]) for x in islice(iterates, 3)] == [0, 1, 2]
    assert made == [0, 1, 2]
    iterates.close()
    assert threading.active_count() == threads
    assert len(list(iterations(minimize))) == 100

    def broken(callback):
        raise ValueError("no loss")

    with pytest.raises(ValueError, match="no loss"):
        next(iterations(broken))


def dense_rows(instance):
    """Return the residuals and their Jacobian at the start, by jacrev of the whole batch."""
    model_fn, params, X, y, _ = instance.problem
    x = flat(params)

    def rows(vector):
        return (model_fn(unflat(vector, params), X) - y).flatten()

    return x, rows, jacrev(rows)(x)


def test_a_step_of_engd_is_the_best_of_its_lengths_along_the_pseudoinverse(small):
    x, rows, J = dense_rows(small)
    d = torch.linalg.pinv(J) @ rows(x)
    candidates = [x - 0.5**k * d for k in range(31)]
    best = min(candidates, key=lambda v: float(rows(v).square().mean()))
    X, y = small.problem.X, small.problem.y
    params, _ = COMPETITORS["ENGD"](small, rcond=1e-15, every=True)(X, y, 0.0)
    torch.testing.assert_close(flat(params), best, rtol=1e-6, atol=1e-8)


def test_a_step_of_engd_w_is_the_damped_dense_solve_and_spring_keeps_the_last(small):
    x, rows, J = dense_rows(small)
    n, delta, momentum = len(J), 1e-3, 0.9
    G, g = J.T @ J / n, J.T @ rows(x) / n
    first = torch.linalg.solve(G + delta * torch.eye(len(G)).double(), g)
    X, y = small.problem.X, small.problem.y
    update = energy_natural_gradient.engd_woodbury(small, damping=delta, momentum=momentum, lr=0.1)
    params, _ = update(X, y, 0.0)
    torch.testing.assert_close(flat(params), x - 0.1 * first)
    # The next minimizes ‖Jd − r‖²/N + λ‖d − μ d₋‖².
    x = flat(params)
    J, r = jacrev(rows)(x), rows(x)
    G, aim = J.T @ J / n, J.T @ r / n + delta * momentum * first
    second = torch.linalg.solve(G + delta * torch.eye(len(G)).double(), aim)
    torch.testing.assert_close(flat(update(X, y, 0.0)[0]), x - 0.1 * second)


def test_adam_hands_over_after_its_share(small, monkeypatch):
    X, y = small.problem.X, small.problem.y
    both = COMPETITORS["Adam, SSBroyden"](small, lr=1e-2, share=0.5)
    single = first_order(torch.optim.Adam)(small, lr=1e-2)
    for _ in range(3):
        expected, params = single(X, y, 0.4)[0], both(X, y, 0.4)[0]
        assert torch.equal(flat(expected), flat(params))
    here = {name: p.detach().clone() for name, p in params.items()}
    problem = small.problem._replace(params=here)
    second = COMPETITORS["SSBroyden"](small._replace(problem=problem))
    for progress in (0.6, 0.4):  # there is no way back
        assert torch.equal(flat(both(X, y, progress)[0]), flat(second(X, y, progress)[0]))
    assert set(FULL_BATCH) <= set(competitors.COMPETITORS)
