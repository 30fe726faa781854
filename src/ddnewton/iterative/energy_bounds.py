r"""What an approximate solution of (G + δI) x = b gives away: bounds from the iteration's numbers.

A Newton step s promises a decrease in proportion to its energy, 2 bᵀs − sᵀA s with A = G + δI. Of
that of the exact x* the approximate x gives away the share

    ‖x* − x‖²_A / ‖x*‖²_A = e² / (D(x) + e²),        e = ‖x* − x‖_A,    D(x) = 2 bᵀx − xᵀA x,

which holds for every x. In an iteration of conjugate gradients D grows by α_k r_kᵀz_k (z = P⁻¹r),
and e² falls by as much. That A ≥ δP, for P = I because G is semidefinite, bounds e² by Gauss-Radau
quadrature with the node δ (Meurant, Tichý, "On computing quadrature-based bounds for the A-norm of
the error in conjugate gradients", 2013): three operations on numbers,

    e_k² ≤ ρ_k r_kᵀz_k,   ρ_0 = 1/δ,   ρ_{k+1} = (ρ_k − α_k) / (δ (ρ_k − α_k) + β_{k+1}),

β_{k+1} = r_{k+1}ᵀz_{k+1} / r_kᵀz_k. The map grows with ρ_k, so a ρ_k that rounding has spoilt may
be replaced by 1/δ, which always bounds. Rounding would count for an eigenvalue at the node itself,
so the node lies a little below δ. No bound can be lower that knows of G only that it is
semidefinite: the quadrature is the error of a matrix with these iterates and an eigenvalue δ. Where
the smallest curvature along b is far above δ, the truth is therefore below what is told.

Rounding enters by the residual, too. With r the one that the iteration carries along,

    e ≤ ‖r‖_{A⁻¹} + ‖b − A x − r‖ / √δ.
"""

from __future__ import annotations

import math

NODE = 1 - 1e-4
"""Of the quadrature, in units of δ."""


def share(total: float, energy: float) -> float:
    """Return the share of the energy that is lost, from a bound of the squared error.

    Without a bound it is everything.
    """
    if total == 0:
        return 0.0
    return 1.0 if total == math.inf else total / (max(energy, 0.0) + total)


def next_ratio(ratio: float, alpha: float, beta: float, node: float) -> float:
    """Return ρ_{k+1} of the quadrature, or 1/δ where rounding has left nothing of ρ_k − α_k."""
    if node == 0:
        return math.inf
    gap = ratio - alpha
    return gap / (node * gap + beta) if gap > 0 else 1 / node


def total_bound(bound: float, drift: float, size: float, root: float) -> float:
    """Return the bound of e²: that of the carried residual, and of its distance from the true."""
    if not root:
        return 0.0 if size == 0 and drift == 0 else math.inf
    return (math.sqrt(bound) + drift / root) ** 2
