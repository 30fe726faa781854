r"""All directions with one damping, for many dampings: (G + δI)⁻¹ g from one decomposition.

With the eigenpairs G = E Λ Eᵀ, or those of K = √w A₁ᵀA₁ √w on the side of the columns, a step and
its length cost O(side²) and O(side) for every further δ:

    s = −Σ_k c_k / (λ_k + δ) e_k,        ‖s‖² = Σ_k c_k² / (λ_k + δ)²,        c_k = e_kᵀ g,

where a factorization, fifteen times cheaper, serves one δ. Small problems are decomposed by the
rows R = √w A₁ᵀ themselves: with the singular values R = U Σ Vᵀ no R is multiplied with itself, and
curvatures down to eps² λ_max are resolved, in place of eps λ_max. Regressions with parameters of
very different influence need these digits (NIST's MGH17).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.quadratic.cholesky import as_coordinates, right_side
from ddnewton.quadratic.gauss_newton import GaussNewton

MOST_ROWS_ENTRIES, MOST_ROWS_SIDE = 2**17, 64
"""Up to which number of entries, and of parameters, rows are decomposed in place of their products:
there the decomposition takes less than the rest of a step."""

LEAST_ROWS_EPS = 1e-12
"""Up to which rounding of the columns there are digits to be had of them."""


class Shifted(NamedTuple):
    """The damped steps of one gradient, for all dampings.

    Eigenvalues λ and eigenvectors of K or G, the rounding that λ are known to, and c = Eᵀg.
    """

    matrix: GaussNewton
    gradient_weights: Float[Tensor, " a"]
    evals: Float[Tensor, " side"]
    vectors: Float[Tensor, "side side2"]
    rounding: Float[Tensor, ""]
    coefficients: Float[Tensor, " side"]


def shifted(
    matrix: GaussNewton, gradient_weights: Float[Tensor, " a"], *, everywhere: bool
) -> Shifted | None:
    """Return the steps of a gradient for all dampings; None where only directions give them.

    That is while compiling, and for a gradient beyond the range of G that is not damped
    ``everywhere``.
    """
    if torch.compiler.is_compiling():
        return None
    right = right_side(matrix, gradient_weights, everywhere=everywhere)
    if right is None:
        return None
    # By the rows where they are few, or else by their products.
    if _has_few_rows(matrix, gradient_weights):
        return _of_rows(matrix, gradient_weights)
    evals, vectors = torch.linalg.eigh(matrix.matrix())
    rounding = torch.finfo(evals.dtype).eps * len(evals) * evals[-1].abs()
    coefficients = vectors.mT @ right
    return Shifted(matrix, gradient_weights, evals.clamp(min=0), vectors, rounding, coefficients)


def step_at(steps: Shifted, delta: Float[Tensor, ""]) -> Float[Tensor, " j"]:
    """Return the step for a damping δ: in weights of the columns, or in parameters."""
    solution = steps.vectors @ (steps.coefficients * _inverse(steps, delta))
    return as_coordinates(steps.matrix, steps.gradient_weights, solution, delta)


def squared_lengths(steps: Shifted, deltas: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Return ‖s‖² of the steps for some dampings, of a gradient on the range of G.

    On the side of the columns s = A₁ √w y, so that ‖s‖² = yᵀ K y.
    """
    squares = (steps.coefficients * _inverse(steps, deltas[:, None])).square()
    if steps.matrix.on_columns:
        squares = squares * steps.evals
    return squares.sum(1)


def _inverse(steps: Shifted, delta: Float[Tensor, "*k"]) -> Float[Tensor, "..."]:
    """Return 1 / (λ + δ), 0 where neither is known to be more than nothing."""
    damped = steps.evals + delta
    known = damped > steps.rounding
    return torch.where(known, 1 / torch.where(known, damped, 1), 0)


def _has_few_rows(matrix: GaussNewton, gradient_weights: Float[Tensor, " a"]) -> bool:
    """Return whether rows make the gradient, and are so few that they are decomposed themselves."""
    i, side = len(matrix.weights), len(matrix.entries)
    if matrix.on_columns or len(gradient_weights) > i or matrix.columns.eps > LEAST_ROWS_EPS:
        return False
    return i * side <= MOST_ROWS_ENTRIES and side <= MOST_ROWS_SIDE


def _of_rows(matrix: GaussNewton, gradient_weights: Float[Tensor, " i"]) -> Shifted:
    """Return the steps from the singular values of the rows R, with c = Σ Uᵀ (z / N √w)."""
    side, root = len(matrix.entries), matrix.weights.sqrt()
    identity = torch.eye(side, dtype=root.dtype, device=root.device)
    rows = root[:, None] * matrix.columns.rmatmat(identity)
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    slopes = torch.where(matrix.weights > 0, gradient_weights / root, 0)
    return Shifted(
        matrix=matrix,
        gradient_weights=gradient_weights,
        evals=values.square(),
        vectors=right.mT,
        rounding=(torch.finfo(values.dtype).eps * side * values[0]).square(),
        coefficients=values * (left.mT @ slopes),
    )
