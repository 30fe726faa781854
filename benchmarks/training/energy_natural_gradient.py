"""Energy natural gradients: Gauss-Newton steps of least squares with a line search over 2^−k.

With the rows' Jacobian J [N, D] and residuals r: the natural gradient d = G⁺ Jᵀr, G = JᵀJ, and the
step −2^−k d of the lowest loss over k = 0, 1, …, 30. Source: Müller and Zeinhofer, *Achieving high
accuracy with PINNs via energy natural gradients*, ICML 2023, and their code, which takes `lstsq` of
the Gram matrix. They try every length at once on a GPU; one core is faster with the first valley.

ENGD-W: d = Jᵀ (JJᵀ + λI)⁻¹ r, for more parameters than rows, with the same search. SPRING: the last
step φ stays as far as the new rows allow, d = Jᵀ(JJᵀ + λI)⁻¹(r − μJφ) + μφ. Source:
Guzmán-Cordero et al. 2025, arXiv 2505.12149.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, vmap

from benchmarks.problem import Problem
from benchmarks.training.instances import Instance, Params
from benchmarks.training.updates import Start, Update, flat, unflat

Rows = Callable[[Tensor], Tensor]

LEVELS = 31
"""So many step lengths, as published."""


def residuals(problem: Problem, X: Tensor, y: Tensor) -> tuple[Rows, Rows]:
    """Return the rows r [N] and their Jacobian [N, D] as functions of one vector [D].

    The loss is the mean of their squares, so that they are outputs less targets.
    """

    def single(vector: Tensor, x: Tensor, aim: Tensor) -> Tensor:
        return (problem.model_fn(unflat(vector, problem.params), x[None]) - aim[None]).squeeze()

    def rows(vector: Tensor) -> Tensor:
        return (problem.model_fn(unflat(vector, problem.params), X) - y).flatten()

    return rows, lambda vector: vmap(grad(single), (None, 0, 0))(vector, X, y)


def shortened(rows: Rows, x: Tensor, d: Tensor, *, every: bool) -> Tensor:
    """Return x − 2^−k d of the lowest loss over all k, or of the first that is a valley.

    The second needs a handful of losses in place of 31: it ends where the loss is below that at x,
    and has been lower at a greater length than at the last two.
    """
    lengths = 0.5 ** torch.arange(LEVELS, dtype=x.dtype)
    begin, losses = rows(x).square().mean(), torch.full_like(lengths, torch.inf)
    for k, length in enumerate(lengths):
        loss = rows(x - length * d).square().mean()
        losses[k] = loss if torch.isfinite(loss) else torch.inf
        if not every and k > 1 and losses.min() < torch.minimum(begin, losses[k - 1 : k + 1].min()):
            break
    return x - lengths[losses.argmin()] * d


def engd(instance: Instance, *, rcond: float, every: bool) -> Update:
    """Start energy natural gradients with the dense Gram matrix."""
    problem = instance.problem
    x = flat(problem.params)

    @torch.no_grad()
    def update(X: Tensor, y: Tensor, progress: float) -> tuple[Params, int]:
        nonlocal x
        rows, jacobian = residuals(problem, X, y)
        J = jacobian(x)
        slope = J.T @ rows(x) / len(J)
        # LAPACK's gelsd: the pseudoinverse, singular values below rcond of the largest left out.
        gram = J.T @ J / len(J)
        d = torch.linalg.lstsq(gram, slope[:, None], rcond=rcond, driver="gelsd").solution[:, 0]
        x = shortened(rows, x, d, every=every)
        return unflat(x, problem.params), 1

    return update


def engd_woodbury(
    instance: Instance,
    *,
    damping: float,
    momentum: float = 0.0,
    lr: float | None = None,
    every: bool = False,
) -> Update:
    """Start ENGD-W, its rate by the line search, or SPRING with a fixed one and ``momentum``."""
    problem = instance.problem
    x = flat(problem.params)
    last = torch.zeros_like(x)

    @torch.no_grad()
    def update(X: Tensor, y: Tensor, progress: float) -> tuple[Params, int]:
        nonlocal x, last
        rows, jacobian = residuals(problem, X, y)
        J = jacobian(x) / len(X) ** 0.5
        r = rows(x) / len(X) ** 0.5
        # The step that was kept is corrected by what the new rows say.
        kernel = J @ J.T
        kernel.diagonal().add_(damping)
        aim = r - momentum * (J @ last)
        d = J.T @ torch.linalg.solve(kernel, aim) + momentum * last
        x = shortened(rows, x, d, every=every) if lr is None else x - lr * d
        last = d
        return unflat(x, problem.params), 1

    return update


ENERGY: dict[str, Start] = {"ENGD": engd, "ENGD-W": engd_woodbury, "SPRING": engd_woodbury}
