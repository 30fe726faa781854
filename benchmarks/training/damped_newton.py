"""Our methods, from the optimizer as shipped to one option more at a time.

As with the competitors, a method is ``start(instance, **settings) -> update``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.training.instances import Instance, Params
from benchmarks.training.updates import Start, Update
from ddnewton import (
    directional_newton,
    held_out,
    levenberg_marquardt,
    monte_carlo,
    newton_step,
    prepare,
    spring,
    trust_region,
)
from ddnewton.damping import signal_to_noise


def newton(instance: Instance, **options: Any) -> Update:
    """Start `directional_newton` with its options."""
    model_fn, params, X, _, criterion = instance.problem
    prepared = prepare(model_fn, params, X[: instance.batch])
    optimizer = directional_newton(prepared, criterion, **options)
    state = optimizer.init(params)

    def update(X: Tensor, y: Tensor, progress: float) -> tuple[Params, int]:
        nonlocal params, state
        params, state, _ = optimizer.update(params, state, X, y)
        return params, 1

    return update


def started(instance: Instance, *, adaptation: Callable[..., Any], start: float) -> Update:
    """Start with an adaptation whose first damping is ``start`` times the size of the curvature."""
    return newton(instance, damping=adaptation(start))


def sampled_steps(
    instance: Instance, *, damping: float, learning_rate: float, momentum: float
) -> Update:
    """Start Monte-Carlo steps of one column a sample and one δ, with momentum: no search, no info.

    A velocity takes up every step, and the parameters move along it, at a rate that falls as
    1/√(1 + t/20) with the updates, as that of `held_out` does.
    """
    model_fn, start, X, _, loss = instance.problem
    criterion = monte_carlo(loss, 1, torch.Generator().manual_seed(0))
    prepared = prepare(model_fn, start, X[: instance.batch])
    params, updates = start, 0
    velocity = {name: torch.zeros_like(p) for name, p in params.items()}

    @torch.no_grad()
    def update(X: Tensor, y: Tensor, progress: float) -> tuple[Params, int]:
        nonlocal params, velocity, updates
        step = newton_step(prepared, params, X, y, criterion, damping, complement=damping)
        rate = learning_rate / (1 + updates / 20) ** 0.5
        velocity = {name: momentum * v + step[name] for name, v in velocity.items()}
        params = {name: p + rate * velocity[name] for name, p in params.items()}
        updates += 1
        return params, 1

    return update


def halves(instance: Instance, *, damping: float, learning_rate: float) -> Update:
    """Start with directions from one half of a batch, slopes and curvatures from the other."""
    half = instance.batch // 2
    unseen = range(half, instance.batch)
    return newton(
        instance,
        damping=damping,
        learning_rate=learning_rate,
        subsampling_ggn=range(half),
        subsampling_grad=unseen,
        subsampling_curvature=unseen,
    )


DAMPED_NEWTON: dict[str, Start] = {
    "constant": newton,
    "constant, momentum": partial(newton, momentum=0.9),
    "trust region, as shipped": newton,
    "spring, as shipped": partial(newton, damping=spring()),
    "LM, momentum": partial(newton, damping=levenberg_marquardt()),
    "LM": partial(started, adaptation=levenberg_marquardt),
    "trust region": partial(started, adaptation=trust_region),
    "held-out, as shipped": partial(newton, damping=held_out()),
    "held-out": partial(newton, damping=held_out()),
    "held-out, no momentum": partial(newton, damping=held_out(), momentum=0.0),
    "held-out, complement": partial(newton, damping=held_out(), complement="damping"),
    "noise-aware": partial(newton, damping=held_out(rule=signal_to_noise())),
    "held-out γ and λ": halves,
    "Monte-Carlo steps": sampled_steps,
}
