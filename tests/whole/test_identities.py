"""What must hold for every problem, whatever its numbers: identities, checked on random ones."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.func import grad, hessian
from torch.utils._pytree import tree_map

from ddnewton import criteria, newton_step, newton_step_and_info, top_k
from tests.models import Problem
from tests.reference import (
    dense,
    directions,
    error,
    flat,
    logistic_derivatives,
    softmax_derivatives,
)

MANY = settings(max_examples=100)
FEW = settings(max_examples=10)
DAMPINGS = st.floats(1e-3, 10)
FLOAT64 = torch.float64


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=FLOAT64)


# --- losses: ∇ℓ = L z and ∇²ℓ = L diag(h) Lᵀ ------------------------------------------------

LOGITS = st.lists(st.floats(-200, 200), min_size=1, max_size=5)
MILD = st.lists(st.floats(-5, 5), min_size=1, max_size=5)


def first_and_second(expansion):
    """The gradient and the Hessian that an expansion stands for."""
    L, z, h = expansion.basis, expansion.z, expansion.h
    return L @ z, L @ torch.diag(h) @ L.mT


def of_one(loss, f, y):
    """The expansion of a single sample."""
    return criteria.Expansion(*(part[0] for part in loss.expand(f[None], y[None])))


def check_expansion(expansion, loss, f) -> None:
    """Compare with torch's own derivatives; the Hessian's root is S = L √h."""
    gradient, curvature = first_and_second(expansion)
    scale = float(1 + f.abs().max())
    torch.testing.assert_close(expansion.value, loss(f), rtol=1e-13, atol=1e-14 * scale)
    torch.testing.assert_close(gradient, grad(loss)(f), rtol=1e-13, atol=1e-13 * scale)
    truth = hessian(loss)(f).reshape(len(f), len(f))
    torch.testing.assert_close(curvature, truth, rtol=1e-13, atol=1e-13)
    S = expansion.basis * expansion.h.sqrt()
    torch.testing.assert_close(S @ S.mT, truth, rtol=1e-13, atol=1e-13)
    assert (expansion.h >= 0).all()


@MANY
@given(st.lists(st.tuples(st.floats(-200, 200), st.floats(-200, 200)), min_size=1, max_size=5))
def test_squared_error(pairs):
    f, y = tensor(pairs).unbind(1)
    check_expansion(
        of_one(criteria.mse("sum"), f, y), partial(F.mse_loss, target=y, reduction="sum"), f
    )


@MANY
@given(LOGITS, st.data())
def test_cross_entropy_of_classes(logits, data):
    f = tensor(logits)
    y = torch.tensor(data.draw(st.integers(0, len(f) - 1)))
    expansion = of_one(criteria.cross_entropy(), f, y)
    check_expansion(expansion, partial(F.cross_entropy, target=y), f)
    if len(f) > 1:
        assert expansion.basis.shape == (len(f), len(f) - 1)


@MANY
@given(
    st.lists(st.tuples(st.floats(-200, 200), st.floats(0, 1)), min_size=1, max_size=5),
    st.booleans(),
)
def test_cross_entropy_of_probabilities(pairs, normalise):
    """Torch does not require the probabilities to sum to one."""
    f, y = tensor(pairs).unbind(1)
    if normalise:
        assume(y.sum() > 1e-3)
        y /= y.sum()
    check_expansion(of_one(criteria.cross_entropy(), f, y), partial(F.cross_entropy, target=y), f)


@MANY
@given(st.lists(st.tuples(st.floats(-200, 200), st.floats(0, 1)), min_size=1, max_size=5))
def test_binary_cross_entropy(pairs):
    f, y = tensor(pairs).unbind(1)
    loss = partial(F.binary_cross_entropy_with_logits, target=y, reduction="sum")
    check_expansion(of_one(criteria.bce_with_logits("sum"), f, y), loss, f)


@MANY
@given(LOGITS.filter(lambda logits: len(logits) > 1), st.data())
def test_cross_entropy_keeps_every_digit_when_saturated(logits, data):
    """Entry by entry, relative: 1 − p would lose all of them from a logit of 40 on."""
    f, y = tensor(logits), torch.tensor(data.draw(st.integers(0, len(logits) - 1)))
    result = first_and_second(of_one(criteria.cross_entropy(), f, y))
    truth = softmax_derivatives(None, f[None], y[None])
    torch.testing.assert_close(result[0], truth[0][0], rtol=1e-11, atol=1e-190)
    torch.testing.assert_close(result[1], truth[1][0], rtol=1e-11, atol=1e-190)


@MANY
@given(st.floats(-200, 200), st.sampled_from([0.0, 1.0]))
def test_binary_cross_entropy_keeps_every_digit_when_saturated(logit, label):
    f, y = tensor([logit]), tensor([label])
    result = first_and_second(of_one(criteria.bce_with_logits(), f, y))
    truth = logistic_derivatives(None, f[None], y[None])
    torch.testing.assert_close(result[0], truth[0][0], rtol=1e-12, atol=0)
    torch.testing.assert_close(result[1], truth[1][0], rtol=1e-12, atol=0)


@MANY
@given(MILD, st.sampled_from(["mean", "sum"]))
def test_a_callable(outputs, reduction):
    f = tensor(outputs)
    y = 0.3 * f.flip(0) + 0.1

    def pseudo_huber(f, y):
        loss = (1 + (f - y) ** 2).sqrt().sum(-1) + 0.1 * f.logsumexp(-1)
        return loss.mean() if reduction == "mean" else loss.sum()

    loss = criteria.convex(pseudo_huber)
    check_expansion(of_one(loss, f, y), lambda f: pseudo_huber(f[None], y[None]), f)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factory", [criteria.mse, criteria.bce_with_logits])
def test_a_records_reduction_is_torchs(factory, dtype):
    outputs, y = torch.zeros(4, 3, dtype=dtype), torch.ones(4, 3, dtype=dtype)
    assert factory("mean").denominator(outputs, y) == 12
    assert factory("sum").denominator(outputs, y) == 1
    assert factory().denominator(outputs, y) == 12
    assert criteria.cross_entropy("mean").denominator(outputs, y) == 4
    assert criteria.cross_entropy("sum").denominator(outputs, y) == 1


# --- random problems ------------------------------------------------------------------------


def log_cosh(f, y):
    return (f - y).cosh().log().mean()


def mlp(params, X):
    return torch.tanh(X @ params["in"] + params["shift"]) @ params["out"] + params["bias"]


def targets(criterion, N: int, C: int) -> torch.Tensor:
    if isinstance(criterion, torch.nn.CrossEntropyLoss):
        return torch.randint(C, (N,))
    return torch.rand(N, C, dtype=FLOAT64)


@st.composite
def problems(draw, fewest: int = 1) -> Problem:
    """An MLP in float64 with more or fewer parameters than columns, and one of four losses."""
    N = draw(st.integers(fewest, 5))
    P, Q, C = (draw(st.integers(1, most)) for most in (3, 4, 3))
    criterion = draw(st.sampled_from(CRITERIA))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(st.integers(0, 10**6)))
        shapes = {"in": (P, Q), "shift": (Q,), "out": (Q, C), "bias": (C,)}
        params = {name: torch.randn(shape, dtype=FLOAT64) for name, shape in shapes.items()}
        X = torch.randn(N, P, dtype=FLOAT64)
        if draw(st.booleans()):
            X[-1] = X[0]
        return Problem(mlp, params, X, targets(criterion, N, C), criterion)


CRITERIA = [torch.nn.CrossEntropyLoss(), torch.nn.MSELoss(), torch.nn.BCEWithLogitsLoss(), log_cosh]


def summaries(info) -> list[torch.Tensor]:
    """What info says of the samples, free of signs and of rotations among equal eigenvalues.

    With f a function of the eigenvalue: Σ_k f(λ_k) γ_nk γ_n'k and Σ_k f(λ_k) λ_nk.
    """
    weights = [torch.ones_like(info.evals), 1 / (info.evals + 0.1)]
    products = [(info.gammas * w) @ info.gammas.T for w in weights]
    return products + [info.lambdas @ w for w in weights]


def single_directions(problem: Problem, **options) -> torch.Tensor:
    """Unit vectors e_k [D, K], up to sign, where the gradient has a part along e_k.

    Each comes from a step that is damped by infinity along all other directions.
    """
    _, info = newton_step_and_info(*problem, 1.0, **options)
    steps = []
    for k in range(len(info.evals)):

        def only(evals, evecs, gammas, lambdas, k=k):
            return torch.where(torch.arange(len(evals)) == k, tensor(1.0), math.inf)

        steps.append(flat(newton_step(*problem, only, **options)))
    units = [s / s.norm() for s in steps if s.norm() > 1e-9]
    assume(units)
    return torch.stack(units, 1)


@given(problems(), DAMPINGS)
def test_all_directions_solve_the_damped_system(problem, delta):
    """(G + δI) s = −g, as long as the curvature sees the whole gradient."""
    truth = dense(*problem)
    s = flat(newton_step(*problem, delta))
    residual = truth.ggn @ s + delta * s + truth.gradient
    assert residual.norm() <= 1e-11 * (truth.gradient.norm() + 1e-3)


@given(problems())
def test_the_spectrum_is_the_ggns(problem):
    _, info = newton_step_and_info(*problem, 1.0)
    truth = torch.linalg.eigvalsh(dense(*problem).ggn)
    found = torch.zeros_like(truth)
    found[len(truth) - len(info.evals) :] = info.evals
    assert error(found, truth) < 1e-12
    assert (info.evals.diff() >= 0).all()
    assert (info.evals > 0).all()


@given(problems())
def test_mean_curvatures_are_the_eigenvalues(problem):
    _, info = newton_step_and_info(*problem, 1.0)
    assert error(info.lambdas.mean(0), info.evals) < 1e-11
    assert (info.lambdas >= 0).all()


@given(problems())
def test_mean_slopes_are_the_gradient(problem):
    """Σ_k γ_k² = ‖Pg‖², the gradient's part inside the directions."""
    _, info = newton_step_and_info(*problem, 1.0)
    gradient = dense(*problem).gradient
    assert error(info.gradient_norm, gradient.norm()) < 1e-12
    inside = info.gammas.mean(0).square().sum()
    assert abs(inside - info.gradient_share * gradient.square().sum()) < 1e-11 * (inside + 1e-6)
    assert 0 <= info.gradient_share <= 1 + 1e-12


@FEW
@given(problems())
def test_directions_are_orthonormal_eigenvectors(problem):
    """As far as a Gram matrix can tell: its small eigenvectors are right to eps λ_max / λ."""
    E = single_directions(problem)
    G = dense(*problem).ggn
    quotients = torch.einsum("dk,de,ek->k", E, G, E)
    bound = 64 * torch.finfo(torch.float64).eps * quotients.max() / quotients.min()
    assert error(G @ E, quotients * E) < 1e-7
    assert error(E.T @ E, torch.eye(E.shape[1])) < bound


@FEW
@given(problems(), DAMPINGS)
def test_derivatives_belong_to_their_direction(problem, delta):
    """γ_nk = e_kᵀ∇ℓ_n and λ_nk = e_kᵀG_n e_k, with e_k taken from the step along it alone."""
    _, info = newton_step_and_info(*problem, delta, select=top_k(1))
    (s,) = flat(newton_step(*problem, delta, select=top_k(1)))[None]
    g = info.gammas.mean()
    assume(abs(g) > 1e-6)
    e = -s * (info.evals[0] + delta) / g
    truth = dense(*problem)
    change = truth.jacobians @ e
    assert error(e.norm(), torch.tensor(1.0)) < 1e-9
    assert error(info.gammas[:, 0], torch.einsum("nc,nc->n", truth.slopes, change)) < 1e-8
    curvatures = torch.einsum("nc,ncb,nb->n", change, truth.hessians, change)
    assert error(info.lambdas[:, 0], curvatures) < 1e-8


@given(problems(), DAMPINGS, st.integers(1, 3))
def test_a_step_descends(problem, delta, k):
    gradient = dense(*problem).gradient
    for options in ({}, {"select": lambda evals: range(len(evals))[-k:]}, {"complement": 0.3}):
        s = flat(newton_step(*problem, delta, **options))
        assert gradient @ s <= 0


@given(problems(), DAMPINGS)
def test_the_predicted_decrease_is_the_quadratic_models(problem, delta):
    """Σ_k predicted_k = −(gᵀs + ½ sᵀGs) ≥ 0."""
    s, info = newton_step_and_info(*problem, delta)
    s, truth = flat(s), dense(*problem)
    decrease = -(truth.gradient @ s + s @ truth.ggn @ s / 2)
    assert (info.predicted_decrease >= 0).all()
    assert abs(info.predicted_decrease.sum() - decrease) <= 1e-11 * (decrease + 1e-6)


@given(problems(fewest=2), DAMPINGS, st.randoms(use_true_random=False))
def test_permuting_samples_permutes_the_derivatives(problem, delta, random):
    order = list(range(len(problem.X)))
    random.shuffle(order)
    shuffled = problem._replace(X=problem.X[order], y=problem.y[order])
    s, info = newton_step_and_info(*problem, delta)
    s_shuffled, info_shuffled = newton_step_and_info(*shuffled, delta)
    assert error(s_shuffled, s) < 1e-11
    expected = summaries(info)
    expected = [x[order][:, order] if x.ndim == 2 else x[order] for x in expected]
    for found, truth in zip(summaries(info_shuffled), expected, strict=True):
        assert error(found, truth) < 1e-9


@given(problems(), DAMPINGS)
def test_duplicating_the_batch_changes_nothing(problem, delta):
    twice = problem._replace(X=torch.cat([problem.X] * 2), y=torch.cat([problem.y] * 2))
    s, info = newton_step_and_info(*problem, delta)
    s_twice, info_twice = newton_step_and_info(*twice, delta)
    assert error(s_twice, s) < 1e-11
    assert info_twice.rank == info.rank
    assert error(info_twice.evals, info.evals) < 1e-12
    assert error(info_twice.loss, info.loss) < 1e-12


@given(problems(), DAMPINGS, st.floats(1e-3, 1e3))
def test_scaling_the_loss_and_the_damping_leaves_the_step(problem, delta, factor):
    criterion = problem.criterion
    scaled = problem._replace(criterion=lambda f, y: factor * criterion(f, y))
    assert error(newton_step(*scaled, factor * delta), newton_step(*problem, delta)) < 1e-11
    both = {"select": lambda evals: [len(evals) - 1], "complement": factor * 0.2}
    apart = {**both, "complement": 0.2}
    # The callable has one column an output, where cross-entropy has one fewer: same top direction.
    assert (
        error(newton_step(*scaled, factor * delta, **both), newton_step(*problem, delta, **apart))
        < 1e-9
    )


@given(problems().filter(lambda p: isinstance(p.criterion, torch.nn.Module)), DAMPINGS)
def test_a_sum_with_the_damping_of_a_sum_is_the_mean(problem, delta):
    summed = problem._replace(criterion=type(problem.criterion)(reduction="sum"))
    elements = problem.model_fn(problem.params, problem.X).numel()
    classes = isinstance(problem.criterion, torch.nn.CrossEntropyLoss)
    count = len(problem.X) if classes else elements
    s, info = newton_step_and_info(*problem, delta)
    s_summed, info_summed = newton_step_and_info(*summed, count * delta)
    assert error(s_summed, s) < 1e-11
    assert error(info_summed.evals, count * info.evals) < 1e-12
    assert error(info_summed.lambdas, count * info.lambdas) < 1e-7
    assert error(info_summed.loss, count * info.loss) < 1e-12


@given(problems(), st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=4, unique=True))
def test_more_damping_means_a_shorter_step(problem, deltas):
    lengths = [flat(newton_step(*problem, delta)).norm() for delta in sorted(deltas)]
    for longer, shorter in pairwise(lengths):
        assert shorter <= longer * (1 + 1e-12)


@given(problems(), DAMPINGS)
def test_directions_add_up(problem, delta):
    """The step of all directions is the sum of the steps of two halves of them.

    All by rules, which know nothing of directions below the rank tolerance; a number does.
    """

    def part(*parities):
        def rule(evals, evecs, gammas, lambdas):
            kept = torch.isin(torch.arange(len(evals)) % 2, tensor(parities))
            return torch.where(kept, tensor(delta), math.inf)

        return newton_step(*problem, rule)

    assert error(tree_map(torch.add, part(0), part(1)), part(0, 1)) < 1e-12


@given(problems(), DAMPINGS, st.integers(0, 3))
def test_a_damped_complement_completes_the_solve(problem, delta, k):
    """Whatever directions are kept: all of space with damping δ is −(G + δI)⁻¹g for none..all."""
    truth = dense(*problem)
    kept = directions(truth, lambda evals: list(range(len(evals)))[len(evals) - min(k, 1) :])
    inside = kept.vectors @ (kept.vectors.T @ truth.gradient)
    s = flat(
        newton_step(
            *problem,
            delta,
            select=lambda evals: list(range(len(evals)))[len(evals) - min(k, 1) :],
            complement=delta,
        )
    )
    expected = -inside / (kept.evals.sum() + delta) - (truth.gradient - inside) / delta
    assert error(s, expected) < 1e-8


# --- least squares --------------------------------------------------------------------------


@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(0, 10**6),
    st.booleans(),
    st.sampled_from(["mean", "sum"]),
)
def test_undamped_on_a_linear_model_is_least_squares(N, P, C, seed, deficient, reduction):
    """One step lands on the solution; of all solutions, on the nearest."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=FLOAT64)
    U, _, V = torch.linalg.svd(draw(N, P), full_matrices=False)
    X = U * torch.linspace(0.5, 2, min(N, P), dtype=FLOAT64) @ V
    if deficient:
        X = torch.cat([X, X[:, :1]], 1)
    W, Y = draw(X.shape[1], C), draw(N, C)
    s = newton_step(lambda W, X: X @ W, W, X, Y, torch.nn.MSELoss(reduction=reduction), 0.0)
    nearest = torch.linalg.lstsq(X, Y - X @ W, rcond=1e-10, driver="gelsd").solution
    assert error(s, nearest) < 1e-11
    assert error(X.T @ (X @ (W + s) - Y), torch.zeros(X.shape[1], C)) < 1e-10
