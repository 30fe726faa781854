"""Dense textbook updates that the optimizer of pure functions is held against, and its problems."""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ddnewton import directional_newton
from tests import methods
from tests.methods import FLOAT64
from tests.models import Problem, normal, problem
from tests.reference import Dense, dense, flat
from tests.reference import error as distance

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
    decay: float | torch.Tensor = 0.0  # or one a parameter


def moved(params, vector):
    """The parameters after a step, in their own dtypes."""
    leaves, spec = tree_flatten(params)
    parts = vector.split([leaf.numel() for leaf in leaves])
    pairs = zip(leaves, parts, strict=True)
    return tree_unflatten([a + b.reshape(a.shape).to(a.dtype) for a, b in pairs], spec)


def loss_of(given: Problem, params, decay=0.0, samples=slice(None)) -> float:
    X, y = (tree_map(lambda x: x[samples], tree) for tree in (given.X, given.y))
    loss = given.criterion(given.model_fn(params, X), y)
    return float(loss + (decay * flat(params).square()).sum() / 2)


def at(given: Problem, params) -> Dense:
    return dense(*given._replace(params=params))


def some(reference: Dense, subset) -> Dense:
    if subset is None:
        return reference
    return Dense(reference.loss, *(part[torch.as_tensor(subset)] for part in reference[1:]))


def spring(g, G, theta, previous, pulls: Pulls, scale=1.0):
    """argmin gᵀs + ½ sᵀGs + ½ δ‖(s − μs') / scale‖² + ½ w‖θ + s‖²."""
    delta, momentum, decay = pulls
    metric = torch.ones_like(g) * delta / scale**2
    damped = G + torch.diag(metric + decay)
    return torch.linalg.solve(damped, -g + metric * momentum * previous - decay * theta)


def sizes_of(reference: Dense, before=None):
    """The largest sizes of the columns so far, and the scale by them; 1 with as many parameters."""
    sizes = reference.ggn.diagonal().sqrt()
    sizes = sizes if before is None else torch.maximum(sizes, before)
    columns = len(reference.hessians) * int(torch.linalg.matrix_rank(reference.hessians).max())
    wide = columns <= len(sizes)
    return sizes, torch.ones_like(sizes) if wide else 1 / torch.where(sizes > 0, sizes, 1.0)


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
    sizes: torch.Tensor


def marquardt(given, params, delta, pulls, previous=None, start=1e-3, sizes=None):  # noqa: PLR0917 - the state of a loop
    """Accept what falls by more than 1e-4 of what is promised; damp less fast, and more slowly."""
    reference, theta = at(given, params), flat(params)
    g, G, decay, momentum = reference.gradient, reference.ggn, pulls.decay, pulls.momentum
    sizes, scale = sizes_of(reference, sizes)
    delta = start * float((G.diagonal() * scale**2).sum()) if delta is None else delta
    previous = torch.zeros_like(theta) if previous is None else previous
    before = loss_of(given, params, decay)
    attempts = 0
    while attempts < 20:
        attempts += 1
        vector = spring(g, G, theta, previous, Pulls(delta, momentum, decay), scale)
        s, used = vector, delta
        new = moved(params, s)
        after = loss_of(given, new, decay)
        slope = float(g @ s + decay * theta @ s)
        predicted = -slope - float(s @ G @ s + decay * s @ s) / 2
        ratio = (before - after) / predicted
        taken = after <= before and ratio > 1e-4
        delta *= 1 / 10 if taken else 1.5 if attempts <= 10 else 10.0
        if taken:
            break
        momentum = 0.0
    return Marquardt(
        params=new if taken else params,
        following=delta,
        damping=used,
        attempts=attempts,
        accepted=taken,
        before=before,
        after=after,
        predicted=predicted,
        vector=vector if taken else torch.zeros_like(vector),
        sizes=sizes,
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


RULES = {name: rule.make for name, rule in methods.RULES.items()} | {
    "large": lambda: lambda evals, *_: torch.full_like(evals, 1e12),
    "skip": lambda: lambda evals, *_: torch.full_like(evals, torch.inf),
    "skip some": lambda: lambda evals, *_: torch.where(evals > evals.mean(), 0.1, torch.inf),
}
"""What makes each rule, for some draw."""
