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
semidefinite: the quadrature is the error of a matrix with these iterates and an eigenvalue δ.

**Of a gradient more is known.** With G = BᵀB, b = Bᵀu and ‖u‖² ≤ c² (for a loss c² = Σ z² / (h N),
of its slopes z and curvatures h) the spectral measure μ of u for K = BBᵀ gives

    e² = ‖x*‖²_A − D = ∫ λ / (λ + δ) dμ − D = c² − δ ∫ dμ / (λ + δ) − D,

where mass at λ = 0 makes up for a c² that is too large. A Gauss quadrature of the last integral is
below it. Its Jacobi matrix is LLᵀ, that of the iteration T − δI = LᵀL, for the bidiagonal L of
Golub and Kahan with the diagonal α and the subdiagonal β, so that from α_1² = ‖b‖² / c²

    β_{j+1}² = T_jj − δ − α_j²,        α_{j+1}² = T_{j+1,j}² / β_{j+1}².

(Golub, Meurant, "Matrices, moments and quadrature", 2010, chapters 4 and 6.)

Rounding enters by the residual, too. With r the one that the iteration carries along,

    e ≤ ‖r‖_{A⁻¹} + ‖b − A x − r‖ / √δ.
"""

from __future__ import annotations

import math
from typing import NamedTuple

NODE = 1 - 1e-4
"""Of the quadrature, in units of δ."""

RANGE_ROUNDINGS = 4.0
"""Of c², that are added to what the quadrature makes of it."""

SPOILT_SHARE = 1e-12
"""Of a diagonal entry of T: if no more is left, it is rounding."""


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


class RangeBound(NamedTuple):
    """The bound of e² by ‖u‖² ≤ c², as far as the iteration is; in the letters above.

    The last pivot of LLᵀ + δI is α² + ``excess``, its weight in the quadrature ``weight``.
    """

    squared: float  # c²
    alpha: float  # α_j², of the last row of L
    excess: float
    weight: float
    gauss: float  # ∫ dμ / (λ + δ), by the quadrature
    carried: float  # β_k / α_{k−1} of the iteration

    def of_error(self, delta: float, energy: float, rounding: float) -> float:
        """Return the bound of e², for products with a rounding relative to δ."""
        floor = RANGE_ROUNDINGS * rounding * self.squared
        return max(self.squared - delta * self.gauss - energy, 0.0) + floor


def range_bound(squared: float, size: float, delta: float) -> RangeBound | None:
    """Return the bound before the first iteration; none where nothing is known, or no damping is.

    ``size`` is ‖b‖.
    """
    if not (0 < squared < math.inf and delta > 0):
        return None
    alpha = size**2 / squared
    return RangeBound(squared, alpha, delta, 1.0, squared / (alpha + delta), 0.0)


def next_range_bound(
    before: RangeBound | None, alpha: float, beta: float, delta: float
) -> RangeBound | None:
    """Return the bound after an iteration with α_k and β_{k+1}; none where rounding spoils it."""
    if before is None:
        return None
    # β_{j+1}² from the diagonal of T, of which rounding may leave nothing.
    diagonal = 1 / alpha + before.carried
    subdiagonal = diagonal - delta - before.alpha
    if subdiagonal <= SPOILT_SHARE * diagonal:
        return None
    # The next row of L, and the pivots of LLᵀ + δI without a difference.
    following = beta / alpha**2 / subdiagonal
    pivot = before.alpha + before.excess
    weight = before.weight * before.alpha * subdiagonal / pivot**2
    excess = delta + subdiagonal * before.excess / pivot
    gauss = before.gauss + before.squared * weight / (following + excess)
    return RangeBound(before.squared, following, excess, weight, gauss, beta / alpha)


class ErrorBound(NamedTuple):
    """The bound of e² so far, ``squared``, and the quadratures that it is the least of."""

    squared: float
    ratio: float  # ρ_k
    within: RangeBound | None


def first_bound(rz: float, delta: float, before: float, within: RangeBound | None) -> ErrorBound:
    """Return the bound at the beginning of an iteration, where ``before`` is one already."""
    ratio = 1 / (NODE * delta) if delta else math.inf
    return ErrorBound(least(before, ratio, rz), ratio, within)


def least(before: float, ratio: float, rz: float) -> float:
    """Return the smaller of two bounds, of which an rᵀz that rounding made negative gives none."""
    if rz < 0:
        return before
    return min(before, ratio * rz) if rz else 0.0


def next_bound(
    before: ErrorBound,
    lengths: tuple[float, float],
    rz: float,
    energy: float,
    delta: float,
    rounding: float,
) -> ErrorBound:
    """Return the bound after an iteration with the ``lengths`` α_k and β_{k+1}.

    e² never grows, so the least of all bounds is one.
    """
    ratio = next_ratio(before.ratio, *lengths, NODE * delta)
    squared = least(before.squared, ratio, rz)
    within = next_range_bound(before.within, *lengths, delta)
    if within is not None:
        squared = min(squared, within.of_error(delta, energy, rounding))
    return ErrorBound(squared, ratio, within)
