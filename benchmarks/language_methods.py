"""AdamW and steps by products, on a language model: how each is started, and its settings to try.

A method is ``start(problem, *, seed, **settings) -> update``, and ``update(X, y, progress) ->
params`` makes one step, in the time of which ``progress`` is already over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from benchmarks.problem import Problem
from ddnewton import directional_newton, held_out, levenberg_marquardt, monte_carlo, trust_region

Params: TypeAlias = dict[str, Tensor]
Update: TypeAlias = Callable[[Tensor, Tensor, float], Params]

Config: TypeAlias = dict[str, Any]

WARM_UP, LEAST_SHARE = 0.05, 1e-3
"""The share of a run in which AdamW's rate rises from zero; the least share of a rate of ours."""

ADAPTATIONS = {
    "held-out": held_out,
    "LM": levenberg_marquardt,
    "trust region": trust_region,
}


def scheduled(progress: float) -> float:
    """Return the share of the rate at a time: a linear rise, then half a cosine down to zero."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return falling_share((progress - WARM_UP) / (1 - WARM_UP))


def falling_share(progress: float) -> float:
    """Return half a cosine from one down to zero."""
    return (1 + math.cos(math.pi * min(1, progress))) / 2


def adamw(problem: Problem, *, seed: int, lr: float) -> Update:
    """Start AdamW as language models are trained: warm-up, cosine, decay of the weights of 0.1."""
    leaves = {name: p.clone().requires_grad_() for name, p in problem.params.items()}
    optimizer = torch.optim.AdamW(
        leaves.values(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, foreach=True
    )

    def update(X: Tensor, y: Tensor, progress: float) -> Params:
        optimizer.param_groups[0]["lr"] = lr * scheduled(progress)
        optimizer.zero_grad()
        torch.autograd.backward(problem.criterion(problem.model_fn(leaves, X), y))
        optimizer.step()
        return leaves

    return update


def by_products(
    problem: Problem,
    *,
    seed: int,
    damping: float | None = None,
    adapted: str = "",
    rate: float | None = None,
    curvature: str | float = "exact",
    **settings: Any,
) -> Update:
    """Start steps by products, with a constant damping or one that is ``adapted``.

    ``curvature`` is exact, drawn, or that of a share of the batch. A ``rate`` falls by a cosine;
    without one it is what goes with the damping.
    """
    criterion: Any = nn.CrossEntropyLoss()
    if curvature == "drawn":
        draws = torch.Generator().manual_seed(seed)
        criterion = monte_carlo(criterion, 1, draws, per="sequence")
    now, options = [0.0], dict(settings)
    if rate is not None:
        options["learning_rate"] = lambda _: rate * max(falling_share(now[0]), LEAST_SHARE)
    params, state = problem.params, None

    def update(X: Tensor, y: Tensor, progress: float) -> Params:
        nonlocal params, state
        now[0] = progress
        share = curvature if isinstance(curvature, float) else None
        optimizer = directional_newton(
            problem.model_fn,
            criterion,
            ADAPTATIONS[adapted]() if adapted else damping,
            gram="free",
            complement="damping",
            subsampling_ggn=None if share is None else list(range(int(share * len(X)))),
            **options,
        )
        state = optimizer.init(params) if state is None else state
        params, state, _ = optimizer.update(params, state, X, y)
        return params

    return update


class Method(NamedTuple):
    """A method, the settings to choose from, and how many updates a run has, 0 for so much time."""

    start: Callable[..., Update]
    grid: Sequence[Config]
    updates: int = 0


STEPS: Config = {"momentum": 0.9, "rate": 0.3}

METHODS = {
    "AdamW": Method(
        adamw,
        (
            {"batch": 8, "lr": 3e-3},
            {"batch": 16, "lr": 1e-3},
            {"batch": 16, "lr": 3e-3},
            {"batch": 16, "lr": 1e-2},
        ),
    ),
    "AdamW, 100 updates": Method(
        adamw, [{"batch": 16, "lr": lr} for lr in (3e-3, 1e-2, 3e-2)], updates=100
    ),
    "constant δ": Method(
        by_products,
        (
            {"batch": 16, "damping": 0.1, "tol": 0.3, **STEPS},
            {"batch": 16, "damping": 0.1, "tol": 0.05, **STEPS},
            {"batch": 16, "damping": 0.02, "tol": 0.3, **STEPS},
            {"batch": 16, "damping": 0.02, "tol": 0.8, **STEPS},
        ),
    ),
    "constant δ, larger batch": Method(
        by_products, [{"batch": 64, "damping": 0.1, "tol": 0.3, **STEPS}]
    ),
    "constant δ, curvature of a quarter": Method(
        by_products,
        [
            {"batch": 64, "damping": delta, "tol": 0.3, "curvature": 0.25, **STEPS}
            for delta in (0.3, 1.0)
        ],
    ),
    "constant δ, curvature drawn": Method(
        by_products,
        [
            {"batch": 16, "damping": delta, "tol": 0.3, "curvature": "drawn", **STEPS}
            for delta in (3.0, 10.0)
        ],
    ),
    "held-out, as shipped": Method(by_products, [{"batch": 64, "adapted": "held-out"}]),
    "LM, as shipped": Method(by_products, [{"batch": 64, "adapted": "LM"}]),
    "trust region, as shipped": Method(by_products, [{"batch": 64, "adapted": "trust region"}]),
}
