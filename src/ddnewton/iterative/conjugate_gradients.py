"""(G + δI) x = b by conjugate gradients, with a bound on what the step gives away.

The bound (`energy_bounds`) needs the residual that the iteration carries along to be the true one,
or nearly. How far it is from it is estimated from the products; where that is not small beside it,
one more product finds the true residual, and where the bound is then too large, the iteration goes
on from there.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.iterative.energy_bounds import (
    first_bound,
    next_bound,
    range_bound,
    share,
    total_bound,
)
from ddnewton.iterative.products import FLOAT64_ROUNDING, Product, checked_curvature, finite

REPLACEMENTS = 4
"""How often the residual that was carried along is replaced by the true one, at most."""

LEAST_CURVATURE = 2.0**-1022
"""In place of none, where it divides."""

NEGLIGIBLE_DRIFT = 1e-2
"""Beside the residual: up to here it is not computed anew."""


class Solution(NamedTuple):
    """An approximate solution x of (G + δI) x = b, and how good it is.

    ``lost`` is an upper bound of ‖x − x*‖²_A / ‖x*‖²_A, ``residual`` is ‖b − A x‖ / ‖b‖, and
    ``products`` counts those with G. Where b has no curvature at all, bᵀG b = 0, ``curved`` is
    false. ``norm`` is the largest ‖G p‖ / ‖p‖ of a product: ‖G‖, or less.
    """

    x: Float[Tensor, " side"]
    lost: float
    residual: float
    products: int
    converged: bool
    curved: bool
    norm: float


class System(NamedTuple):
    """A linear system: v ↦ G v, b, δ, v ↦ P⁻¹v with A ≥ δP, and the rounding of a product."""

    product: Product
    right: Float[Tensor, " side"]
    delta: float
    preconditioner: Product | None
    rounding: float
    squared: float  # bᵀG⁺b, or more


class Iterate(NamedTuple):
    """Where the iteration is.

    Rounding has made ‖b − A x − r‖ as large as it makes A v, with ‖v‖ = ``path``.
    """

    x: Float[Tensor, " side"]
    r: Float[Tensor, " side"]
    energy: float  # D(x)
    bound: float  # of ‖r‖²_{A⁻¹}
    path: float
    norm: float  # the largest ‖G p‖ / ‖p‖
    products: int
    curved: bool


def conjugate_gradients(
    product: Product,
    right: Float[Tensor, " side"],
    delta: float,
    *,
    tol: float,
    limit: int,
    preconditioner: Product | None = None,
    rounding: float = 0.0,
    start: Float[Tensor, " side"] | None = None,
    norm: float = 0.0,
    squared: float = math.inf,
) -> Solution:
    r"""Solve (G + δI) x = b until x gives away at most the share ``tol`` of the energy.

    ``preconditioner`` is v ↦ P⁻¹v, symmetric and with A ≥ δP; ``rounding`` is that of a product
    relative to ‖G‖ ‖v‖, and ``norm`` what is known of ‖G‖ before, or less. ``squared`` is bᵀG⁺b or
    more, for a b in the range of G: it makes the bound tighter. At most ``limit`` products are
    made. For δ = 0 nothing bounds the error: b must be in the range of G, and ``tol`` is that of
    the relative residual.

    Source: Hestenes, Stiefel, "Methods of conjugate gradients for solving linear systems", 1952.

    Raises
    ------
    NotFinite
        A product has nan or inf.
    BadValue
        A product shows a negative curvature.

    >>> G = torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
    >>> b = torch.tensor([5.0, 4.0, 1.0], dtype=torch.float64)
    >>> conjugate_gradients(lambda v: G @ v, b, 1.0, tol=1e-12, limit=10).x
    tensor([1., 2., 1.], dtype=torch.float64)
    """
    rounding = max(rounding, FLOAT64_ROUNDING)
    system = System(product, right, delta, preconditioner, rounding, squared)
    size = float(torch.linalg.vector_norm(right))
    if size == 0 or delta == math.inf:
        return Solution(torch.zeros_like(right), 0.0, 0.0, 0, True, curved=True, norm=norm)
    state, before = begin(system, start, norm), math.inf
    for _ in range(1 + REPLACEMENTS):
        # Iterate, and add to the bound what rounding made of the residual.
        state = descend(system, state, tol, limit)
        state, total = checked(system, state, limit)
        lost, residual = share(total, state.energy), float(state.r.norm()) / size
        remains = lost if delta > 0 else residual
        # Where the bound is still too large, go on from the true residual, as long as that helps.
        if remains <= tol or state.products >= limit or not remains < before / 2:
            break
        before = remains
    converged = remains <= tol
    return Solution(state.x, lost, residual, state.products, converged, state.curved, state.norm)


def begin(system: System, start: Float[Tensor, " side"] | None, norm: float) -> Iterate:
    """Return the iterate to begin with: zero, or the best multiple of ``start``."""
    zero = torch.zeros_like(system.right)
    first = Iterate(zero, system.right, 0.0, math.inf, 0.0, norm, 0, curved=True)
    if start is None or not (size := float(start.norm())):
        return first
    # The energy of t·start is largest, and positive, for t = bᵀstart / startᵀA start.
    image = finite(system.product(start))
    damped = image + system.delta * start
    curvature, slope = float(start @ damped), float(start @ system.right)
    t = slope / curvature if curvature > 0 else 0.0
    norm, r = max(norm, float(image.norm()) / size), system.right - t * damped
    return Iterate(t * start, r, t * slope, math.inf, abs(t) * size, norm, 1, curved=True)


def descend(system: System, state: Iterate, tol: float, limit: int) -> Iterate:
    """Return the iterate after as many iterations as the share ``tol`` takes, or rounding allows.

    It begins with the residual of ``state``, whatever made that.
    """
    delta, rounding = system.delta, system.rounding
    x, r, energy, bound, path, norm, products, curved = state
    z, rz = preconditioned(system, r)
    x, r, p, size = x.clone(), r.clone(), z.clone(), float(system.right.norm())
    # From zero and without a preconditioner, what is known of b counts as well.
    plain = products == 0 and system.preconditioner is None
    within = range_bound(system.squared, size, delta) if plain else None
    error = first_bound(rz, delta, bound, within)
    while products < limit and rz > 0:
        drift = rounding * (norm + delta) * path
        if finished(system, r, error.squared, drift, energy, (tol, tol * size)):
            break
        # The step length α = rᵀz / pᵀA p.
        image = finite(system.product(p))
        products += 1
        measured = torch.stack((p @ image, p @ p, image @ image)).tolist()
        curvature, length, norm = checked_curvature(measured, norm, rounding)
        if products == 1:
            curved = curvature > rounding * norm * length
        damped = curvature + delta * length
        alpha = rz / max(damped, LEAST_CURVATURE)
        further = path + alpha * math.sqrt(length)
        if leads_nowhere(system, r, rounding * norm * further):
            break
        x.add_(p, alpha=alpha)
        r.sub_(image, alpha=alpha).sub_(p, alpha=alpha * delta)
        # What was gained, what may be left, the next direction.
        energy += alpha * rz
        z, new = preconditioned(system, r)
        lengths = alpha, new / rz
        p, rz, path = p.mul_(lengths[1]).add_(z), new, further
        error = next_bound(error, lengths, rz, energy, delta, rounding * (1 + norm / (delta or 1)))
    return Iterate(x, r, energy, error.squared, path, norm, products, curved)


def preconditioned(
    system: System, r: Float[Tensor, " side"]
) -> tuple[Float[Tensor, " side"], float]:
    """Return z = P⁻¹r and rᵀz."""
    z = r if system.preconditioner is None else system.preconditioner(r)
    return z, float(r @ z)


def finished(
    system: System,
    r: Float[Tensor, " side"],
    bound: float,
    drift: float,
    energy: float,
    goals: tuple[float, float],
) -> bool:
    """Tell whether the iteration is where it should be, or where it gets no better by itself."""
    tol, residual_goal = goals
    if system.delta == 0:
        return float(r.norm()) <= max(residual_goal, drift / 10)
    far, slack = math.sqrt(bound), drift / math.sqrt(system.delta)
    return share((far + slack) ** 2, energy) <= tol or far <= slack / 10


def leads_nowhere(system: System, r: Float[Tensor, " side"], drift: float) -> bool:
    """Tell whether a step has no end or, undamped, makes a residual of rounding that is longer."""
    return not drift <= (math.inf if system.delta else float(r.norm()))


def checked(system: System, state: Iterate, limit: int) -> tuple[Iterate, float]:
    """Return the iterate with its true residual, and the bound of e² that this allows.

    Where the residual that was carried along is as good as true, and where no product is left, the
    bound rests on the estimated drift.
    """
    root, size = math.sqrt(system.delta), float(state.r.norm())
    drift = system.rounding * (state.norm + system.delta) * state.path
    allowed = NEGLIGIBLE_DRIFT * min(size, root * math.sqrt(state.bound) if root else size)
    if drift <= allowed or state.products >= limit:
        return state, total_bound(state.bound, drift, size, root)
    # One more product: b − A x, and how far the carried one is from it.
    image = finite(system.product(state.x))
    r = system.right - image - system.delta * state.x
    length = float(state.x.norm())
    norm = max(state.norm, float(image.norm()) / length) if length else state.norm
    drift = system.rounding * (norm + system.delta) * length
    apart = float((r - state.r).norm()) + drift
    energy = float(state.x @ (system.right + r)) - length * drift
    total = total_bound(state.bound, apart, size, root)
    # Against it, what the true residual says alone.
    size = float(r.norm())
    if root:
        total = min(total, ((size + drift) / root) ** 2)
    elif size <= 2 * drift and drift <= NEGLIGIBLE_DRIFT * float(system.right.norm()):
        total = 0.0
    bound = total_bound(total, drift, size, root)
    after = Iterate(state.x, r, energy, bound, length, norm, state.products + 1, state.curved)
    return after, total
