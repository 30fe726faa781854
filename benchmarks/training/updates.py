"""What every method of the training benchmark is, and the flat vectors that most of them work on.

A method is ``start(instance, **settings) -> update``, and ``update(X, y, progress) -> params,
steps`` makes one step, or a few, in the time of which ``progress`` is already over. It raises
`Finished` where no further step would change anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.problem import Problem
from benchmarks.training.instances import Params

Update: TypeAlias = Callable[[Tensor, Tensor, float], tuple[Params, int]]
Start: TypeAlias = Callable[..., Update]

TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda loss: loss,
    "root": torch.sqrt,
    "logarithm": torch.log,
}
"""Monotone functions of a loss: its minima are the same, its curvature on the way is another."""


class Finished(Exception):
    """A method has nothing left to do: it is where rounding lets it get."""


def flat(params: Params) -> Tensor:
    """Return all parameters in one vector."""
    return torch.cat([p.flatten() for p in params.values()])


def unflat(vector: Tensor, like: Params) -> Params:
    """Return a vector's entries as parameters of the shapes of others."""
    parts = vector.split([p.numel() for p in like.values()])
    return {name: part.view_as(p) for (name, p), part in zip(like.items(), parts, strict=True)}


def moved(params: Params, step: Tensor) -> Params:
    """Return the parameters plus a step given as one vector."""
    return {name: params[name] + part for name, part in unflat(step, params).items()}


def objective(
    problem: Problem, X: Tensor, y: Tensor, transform: str
) -> Callable[[Tensor], tuple[float, Tensor]]:
    """Return the transformed loss and its gradient as a function of one vector [D]."""

    def evaluate(vector: Tensor) -> tuple[float, Tensor]:
        with torch.enable_grad():
            leaf = vector.detach().requires_grad_()
            outputs = problem.model_fn(unflat(leaf, problem.params), X)
            value = TRANSFORMS[transform](problem.criterion(outputs, y))
            (gradient,) = torch.autograd.grad(value, leaf)
        return value.item(), gradient

    return evaluate


def first_order(make: Callable[..., Optimizer], *, cosine: bool = False) -> Start:
    """Return the method of an optimizer of torch; with ``cosine``, its rate falls to zero."""

    def start(instance: Instance, *, lr: float, **settings: Any) -> Update:
        problem = instance.problem
        leaves = {name: p.clone().requires_grad_() for name, p in problem.params.items()}
        optimizer = make(leaves.values(), lr=lr, **settings)

        def update(X: Tensor, y: Tensor, progress: float) -> tuple[Params, int]:
            if cosine:
                rate = lr * (1 + math.cos(math.pi * min(progress, 1))) / 2
                optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            torch.autograd.backward(problem.criterion(problem.model_fn(leaves, X), y))
            optimizer.step()
            return leaves, 1

        return update

    return start
