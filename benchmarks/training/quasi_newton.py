"""Self-scaled quasi-Newton methods with a dense inverse Hessian: BFGS and the Broyden family.

The inverse Hessian is scaled down before an update that would leave it too large, by Al-Baali's
factors, and with "Broyden" the member of the family is chosen in every update too. With
s = x₊ − x, q = g₊ − g, step length α:

    b = −α sᵀg / sᵀq,   h = qᵀHq / sᵀq,   a = bh − 1,   ρ = min(1, 1/b),
    v = s / sᵀq − Hq / qᵀHq,
    H₊ = (H − Hq qᵀH / qᵀHq + φ qᵀHq v vᵀ) / τ + s sᵀ / sᵀq

    BFGS:     φ = 1, τ = ρ
    Broyden:  c = √(a / (1 + a)),   ρ⁻ = min(1, h (1 − c)),   θ⁻ = (ρ⁻ − 1) / a,   θ⁺ = 1 / ρ⁻,
              θ = max(θ⁻, min(θ⁺, (1 − b) / b)),   σ = 1 + aθ,   κ = σ^(−1/(D−1)),
              φ = (1 − θ) / σ,   τ = min(ρκ, σ) where θ ≤ 0, ρ min(κ, 1/θ) where θ > 0

Sources: Al-Baali, *Numerical experience with a class of self-scaling quasi-Newton algorithms*,
1998; Urbán, Stefanou, Pons, *Unveiling the optimization process of PINNs*, J. Comput. Phys. 2025,
arXiv 2405.04230, equations 10 to 23. Their variants of the loss, its root and its logarithm, and
their choice whether to scale the first H are the settings. H is begun anew where it is not positive
definite, as they do, and where the line search finds no lower loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.training.instances import Instance, Params
from benchmarks.training.updates import Finished, Start, Update, flat, objective, unflat
from benchmarks.training.wolfe import Trial, strong_wolfe

CHECKED = 500
"""After so many updates H is made symmetric, and begun anew where it is not positive definite."""


class Secant(NamedTuple):
    """The numbers of a step that choose an update: b, h, their product less 1, and D."""

    b: float
    h: float
    a: float
    size: int


class Member(NamedTuple):
    """A member φ of Broyden's family, and the divisor τ of the inverse Hessian before it."""

    phi: float
    tau: float


def scaled_bfgs(secant: Secant, initial: bool) -> Member:
    """Return BFGS with Al-Baali's scale; at first with that of Shanno and Phua."""
    return Member(1.0, secant.h if initial else min(1.0, 1 / secant.b))


def scaled_broyden(secant: Secant, initial: bool) -> Member:
    """Return the member of the family and its scale by Al-Baali's rule."""
    b, h, a, size = secant
    if a < 1e-14:  # H has the secant's curvature already: all members are the same
        return Member(1.0, min(1.0, 1 / b))
    lowest = min(1.0, h * (1 - math.sqrt(a / (1 + a))))
    theta = max((lowest - 1) / a, min(1 / lowest, (1 - b) / b))
    sigma = 1 + a * theta
    scale = min(1.0, 1 / b)
    kappa = sigma ** (-1 / max(size - 1, 1))
    if initial:
        tau = h / sigma
    elif theta <= 0:
        tau = min(scale * kappa, sigma)
    else:
        tau = scale * min(kappa, 1 / theta)
    return Member((1 - theta) / sigma, tau)


Rule = Callable[[Secant, bool], Member]


def updated(
    H: Tensor, s: Tensor, q: Tensor, g: Tensor, length: float, rule: Callable[[Secant], Member]
) -> bool:
    """Update an inverse Hessian in place; False, and nothing done, where its numbers fail.

    The update is one product of rank two: in s and Hq it has three coefficients.
    """
    Hq = H @ q
    sq, qHq = float(s @ q), float(q @ Hq)
    if not (sq > 0 and qHq > 0):
        return False
    b, h = -length * float(s @ g) / sq, qHq / sq
    phi, tau = rule(Secant(b, h, max(b * h - 1, 0.0), len(s)))
    if not (tau > 0 and math.isfinite(tau) and math.isfinite(phi)):
        return False
    # v vᵀ multiplied out.
    ss = 1 / sq + phi * qHq / (tau * sq * sq)
    mixed = -phi / (tau * sq)
    hh = (phi - 1) / (tau * qHq)
    pair = torch.stack([s, Hq])
    core = torch.tensor([[ss, mixed], [mixed, hh]], dtype=H.dtype)
    H.addmm_(pair.T @ core, pair, beta=1 / tau)
    return True


def definite(H: Tensor) -> bool:
    """Make a matrix symmetric, in place; tell whether it is positive definite."""
    H.copy_((H + H.T) / 2)
    return not int(torch.linalg.cholesky_ex(H).info)


class Position(NamedTuple):
    """Where a run stands: the vector, the loss, its gradient, and the updates that H has had."""

    x: Tensor
    value: float
    g: Tensor
    updates: int


def start_quasi_newton(
    instance: Instance, *, rule: Rule, transform: str = "none", scale_first: bool = True
) -> Update:
    """Start a quasi-Newton method with a dense inverse Hessian and a strong-Wolfe search."""
    problem = instance.problem
    x = flat(problem.params).detach()
    H, here = torch.eye(len(x), dtype=x.dtype), None

    def searched(evaluate: Callable, here: Position) -> tuple[Trial | None, Tensor]:
        """Return the trial that a search along −Hg takes, if any, and the direction."""
        p = -(H @ here.g)
        begin = Trial(0.0, here.value, float(here.g @ p), here.g)
        if not begin.slope < 0:
            return None, p

        def at(length: float) -> Trial:
            value, g = evaluate(here.x + length * p)
            return Trial(length, value, float(g @ p), g)

        first = 1.0 if here.updates else min(1.0, 1 / float(here.g.norm()))
        return strong_wolfe(at, begin, first), p

    @torch.no_grad()
    def update(X: Tensor, y: Tensor, progress: float) -> tuple[Params, int]:
        nonlocal here
        evaluate = objective(problem, X, y, transform)
        if here is None:
            here = Position(x, *evaluate(x), 0)
        taken, p = searched(evaluate, here)
        # Where no step is to be had, or H has lost its way, begin anew with the gradient.
        lost = here.updates % CHECKED == CHECKED - 1 and not definite(H)
        if taken is None or lost:
            if taken is None and here.updates == 0:
                raise Finished
            H.zero_().diagonal().fill_(1.0)
            here = here._replace(updates=0)
            return unflat(here.x, problem.params), 0
        s, q = taken.length * p, taken.gradient - here.g
        initial = scale_first and here.updates == 0
        done = updated(H, s, q, here.g, taken.length, partial(rule, initial=initial))
        here = Position(here.x + s, taken.value, taken.gradient, here.updates + done)
        return unflat(here.x, problem.params), 1

    return update


QUASI_NEWTON: dict[str, Start] = {
    "SSBFGS": partial(start_quasi_newton, rule=scaled_bfgs),
    "SSBroyden": partial(start_quasi_newton, rule=scaled_broyden),
}
