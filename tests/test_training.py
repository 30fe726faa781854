"""The optimizer of pure functions, against dense textbook updates."""

import copy
import io
import itertools
import math
from functools import partial
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, settings
from hypothesis import given as drawn
from torch import nn
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ddnewton import (
    Group,
    State,
    directional_newton,
    empirical_fisher,
    fixed,
    ggn_eigh,
    held_out,
    levenberg_marquardt,
    monte_carlo,
    newton_step,
    per_layer,
    prepare,
    top_k,
    trust_region,
)
from ddnewton.damping import constant, relative, signal_to_noise
from ddnewton.optim.adaptation import Curvature, Outcome
from models import Problem, normal, problem
from reference import (
    Dense,
    dense,
    directions,
    flat,
    softmax_derivatives,
    solve,
    solve_in_decimals,
)
from reference import error as distance

FLOAT32, FLOAT64 = torch.float32, torch.float64
DTYPES = pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=["float32", "float64"])

SMALL_AND_LARGE = ["relu_mlp", "tanh_mlp", "more_columns_than_parameters", "many_points"]
"""Problems with fewer and with more columns NM than parameters D, with both kinds of M."""

LOSSLESS = ["tanh_mlp", "many_points", "poisson", "list_of_layers", "tied_autoencoder"]


def error(result, truth) -> float:
    """How far apart pytrees are, of tensors and numbers."""
    as_tensor = partial(torch.as_tensor, dtype=FLOAT64)
    return distance(*(tree_map(as_tensor, tree) for tree in (result, truth)))


# --- the textbook ---------------------------------------------------------------------------


class Pulls(NamedTuple):
    """The damping of all directions, and what it and weight decay pull to."""

    delta: float
    momentum: float = 0.0
    decay: float = 0.0


def moved(params, vector):
    """The parameters after a step, in their own dtypes."""
    leaves, spec = tree_flatten(params)
    parts = vector.split([leaf.numel() for leaf in leaves])
    pairs = zip(leaves, parts, strict=True)
    return tree_unflatten([a + b.reshape(a.shape).to(a.dtype) for a, b in pairs], spec)


def loss_of(given: Problem, params, decay=0.0, samples=slice(None)) -> float:
    X, y = (tree_map(lambda x: x[samples], tree) for tree in (given.X, given.y))
    loss = given.criterion(given.model_fn(params, X), y)
    return float(loss + decay / 2 * flat(params).square().sum())


def at(given: Problem, params) -> Dense:
    return dense(*given._replace(params=params))


def some(reference: Dense, subset) -> Dense:
    if subset is None:
        return reference
    return Dense(reference.loss, *(part[torch.as_tensor(subset)] for part in reference[1:]))


def spring(g, G, theta, previous, pulls: Pulls):
    """argmin gᵀs + ½ sᵀGs + ½ δ‖s − μs'‖² + ½ w‖θ + s‖²."""
    delta, momentum, decay = pulls
    damped = G + (delta + decay) * torch.eye(len(g), dtype=FLOAT64)
    return torch.linalg.solve(damped, -g + delta * momentum * previous - decay * theta)


def along(E, gamma, curvature, more, theta, previous, pulls, outside=None):  # noqa: PLR0917 - a formula's letters
    """The same in the span of orthonormal E, where a rule adds ``more`` to δ.

    Outside it only the pulls are left, and with ``outside`` = (g, δ⊥) the gradient.
    """
    delta, momentum, decay = pulls
    p, t = E.T @ previous, E.T @ theta
    step = torch.zeros_like(theta)
    for k in range(E.shape[1]):
        if more[k] == math.inf:
            step += momentum * p[k] * E[:, k]
            continue
        pull = (delta + more[k]) * momentum * p[k] - decay * t[k]
        step += (pull - gamma[k]) / (curvature[k] + delta + more[k] + decay) * E[:, k]
    P = E @ E.T
    if outside is not None:
        g, delta = outside
        pull = delta * momentum * previous - decay * theta - g
        return step + (pull - P @ pull) / (delta + decay)
    if delta + decay == 0:
        return step + momentum * (previous - P @ previous)
    pull = (delta * momentum * previous - decay * theta) / (delta + decay)
    return step + pull - P @ pull


class Marquardt(NamedTuple):
    """One update of the textbook's loop."""

    params: object
    following: float
    damping: float
    attempts: int
    accepted: bool
    before: float
    after: float
    predicted: float
    vector: torch.Tensor


def marquardt(given, params, delta, pulls, previous=None, start=1e-3):
    """Accept what falls by more than 1e-4 of what is promised; damp by Nielsen's rule."""
    reference, theta = at(given, params), flat(params)
    g, G, decay, momentum = reference.gradient, reference.ggn, pulls.decay, pulls.momentum
    delta = start * float(G.trace()) if delta is None else delta
    previous = torch.zeros_like(theta) if previous is None else previous
    before = loss_of(given, params, decay)
    for attempt in range(13):
        vector = spring(g, G, theta, previous, Pulls(delta, momentum, decay))
        s, used = vector, delta
        new = moved(params, s)
        after = loss_of(given, new, decay)
        slope = float(g @ s + decay * theta @ s)
        predicted = -slope - float(s @ G @ s + decay * s @ s) / 2
        ratio = (before - after) / predicted
        taken = after <= before and ratio > 1e-4
        delta *= max(1 / 3, 1 - (2 * ratio - 1) ** 3) if taken else 2.0 ** (attempt + 1)
        if taken:
            break
        momentum = 0.0
    return Marquardt(
        params=new if taken else params,
        following=delta,
        damping=used,
        attempts=attempt + 1,
        accepted=taken,
        before=before,
        after=after,
        predicted=predicted,
        vector=vector if taken else torch.zeros_like(vector),
    )


# --- the problems ---------------------------------------------------------------------------


def optimizer_of(given: Problem, *args, **options):
    return directional_newton(given.model_fn, given.criterion, *args, **options)


def updated(given: Problem, *args, times=1, **options):
    """The parameters, the state and the record after some updates."""
    optimizer = optimizer_of(given, *args, **options)
    params, state, info = given.params, optimizer.init(given.params), None
    for _ in range(times):
        params, state, info = optimizer.update(params, state, given.X, given.y)
    return params, state, info


def far(name: str, times: float = 3.0, dtype=FLOAT64, seed: int = 0) -> Problem:
    """A problem whose start is far from where the quadratic model holds."""
    given = problem(name, dtype, seed)
    return given._replace(params=tree_map(lambda x: times * x, given.params))


def step_of(given: Problem, *args, **options):
    """The first step, in one vector."""
    params, _, info = updated(given, *args, **options)
    assert bool(info.accepted)
    return flat(params) - flat(given.params)


def teacher(seed: int = 0, samples: int = 30) -> Problem:
    """A net that another one of its kind has made the targets of."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        X = normal(samples, 2).double()

        def model_fn(p, X):
            return torch.tanh(X @ p["in"] + p["shift"]) @ p["out"]

        def draw():
            shapes = {"in": (2, 3), "shift": (3,), "out": (3, 1)}
            return {name: normal(*shape).double() for name, shape in shapes.items()}

        truth, params = draw(), draw()
        params = tree_map(lambda a, b: a + 0.3 * b, truth, params)
        return Problem(model_fn, params, X, model_fn(truth, X), nn.MSELoss())


def growth(rate: float = -5.0, target: float = 1e3) -> Problem:
    """A net whose undamped step overflows."""
    X = torch.linspace(1, 2, 6, dtype=FLOAT64)[:, None]
    params = {"rate": torch.tensor([rate], dtype=FLOAT64)}
    return Problem(lambda p, x: torch.exp(p["rate"] * x), params, X, target * X, nn.MSELoss())


def walled(p, x):
    """Finite at p = 1, and elsewhere where x is small."""
    return p * x + torch.where((p != 1) & (x > 10), torch.inf, 0.0)


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


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "bce", "custom"])
def test_every_loss_and_reduction(loss, reduction):
    given = problem("relu_mlp")
    targets = torch.linspace(0, 1, 15, dtype=FLOAT64).reshape(5, 3)

    def custom(f, y):
        each = ((f - y) ** 4).sum(1) + f.logsumexp(1)
        return each.mean() if reduction == "mean" else each.sum()

    criterion, y = {
        "mse": (nn.MSELoss(reduction=reduction), targets),
        "cross_entropy": (partial(F.cross_entropy, reduction=reduction), given.y),
        "bce": (nn.BCEWithLogitsLoss(reduction=reduction), targets),
        "custom": (custom, targets),
    }[loss]
    given = given._replace(criterion=criterion, y=y)
    reference, theta = dense(*given), flat(given.params)
    params, _, info = updated(given, 0.3, weight_decay=0.05)
    g, G, zero = reference.gradient, reference.ggn, torch.zeros_like(theta)
    assert error(flat(params) - theta, spring(g, G, theta, zero, Pulls(0.3, 0.0, 0.05))) < 1e-11
    assert error(info.loss, loss_of(given, given.params, 0.05)) < 1e-12
    assert error(info.loss_after, loss_of(given, params, 0.05)) < 1e-12


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


RULES = {
    "constant": constant(0.2),
    "relative": relative(0.1),
    "noise": signal_to_noise(),
    "large": lambda evals, *_: torch.full_like(evals, 1e12),
    "skip": lambda evals, *_: torch.full_like(evals, torch.inf),
    "skip some": lambda evals, *_: torch.where(evals > evals.mean(), 0.1, torch.inf),
}


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
    damping = fixed(RULES[rule])
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
    more = RULES[rule](kept.evals, None, kept.gammas, kept.lambdas)
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
    "number": (0.3, {}),
    "rule": (constant(0.3), {}),
    "noise": (signal_to_noise(), {}),
    "skip some": (RULES["skip some"], {}),
    "marquardt": (levenberg_marquardt(), {}),
    "trust region": (trust_region(), {}),
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


# --- which directions, which samples --------------------------------------------------------


@pytest.mark.parametrize("complement", [None, "damping", 0.7])
@pytest.mark.parametrize("pulls", [(0.0, 0.0), (0.8, 0.0), (0.0, 0.05), (0.8, 0.05)], ids=str)
@pytest.mark.parametrize("name", ["relu_mlp", "many_points"])
def test_selected_directions_and_what_is_outside(name, pulls, complement):
    given, theta = problem(name), flat(problem(name).params)
    options = {"momentum": pulls[0], "weight_decay": pulls[1], "learning_rate": 0.1}
    optimizer = optimizer_of(given, 0.3, select=top_k(2), complement=complement, **options)
    params, state = given.params, optimizer.init(given.params)
    previous = torch.zeros_like(theta)
    for _ in range(3):
        reference, theta = at(given, params), flat(params)
        kept = directions(reference, lambda evals: range(len(evals) - 2, len(evals)))
        outside = (reference.gradient, 0.3 if complement == "damping" else complement)
        vector = along(
            kept.vectors,
            kept.gammas.mean(0),
            kept.evals,
            torch.zeros(2, dtype=FLOAT64),
            theta,
            previous,
            Pulls(0.3, *pulls),
            None if complement is None else outside,
        )
        params, state, info = optimizer.update(params, state, given.X, given.y)
        assert error(flat(params) - theta, 0.1 * vector) < 1e-9
        previous = vector
        share = kept.gammas.mean(0).square().sum() / reference.gradient.square().sum()
        assert info.gradient_share.isnan() or error(info.gradient_share, share) < 1e-9


@pytest.mark.parametrize("pulls", [(0.0, 0.0), (0.8, 0.05)], ids=str)
@pytest.mark.parametrize("damping", ["number", "marquardt"])
def test_groups_are_blocks_with_dampings_of_their_own(damping, pulls):
    given = problem("tanh_mlp")
    momentum, decay = pulls
    groups = [Group("in", damping=0.4), Group(["out", "scale"])]
    sizes = [leaf.numel() for leaf in tree_leaves(given.params)]
    owners = [0, 0, 1, 1, 1, None]  # "unused" is in none
    owner = [o for o, size in zip(owners, sizes, strict=True) for _ in range(size)]
    own = 0.1 if damping == "number" else levenberg_marquardt(rule=0.1)
    options = {"momentum": momentum, "weight_decay": decay, "learning_rate": 0.3}
    optimizer = optimizer_of(given, own, groups=groups, **options)
    params, state = given.params, optimizer.init(given.params)
    previous = torch.zeros(sum(sizes), dtype=FLOAT64)
    for _ in range(3):
        reference, theta = at(given, params), flat(params)
        params, state, info = optimizer.update(params, state, given.X, given.y)
        delta = float(info.damping) - 0.1
        vector = torch.zeros_like(theta)
        for block, mine in ((0, 0.4), (1, 0.1)):
            i = torch.tensor([d for d, o in enumerate(owner) if o == block])
            g, G = reference.gradient[i], reference.ggn[i][:, i]
            pull = Pulls(mine + delta, momentum, decay)
            vector[i] = spring(g, G, theta[i], previous[i], pull)
        assert bool(info.accepted)
        assert int(info.attempts) == 1
        assert error(flat(params) - theta, 0.3 * vector) < 1e-9
        s = 0.3 * vector
        slope = reference.gradient @ s + decay * theta @ s
        predicted = -slope - (s @ reference.ggn @ s + decay * s @ s) / 2
        assert abs(info.predicted_decrease - predicted) < 1e-9 * slope.abs()
        previous = vector


def test_the_share_and_the_rank_of_groups():
    given = problem("relu_mlp")
    groups = [Group("0", select=top_k(1)), Group("2", select=top_k(2))]
    _, _, info = updated(given, 0.1, groups=groups, learning_rate=0.1)
    reference = dense(*given)
    inside, square, rank = 0, 0, 0
    for i, k in ((slice(0, 30), 1), (slice(30, None), 2)):
        block = reference._replace(jacobians=reference.jacobians[:, :, i])
        kept = directions(block, lambda evals, k=k: range(len(evals) - k, len(evals)))
        rank += len(directions(block).evals)
        inside += kept.gammas.mean(0).square().sum()
        square += block.gradient.square().sum()
    assert error(info.rank, torch.tensor(rank)) == 0
    assert error(info.gradient_share, inside / square) < 1e-9


CHOICES = {
    "gradient": ({"subsampling_grad": [1, 3]}, [1, 3], None),
    "curvature": ({"subsampling_ggn": [0, 2, 1]}, None, [0, 2, 1]),
    "both": ({"subsampling_grad": [4, 0], "subsampling_ggn": [2, 3, 0]}, [4, 0], [2, 3, 0]),
    "the same": ({"subsampling_grad": [4, 0], "subsampling_ggn": [4, 0]}, [4, 0], [4, 0]),
}


@pytest.mark.parametrize("pulls", [(0.0, 0.0), (0.8, 0.05)], ids=str)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", ["relu_mlp", "many_points"])
def test_all_of_the_gradient_under_sub_sampling(name, choice, pulls):
    given = problem(name)
    options, mine, curved = CHOICES[choice]
    momentum, decay = pulls
    keywords = {"momentum": momentum, "weight_decay": decay, "learning_rate": 0.1} | options
    optimizer = optimizer_of(given, 0.3, complement="damping", **keywords)
    params, state = given.params, optimizer.init(given.params)
    previous = torch.zeros_like(flat(params))
    for _ in range(3):
        reference, theta = at(given, params), flat(params)
        g, G = some(reference, mine).gradient, some(reference, curved).ggn
        vector = spring(g, G, theta, previous, Pulls(0.3, momentum, decay))
        before = loss_of(given, params, decay, slice(None) if mine is None else mine)
        params, state, info = optimizer.update(params, state, given.X, given.y)
        after = loss_of(given, params, decay, slice(None) if mine is None else mine)
        assert error(flat(params) - theta, 0.1 * vector) < 1e-9
        s = 0.1 * vector
        slope = g @ s + decay * theta @ s
        predicted = -slope - (s @ G @ s + decay * s @ s) / 2
        assert abs(info.predicted_decrease - predicted) < 1e-9 * slope.abs()
        assert error(info.loss, before) < 1e-12
        assert error(info.loss_after, after) < 1e-12
        assert error(info.gradient_norm, g.norm()) < 1e-12
        previous = vector


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("name", ["relu_mlp", "many_points"])
def test_curvature_along_directions_of_other_samples(name, momentum):
    given = problem(name)
    samples = {"subsampling_ggn": [0, 2, 1], "subsampling_curvature": [3, 1, 4]}
    optimizer = optimizer_of(given, 0.3, momentum=momentum, learning_rate=0.1, **samples)
    params, state = given.params, optimizer.init(given.params)
    previous = torch.zeros_like(flat(params))
    for _ in range(2):
        reference, theta = at(given, params), flat(params)
        E = directions(some(reference, [0, 2, 1])).vectors
        curvature = torch.einsum("dk,de,ek->k", E, some(reference, [3, 1, 4]).ggn, E)
        more, gamma = torch.zeros(E.shape[1], dtype=FLOAT64), E.T @ reference.gradient
        vector = along(E, gamma, curvature, more, theta, previous, Pulls(0.3, momentum))
        params, state, _ = optimizer.update(params, state, given.X, given.y)
        assert error(flat(params) - theta, 0.1 * vector) < 1e-8
        previous = vector


def drawn_curvature(given: Problem, params, criterion) -> torch.Tensor:
    """The curvature of drawn targets, which only the library knows."""
    evals, evecs = ggn_eigh(given.model_fn, params, given.X, given.y, criterion)
    E = torch.cat([leaf.reshape(len(evals), -1) for leaf in tree_leaves(evecs)], 1)
    return E.T @ (evals[:, None] * E)


@pytest.mark.parametrize("delta", [0.3, 1e-5])
@pytest.mark.parametrize("name", ["relu_mlp", "more_columns_than_parameters", "many_points"])
def test_all_of_the_gradient_with_drawn_targets(name, delta):
    given = problem(name)
    mine, other = (torch.Generator().manual_seed(3) for _ in range(2))
    drawn_given = given._replace(criterion=monte_carlo(given.criterion, 2, mine))
    options = {"momentum": 0.5, "weight_decay": 0.01, "learning_rate": 0.01}
    optimizer = optimizer_of(drawn_given, delta, complement="damping", **options)
    params, state = given.params, optimizer.init(given.params)
    previous = torch.zeros_like(flat(params))
    for _ in range(3):
        G = drawn_curvature(given, params, monte_carlo(given.criterion, 2, other))
        theta, g = flat(params), at(given, params).gradient
        vector = spring(g, G, theta, previous, Pulls(delta, 0.5, 0.01))
        params, state, _ = optimizer.update(params, state, given.X, given.y)
        assert error(flat(params) - theta, 0.01 * vector) < 1e-8
        previous = vector


@pytest.mark.parametrize("name", ["relu_mlp", "many_points"])
def test_the_empirical_fisher_matrix(name):
    given = problem(name)
    fisher = given._replace(criterion=empirical_fisher(given.criterion))
    reference, theta = dense(*given), flat(given.params)
    rows = reference.gradients
    zero = torch.zeros_like(theta)
    # Of a mean over samples alone; where torch averages over outputs too there is one output.
    G = rows.T @ rows / len(rows)
    for options in ({}, {"complement": "damping"}):
        vector = spring(reference.gradient, G, theta, zero, Pulls(0.3))
        assert error(step_of(fisher, 0.3, **options), vector) < 1e-10


# --- Cholesky's factorization ---------------------------------------------------------------


@pytest.mark.parametrize("delta", [1.0, 1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("name", ["relu_mlp", "more_columns_than_parameters", "many_points"])
def test_a_step_with_one_damping_everywhere(name, delta):
    """Relative to ``delta``'s own conditioning, whichever way it goes."""
    given, reference = problem(name), dense(*problem(name))
    scale = 1e-11 * max(1.0, float(reference.ggn.trace()) / delta) ** 0.5
    assert error(newton_step(*given, delta, complement=delta), solve(reference, delta)) < scale
    identity = torch.eye(len(reference.gradient), dtype=FLOAT64)
    for options, mine, curved in CHOICES.values():
        g, G = some(reference, mine).gradient, some(reference, curved).ggn
        expected = -torch.linalg.solve(G + delta * identity, g)
        found = newton_step(*given, delta, complement=delta, **options)
        assert error(found, expected) < 1e-13 * max(1e3, float(G.trace()) / delta)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    one, two = (monte_carlo(given.criterion, 1, generator) for generator in generators)
    G = drawn_curvature(given, given.params, one)
    found = newton_step(*given._replace(criterion=two), delta, complement=delta)
    expected = -torch.linalg.solve(G + delta * identity, reference.gradient)
    assert error(found, expected) < 1e-12 * max(1e3, float(G.trace()) / delta)


@pytest.mark.parametrize("delta", [1.0, 1e-3, 1e-8])
@pytest.mark.parametrize("times", [30.0, 1000.0])
@pytest.mark.parametrize("name", ["relu_mlp", "one_tensor", "more_columns_than_parameters"])
def test_a_step_of_a_net_that_is_certain(name, times, delta):
    """Curvatures that underflow leave slopes of one."""
    given = far(name, times**0.5 if name != "one_tensor" else times)
    reference = dense(*given, softmax_derivatives)
    D = len(reference.gradient)
    exact = solve_in_decimals(reference, delta) if D < 20 else solve(reference, delta)
    found = newton_step(*given, delta, complement=delta)
    assert error(found, exact) < 1e-9 / min(1, delta) ** 0.5
    params, _, info = updated(given, delta, complement="damping", learning_rate=1e-3 * delta)
    if info.attempts == 1:
        got = (flat(params) - flat(given.params)) / (1e-3 * delta)
        assert error(got, exact) < 1e-6 / min(1, delta) ** 0.5


# --- Levenberg and Marquardt ----------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.01}, {"momentum": 0.7}], ids=str)
@pytest.mark.parametrize(
    ("name", "times"), [("tanh_mlp", 8.0), ("many_points", 6.0), ("poisson", 3.0), ("growth", 1.0)]
)
def test_the_textbook_loop(name, times, options):
    given = growth(-1.0, 5.0) if name == "growth" else far(name, times)
    optimizer = optimizer_of(given, levenberg_marquardt(1e-4), **options)
    params, state = given.params, optimizer.init(given.params)
    pulls = Pulls(0.0, options.get("momentum", 0.0), options.get("weight_decay", 0.0))
    delta, previous, attempts = None, None, []
    for _ in range(10):
        expected = marquardt(given, params, delta, pulls, previous, start=1e-4)
        params, state, info = optimizer.update(params, state, given.X, given.y)
        assert int(info.attempts) == expected.attempts
        assert bool(info.accepted) == expected.accepted
        assert error(params, expected.params) < 1e-6
        assert error(info.damping, expected.damping) < 1e-4
        assert error(state.control, expected.following) < 1e-4
        assert error(info.loss, expected.before) < 1e-9
        if expected.accepted:
            assert error(info.loss_after, expected.after) < 1e-5
        params = expected.params
        delta, previous = float(state.control), expected.vector
        attempts.append(expected.attempts)
        if expected.before - expected.after < 1e-9 * expected.before:
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
    given = teacher()
    optimizer = optimizer_of(given, damping)
    params, state = given.params, optimizer.init(given.params)
    losses = []
    for _ in range(80):
        params, state, info = optimizer.update(params, state, given.X, given.y)
        losses.append(float(info.loss_after))
    assert losses[60] < 1e-25
    assert all(a >= b for a, b in itertools.pairwise(losses))
    assert all(bool(x.isfinite()) for x in (*state[:3], info.ratio, info.step_norm))


EVERY = {
    "number": 0.1,
    "zero": 0.0,
    "rule": constant(0.1),
    "marquardt": levenberg_marquardt(),
    "trust region": trust_region(),
    "held out": held_out(every=2),
}


@DTYPES
@pytest.mark.parametrize("damping", EVERY)
def test_an_exact_fit_stays(damping, dtype):
    given = problem("tanh_mlp", dtype)
    given = given._replace(y=given.model_fn(given.params, given.X))
    for options in ({}, {"momentum": 0.9}, {"momentum": "exact", "learning_rate": "exact"}):
        optimizer = optimizer_of(given, EVERY[damping], **options)
        params, state = given.params, optimizer.init(given.params)
        for _ in range(4):
            params, state, info = optimizer.update(params, state, given.X, given.y)
            assert all(bool(x.isfinite()) for x in (state.damping, info.ratio, info.step_norm))
            assert state.control.isfinite() or damping == "trust region"  # which starts anew
        assert error(params, given.params) < (1e-5 if dtype == FLOAT32 else 1e-12)


@pytest.mark.parametrize("damping", EVERY)
def test_a_start_at_a_stationary_point_is_no_end(damping):
    """The first batch is fitted exactly; the next is not."""
    X = torch.linspace(1, 2, 6, dtype=FLOAT64)[:, None]
    optimizer = directional_newton(
        lambda p, x: p * x, nn.MSELoss(), EVERY[damping], learning_rate=1.0, momentum=0.0
    )
    params = torch.ones(1, dtype=FLOAT64)
    params, state, _ = optimizer.update(params, optimizer.init(params), X, X)
    for _ in range(40):
        params, state, _ = optimizer.update(params, state, X, 3 * X)
    assert error(params, torch.tensor([3.0])) < 1e-3


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


# --- the longest step -----------------------------------------------------------------------


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


def test_a_trusted_radius_follows_how_well_the_model_does():
    given = far("many_points", 5.0)
    optimizer = optimizer_of(given, trust_region())
    params, state = given.params, optimizer.init(given.params)
    radius, seen = None, set()
    for _ in range(15):
        reference = at(given, params)
        g, G = reference.gradient, reference.ggn
        if radius is None:
            radius = float(solve(reference, 1e-3 * float(G.trace())).norm())
        old = params
        params, state, info = optimizer.update(params, state, given.X, given.y)
        if info.attempts == 1:
            length, ratio = float(info.step_norm), float(info.ratio)
            assert length <= radius * (1 + 1e-9)
            if sorensen(g, G, radius) > 1e-12 * float(G.trace()):
                assert length > 0.9 * radius * (1 - 1e-9)
            expected = radius
            if ratio > 0.75 and length >= 0.9 * radius:
                expected = 2 * radius
            if ratio < 0.25:
                expected = min(length, radius) / 4
            assert error(state.control, expected) < 1e-9
            seen.add(round(expected / radius, 3))
            vector = solve(reference, float(info.damping))
            assert error(flat(params) - flat(old), vector) < 1e-5
        else:
            assert float(info.step_norm) <= radius / 4
        radius = float(state.control)
    assert len(seen) > 1


RADIUS = {
    "number": (0.01, {}),
    "rule": (relative(1e-3), {}),
    "skip some": (RULES["skip some"], {}),
    "marquardt": (levenberg_marquardt(), {}),
    "trust region": (trust_region(), {}),
    "held out": (held_out(every=2), {}),
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
    optimizer = optimizer_of(given, damping, trust_radius=0.05, **options)
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
        optimizer = optimizer_of(given, trust_region(1e-6), **options)
        params, state = given.params, optimizer.init(given.params)
        for _ in range(12):
            radius = float(state.control)
            params, state, info = optimizer.update(params, state, given.X, given.y)
            if not math.isnan(radius):
                assert float(info.step_norm) <= radius * (1 + 1e-9)


# --- held-out samples -----------------------------------------------------------------------


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
        curvature=Curvature(one, one),
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


# --- how much of a step, and of the one before ----------------------------------------------


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
        given, momentum="exact", weight_decay=decay, learning_rate=learning_rate
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


# --- steps to no finite loss ----------------------------------------------------------------


@pytest.mark.parametrize("damping", EVERY)
def test_a_step_that_overflows_is_not_taken(damping):
    given = growth()
    optimizer = optimizer_of(given, EVERY[damping], learning_rate=1.0, momentum=0.0)
    if damping in ("number", "rule"):
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
    [*((damping, 1, 0.9) for damping in EVERY), ("number", 25, 0.0), ("held out", 25, 0.9)],
)
def test_batches_without_any_finite_step_are_passed_over(damping, bad, momentum):
    X = torch.linspace(1, 2, 6, dtype=FLOAT64)[:, None]
    optimizer = directional_newton(
        walled, nn.MSELoss(), EVERY[damping], learning_rate=1.0, momentum=momentum
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
    for damping in (levenberg_marquardt(), trust_region()):
        _, _, info = updated(given, damping, select=top_k(1), complement=1e-4, times=3)
        assert bool(info.accepted)


# --- the state ------------------------------------------------------------------------------

STATES = {
    "marquardt": (None, {}),
    "trust region": (trust_region(), {"weight_decay": 0.01}),
    "number": (0.1, {"momentum": 0.8}),
    "rule": (signal_to_noise(), {"learning_rate": 0.1}),
    "held out": (held_out(every=2), {}),
    "exact": (levenberg_marquardt(), {"momentum": "exact", "learning_rate": "exact"}),
}


@pytest.mark.parametrize("case", STATES)
@pytest.mark.parametrize("name", ["tanh_mlp", "one_tensor", "tied_autoencoder"])
def test_a_state_is_saved_and_loaded(name, case):
    given = far(name, 2.0)
    damping, options = STATES[case]
    optimizer = optimizer_of(given, damping, **options)
    params, state = given.params, optimizer.init(given.params)
    for _ in range(2):
        params, state, _ = optimizer.update(params, state, given.X, given.y)
    assert isinstance(state, State)
    assert all(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(state))
    buffer = io.BytesIO()
    torch.save((params, state), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    buffer.seek(0)
    known = [State, type(params)] if isinstance(params, tuple) else [State]
    with torch.serialization.safe_globals(known):
        safely = torch.load(buffer, weights_only=True)
    other = optimizer_of(given, damping, **options)
    for _ in range(2):
        params, state, info = optimizer.update(params, state, given.X, given.y)
        *loaded, again = other.update(*loaded, given.X, given.y)
        *safely, _ = other.update(*safely, given.X, given.y)
    for tree in ((*loaded, again), (*safely, again)):
        for a, b in zip(tree_leaves((params, state, info)), tree_leaves(tree), strict=True):
            assert torch.equal(a.nan_to_num(nan=-1.0), b.nan_to_num(nan=-1.0))


@pytest.mark.parametrize("case", STATES)
@pytest.mark.parametrize("name", ["tanh_mlp", "many_points"])
def test_an_ensemble_is_a_loop(name, case):
    given = problem(name)
    members = [far(name, times, seed=seed).params for seed, times in enumerate((1.0, 5.0, 3.0))]
    damping, options = STATES[case]
    optimizer = optimizer_of(given, damping, **options)
    together = tree_map(lambda *leaves: torch.stack(leaves), *members)
    states = vmap(optimizer.init)(together)
    apart = [optimizer.init(params) for params in members]
    attempts = set()
    for _ in range(4):
        together, states, info = vmap(
            lambda p, s: optimizer.update(p, s, given.X, given.y), randomness="error"
        )(together, states)
        for i in range(3):
            members[i], apart[i], one = optimizer.update(members[i], apart[i], given.X, given.y)
            for a, b in ((together, members[i]), (states, apart[i]), (info, one)):
                # The rank and the share are known where there are eigenpairs.
                pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
                for mine, expected in pairs:
                    if bool(expected.isfinite().all()):
                        assert error(mine[i], expected) < 1e-4, (i, type(a))
            assert int(info.attempts[i]) == int(one.attempts)
            attempts.add(int(one.attempts))
    if case == "marquardt" and name == "tanh_mlp":
        assert len(attempts) > 1


def test_an_ensemble_of_batches():
    given = problem("many_points")
    optimizer = optimizer_of(given)
    members = [problem("many_points", seed=seed) for seed in range(3)]
    stack = partial(tree_map, lambda *leaves: torch.stack(leaves))
    params, X, y = (stack(*(m[i] for m in members)) for i in (1, 2, 3))
    found, _, _ = vmap(optimizer.update)(params, vmap(optimizer.init)(params), X, y)
    for i, member in enumerate(members):
        expected, *_ = updated(member)
        assert error(tree_map(lambda leaf, i=i: leaf[i], found), expected) < 1e-8


@DTYPES
@pytest.mark.parametrize("case", STATES)
@pytest.mark.parametrize("name", ["tanh_mlp", "one_tensor"])
def test_nothing_that_is_passed_changes(name, case, dtype):
    given = problem(name, dtype)
    for leaf in tree_leaves(given.params):
        leaf.requires_grad_()
    damping, options = STATES[case]
    optimizer = optimizer_of(given, damping, **options)
    state = optimizer.init(given.params)
    params, state, _ = optimizer.update(given.params, state, given.X, given.y)
    arguments = (params, state, given.X, given.y)
    before = copy.deepcopy(arguments)
    one = optimizer.update(*arguments)
    two = optimizer.update(*arguments)
    pairs = zip(tree_leaves(before), tree_leaves(arguments), strict=True)
    assert all(torch.equal(a.nan_to_num(nan=-1.0), b.nan_to_num(nan=-1.0)) for a, b in pairs)
    for a, b in zip(tree_leaves(one), tree_leaves(two), strict=True):
        assert torch.equal(a.nan_to_num(nan=-1.0), b.nan_to_num(nan=-1.0))
        assert not a.requires_grad
    assert all(leaf.grad is None for leaf in tree_leaves(given.params))
    assert tree_flatten(one[0])[1] == tree_flatten(given.params)[1]
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            again = optimizer.update(*arguments)
        assert error(again[0], one[0]) < 1e-6
    if options.get("momentum") or case == "held out":
        for leaf, like in zip(tree_leaves(one[1].previous), tree_leaves(given.params), strict=True):
            assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)
    else:
        assert one[1].previous == ()


# --- chunks and prepared models -------------------------------------------------------------

OPTIONS = {
    "momentum": (0.1, {"momentum": 0.8}),
    "marquardt": (None, {}),
    "weight decay": (levenberg_marquardt(), {"weight_decay": 0.05}),
    "trust region": (trust_region(), {}),
    "held out": (held_out(every=2), {}),
    "select": (0.1, {"select": top_k(2), "complement": "damping", "momentum": 0.5}),
    "half": (0.1, {"subsampling_ggn": [0, 3], "complement": "damping", "weight_decay": 0.1}),
}


@pytest.mark.parametrize(
    ("name", "case"),
    [*itertools.product(("relu_mlp", "many_points"), OPTIONS), ("attention", "momentum")],
)
def test_chunks_and_prepared_models_change_nothing(name, case):
    given = problem(name)
    damping, options = OPTIONS[case]
    expected, *_ = updated(given, damping, gram="dense", times=2, **options)
    prepared = given._replace(model_fn=prepare(*given[:3]))
    size = 9 if name == "many_points" else 2
    for chunk_size in (None, size):
        found, *_ = updated(prepared, damping, chunk_size=chunk_size, times=2, **options)
        assert error(found, expected) < 1e-7
    found, *_ = updated(given, damping, gram="dense", chunk_size=size, times=2, **options)
    assert error(found, expected) < 1e-10


# --- refusals -------------------------------------------------------------------------------

REFUSED = {
    "damping below zero": ({"damping": -1.0}, ValueError, "damping must be a number ≥ 0; got -1.0"),
    "damping nan": ({"damping": math.nan}, ValueError, "damping must be a number ≥ 0; got nan"),
    "damping a word": ({"damping": "x"}, TypeError, "damping must be a number ≥ 0; got 'x'"),
    "a maker": ({"damping": held_out}, TypeError, r"damping must be .* call it: held_out\(…\)"),
    "learning_rate zero": (
        {"learning_rate": 0.0},
        ValueError,
        "learning_rate must be positive; got 0.0",
    ),
    "learning_rate below": ({"learning_rate": -0.1}, ValueError, "learning_rate must be a number"),
    "learning_rate true": ({"learning_rate": True}, TypeError, "learning_rate must be a number"),
    "learning_rate a word": (
        {"learning_rate": "best"},
        ValueError,
        "learning_rate must be a number, a function or \"exact\"; got 'best'",
    ),
    "momentum one": ({"momentum": 1.0}, ValueError, "momentum must be below 1; got 1.0"),
    "momentum below": ({"momentum": -0.1}, ValueError, "momentum must be a number ≥ 0; got -0.1"),
    "momentum a word": (
        {"momentum": "best"},
        ValueError,
        "momentum must be a number from 0 to below 1, or \"exact\"; got 'best'",
    ),
    "momentum a list": ({"momentum": [0.9]}, TypeError, "momentum must be a number ≥ 0"),
    "weight_decay": ({"weight_decay": -1.0}, ValueError, "weight_decay must be a number ≥ 0"),
    "weight_decay none": ({"weight_decay": None}, TypeError, "weight_decay must be a number ≥ 0"),
    "trust_radius": ({"trust_radius": 0.0}, ValueError, "trust_radius must be positive; got 0.0"),
    "trust_radius a word": ({"trust_radius": "1"}, TypeError, "trust_radius must be a number"),
    "complement a word": (
        {"complement": "all"},
        ValueError,
        "complement must be a positive number, \"damping\" or None; got 'all'",
    ),
    "complement zero": ({"complement": 0.0}, ValueError, "complement must be positive; got 0.0"),
    "select": ({"select": 3}, TypeError, "select must be a function or None; got 3"),
    "gram": ({"gram": "fast"}, ValueError, "gram must be one of .*; got 'fast'"),
    "chunk_size": ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1; got 0"),
    "chunk_size 1.5": ({"chunk_size": 1.5}, TypeError, "chunk_size must be an integer or None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_optimizer_refuses(case):
    given = problem("relu_mlp", FLOAT32)
    options, kind, message = REFUSED[case]
    with pytest.raises(kind, match=f"^directional_newton: {message}"):
        optimizer_of(given, **options)


def test_what_is_no_model():
    with pytest.raises(TypeError, match=r"^directional_newton: model_fn must be a function; got 3"):
        directional_newton(3, nn.MSELoss())
    message = "^directional_newton: model_fn must take params and X; got the module Linear"
    with pytest.raises(TypeError, match=message):
        directional_newton(nn.Linear(1, 1), nn.MSELoss())


MAKERS = {
    "fixed": (lambda: fixed(-1.0), ValueError, "fixed: damping must be a number ≥ 0; got -1.0"),
    "fixed none": (lambda: fixed(None), TypeError, "fixed: damping must be a number ≥ 0; got None"),
    "fixed rule": (lambda: fixed(lambda x: x), TypeError, "fixed: damping must be .* evals, evecs"),
    **{
        f"{make.__name__} {name}": (
            lambda make=make, keywords=keywords: make(**keywords),
            kind,
            f"{make.__name__}: {message}",
        )
        for make in (levenberg_marquardt, trust_region, held_out)
        for name, keywords, kind, message in (
            ("start", {"start": 0.0}, ValueError, "start must be positive; got 0.0"),
            ("start below", {"start": -1.0}, ValueError, "start must be a number ≥ 0; got -1.0"),
            ("start a word", {"start": "1"}, TypeError, "start must be a number ≥ 0; got '1'"),
            ("rule", {"rule": -1.0}, ValueError, "rule must be a number ≥ 0; got -1.0"),
            ("rule a word", {"rule": "1"}, TypeError, "rule must be a number ≥ 0; got '1'"),
            ("a wrong rule", {"rule": constant}, TypeError, r"rule must be .* constant\(…\)"),
        )
    },
    "fraction one": (lambda: held_out(1.0), ValueError, "held_out: fraction must be less than 1"),
    "fraction 0": (lambda: held_out(0.0), ValueError, "held_out: fraction must be positive; got 0"),
    "every 0": (lambda: held_out(every=0), ValueError, "held_out: every must be at least 1; got 0"),
    "every 1.5": (lambda: held_out(every=1.5), TypeError, "held_out: every must be an integer"),
    "every true": (lambda: held_out(every=True), TypeError, "held_out: every must be an integer"),
    "no grid": (lambda: held_out(grid=()), (TypeError, ValueError), "held_out: grid must be a seq"),
    "a number": (lambda: held_out(grid=1.0), TypeError, "held_out: grid must be a sequence of pos"),
    "a grid with 0": (lambda: held_out(grid=(1.0, 0.0)), ValueError, "held_out: grid must be posi"),
}


@pytest.mark.parametrize("case", MAKERS)
def test_what_dampings_refuse(case):
    make, kind, message = MAKERS[case]
    with pytest.raises(kind, match=f"^{message}"):
        make()


def test_what_init_refuses():
    optimizer = optimizer_of(problem("relu_mlp"))
    for params, kind, message in (
        ({}, ValueError, "params must hold at least one tensor"),
        ({"a": torch.ones(2, dtype=torch.int64)}, TypeError, "params must hold floating-point"),
        ({"a": 1.0}, TypeError, "params must hold floating-point tensors only"),
    ):
        with pytest.raises(kind, match=f"^init: {message}"):
            optimizer.init(params)


STATE = "state must be of the same parameters, and of an optimizer with the same momentum"


def test_what_update_refuses():
    given, other = problem("relu_mlp"), problem("tanh_mlp")
    plain, heavy = optimizer_of(given), optimizer_of(given, momentum=0.9)
    state = plain.init(given.params)
    batch = (given.X, given.y)
    with pytest.raises(
        TypeError, match=r"^update: state must be a State; got dict. Pass what init"
    ):
        plain.update(given.params, state._asdict(), *batch)
    with pytest.raises(TypeError, match=r"^update: state must be a State; got tuple"):
        plain.update(given.params, tuple(state), *batch)
    with pytest.raises(ValueError, match=f"^update: {STATE}"):
        heavy.update(given.params, state, *batch)
    with pytest.raises(ValueError, match=f"^update: {STATE}"):
        plain.update(given.params, heavy.init(given.params), *batch)
    with pytest.raises(ValueError, match=f"^update: {STATE}"):
        heavy.update(given.params, heavy.init(other.params), *batch)
    with pytest.raises(ValueError, match=r"^update: X and y must hold the same number of samples"):
        plain.update(given.params, state, given.X, given.y[:2])
    with pytest.raises(TypeError, match=r"^update: X and y must be tensors or pytrees"):
        plain.update(given.params, state, [1.0], given.y)
    with pytest.raises(ValueError, match=r"^update: params must hold at least one tensor"):
        plain.update({}, state, *batch)
    with pytest.raises(ValueError, match=r"^update: subsampling_ggn must hold distinct indices"):
        optimizer_of(given, subsampling_ggn=[7]).update(given.params, state, *batch)
    with pytest.raises(ValueError, match=r"^update: a group must name parameters that there are"):
        optimizer_of(given, groups=[Group("none")]).update(given.params, state, *batch)
    with pytest.raises(ValueError, match=r"^update: the outputs of model_fn must be finite"):
        plain.update(tree_map(lambda x: x * math.nan, given.params), state, *batch)
    with pytest.raises(TypeError, match=r"^update: X and y must be tensors"):
        optimizer_of(given, held_out(every=1)).update(
            given.params, optimizer_of(given, held_out()).init(given.params), [1.0], given.y
        )


@pytest.mark.parametrize("damping", [fixed, lambda rule: levenberg_marquardt(rule=rule)])
@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (lambda evals: [0.1] * len(evals), TypeError, "damping must return a tensor of shape"),
        (lambda evals: 0.1, TypeError, "damping must return a tensor of shape"),
        (lambda evals: evals.numpy(), TypeError, "damping must return a tensor of shape"),
        (lambda evals: None, TypeError, "damping must return a tensor of shape"),
        (lambda evals: evals[:1], ValueError, "damping must return one value for each of the K"),
        (lambda evals: 0 * evals - 1e-6, ValueError, "damping must not be negative or nan"),
    ],
)
def test_what_rules_must_not_return(answer, kind, message, damping):
    given = problem("relu_mlp")
    optimizer = optimizer_of(given, damping(lambda evals, *_: answer(evals)))
    with pytest.raises(kind, match=f"^update: {message}"):
        optimizer.update(given.params, optimizer.init(given.params), given.X, given.y)
