r"""All digits of (G + δI) x = b from products that have few of them.

Corrections come from conjugate gradients with the cheap product, residuals from the precise one:

    r = b − A x,        A d ≈ r,        x ← x + d.

If d gives away the share ρ of its energy D(d) = dᵀ(r + r'), with the residual r' that it leaves,
then what x + d is off by is e² ≤ ρ / (1 − ρ) D(d), and e² ≤ ‖r'‖² / δ in any case. (Wilkinson,
"Rounding errors in algebraic processes", 1963, chapter 3.)
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.iterative.conjugate_gradients import Solution, conjugate_gradients
from ddnewton.iterative.energy_bounds import share, total_bound
from ddnewton.iterative.products import FLOAT64_ROUNDING, Product, finite

CORRECTION_TOL = 1e-7
"""The share of the energy of a correction that it may give away."""

CORRECTIONS = 12
"""How many there are at most."""


def refined(
    product: Product,
    precise_product: Product,
    right: Float[Tensor, " side"],
    delta: float,
    *,
    tol: float,
    limit: int,
    rounding: float,
    preconditioner: Product | None = None,
) -> Solution:
    """Solve (G + δI) x = b until x gives away at most the share ``tol`` of the energy.

    ``product`` is v ↦ G v with the relative ``rounding``, ``precise_product`` the same in float64.
    Both are counted. For δ = 0 ``tol`` is that of the relative residual.

    Raises
    ------
    NotFinite
        A product has nan or inf.
    BadValue
        A product shows a negative curvature.

    >>> G = torch.tensor([4.0, 1.0, 1e-3], dtype=torch.float64).diag()
    >>> cheap = lambda v: (G.float() @ v.float()).double()
    >>> b = torch.ones(3, dtype=torch.float64)
    >>> solution = refined(cheap, lambda v: G @ v, b, 1e-2, tol=1e-22, limit=50, rounding=1.2e-7)
    >>> float((G @ solution.x + 1e-2 * solution.x - b).norm()) < 1e-10
    True
    """
    size, root = float(torch.linalg.vector_norm(right)), math.sqrt(delta)
    nothing = float(size > 0)
    zero = torch.zeros_like(right)
    best, r = Solution(zero, nothing, nothing, 0, size == 0, curved=True, norm=0.0), right
    for _ in range(CORRECTIONS):
        if best.converged or best.products + 2 > limit:
            break
        # The correction, as good as is needed or as the cheap product allows.
        correction = conjugate_gradients(
            product,
            r,
            delta,
            tol=max(CORRECTION_TOL, tol / (4 * best.lost)) if root else CORRECTION_TOL**0.5,
            limit=limit - best.products - 1,
            preconditioner=preconditioner,
            rounding=rounding,
            norm=best.norm,
        )
        x = best.x + correction.x
        image = finite(precise_product(x))
        before, r = r, right - image - delta * x
        # Bounds of e², from the correction and from the residual; and the rounding of both.
        length = float(x.norm())
        norm = max(correction.norm, float(image.norm()) / length if length else 0.0)
        bound = relative_bound(correction, before, r)
        if root:
            bound = min(bound, float(r @ r) / delta)
        total = total_bound(
            bound, FLOAT64_ROUNDING * (norm + delta) * length, float(r.norm()), root
        )
        lost, residual = share(total, float(x @ (right + r))), float(r.norm()) / size
        remains, former = (lost, best.lost) if root else (residual, best.residual)
        products = best.products + correction.products + 1
        curved = correction.curved if best.products == 0 else best.curved
        if not remains < former:
            # Nothing more is to be had: the better one stays.
            return best._replace(products=products, curved=curved)
        best = Solution(x, lost, residual, products, remains <= tol, curved, norm)
    return best


def relative_bound(
    correction: Solution, before: Float[Tensor, " side"], after: Float[Tensor, " side"]
) -> float:
    """Return the bound of e² by the share that a correction gives away of its energy."""
    if not correction.lost < 1:
        return math.inf
    energy = max(float(correction.x @ (before + after)), 0.0)
    return correction.lost / (1 - correction.lost) * energy
