"""The methods that ours are compared with: torch's, Gauss-Newton CG, and those of other files."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vjp
from torch.optim import LBFGS, SGD, Adam

from benchmarks.problem import Problem
from benchmarks.training.energy_natural_gradient import ENERGY
from benchmarks.training.installed_packages import INSTALLED
from benchmarks.training.instances import Instance, Params
from benchmarks.training.quasi_newton import QUASI_NEWTON
from benchmarks.training.scipy_minimizers import SCIPY
from benchmarks.training.updates import Start, Update, first_order, flat, moved


def lbfgs(instance: Instance, *, history_size: int) -> Update:
    """Start L-BFGS with a strong-Wolfe line search; an update is five of its iterations."""
    problem = instance.problem
    leaves = {name: p.clone().requires_grad_() for name, p in problem.params.items()}
    optimizer = LBFGS(
        leaves.values(),
        max_iter=5,
        history_size=history_size,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )
    state = optimizer.state[next(iter(leaves.values()))]

    def update(X: Tensor, y: Tensor, progress: float) -> tuple[Params, int]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = problem.criterion(problem.model_fn(leaves, X), y)
            torch.autograd.backward(loss)
            return loss

        # As many steps as it counts iterations.
        before = state.get("n_iter", 0)
        optimizer.step(closure)
        return leaves, state["n_iter"] - before

    return update


class Move(NamedTuple):
    """A step as one vector [D], the loss where it starts, and by how much it should fall."""

    step: Tensor
    loss: Tensor
    predicted: Tensor


def gauss_newton_cg(
    problem: Problem, params: Params, X: Tensor, y: Tensor, *, delta: float, iterations: int
) -> Move:
    """Return −(G + δI)⁻¹g by so many iterations of conjugate gradients, from zero.

    With the outputs f, Gv = Jᵀ(∇²ℓ(f)(Jv)): the pullback is differentiated once more for Jv, being
    linear, so that the model is evaluated once a step; ∇²ℓ is symmetric.
    """
    slope = grad(lambda f: problem.criterion(f, y))
    f, pull = vjp(lambda p: problem.model_fn(p, X), params)
    push = vjp(lambda u: flat(pull(u)[0]), torch.zeros_like(f))[1]
    slopes, bend = vjp(slope, f)
    g = flat(pull(slopes)[0])

    def product(v: Tensor) -> Tensor:
        return flat(pull(bend(push(v)[0])[0])[0]) + delta * v

    step, residual = torch.zeros_like(g), -g
    direction, size = residual, residual @ residual
    for _ in range(iterations):
        image = product(direction)
        alpha = size / (direction @ image)
        step, residual = step + alpha * direction, residual - alpha * image
        size, last = residual @ residual, size
        direction = residual + size / last * direction
        if size <= 1e-24 * (g @ g):
            break
    curved = -g - residual - delta * step  # G s
    return Move(step, problem.criterion(f, y), -(g @ step + step @ curved / 2))


def newton_cg(instance: Instance, *, delta: float, iterations: int) -> Update:
    """Start Gauss-Newton CG: its damping adapts on full batches and is constant on small ones.

    It adapts as Levenberg and Marquardt's: by the ratio of the actual to the predicted decrease, a
    step that does not lower the loss is not taken.
    """
    problem = instance.problem
    params = dict(problem.params)

    @torch.no_grad()
    def update(X: Tensor, y: Tensor, progress: float) -> tuple[Params, int]:
        nonlocal params, delta
        move = gauss_newton_cg(problem, params, X, y, delta=delta, iterations=iterations)
        tried = moved(params, move.step)
        # On mini-batches every step is taken.
        if instance.batch is not None:
            params = tried
            return params, 1
        # On full ones the damping follows the ratio of decreases.
        decrease = move.loss - problem.criterion(problem.model_fn(tried, X), y)
        ratio = float(decrease / move.predicted)
        delta = delta / 3 if ratio > 0.75 else delta if ratio > 0.25 else 4 * delta
        if ratio > 1e-4:
            params = tried
        return params, 1

    return update


def in_succession(instance: Instance, *, first: Start, share: float, lr: float) -> Update:
    """Start a first-order method, and hand what it has after a share of the time to SSBroyden."""
    begun = first(instance, lr=lr)
    params, second = instance.problem.params, None

    def update(X: Tensor, y: Tensor, progress: float) -> tuple[Params, int]:
        nonlocal params, second
        if second is None and progress < share:
            params, steps = begun(X, y, progress)
            return params, steps
        if second is None:
            params = {name: p.detach() for name, p in params.items()}
            problem = instance.problem._replace(params=params)
            second = QUASI_NEWTON["SSBroyden"](instance._replace(problem=problem))
        return second(X, y, progress)

    return update


COMPETITORS: dict[str, Start] = {
    "SGD": first_order(SGD),
    "Adam": first_order(Adam),
    "Adam, cosine": first_order(Adam, cosine=True),
    "L-BFGS": lbfgs,
    "Gauss-Newton CG": newton_cg,
    **SCIPY,
    **QUASI_NEWTON,
    "Adam, SSBroyden": partial(in_succession, first=first_order(Adam)),
    **ENERGY,
    **INSTALLED,
}
