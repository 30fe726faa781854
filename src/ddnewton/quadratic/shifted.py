r"""All directions with one damping, for many dampings: (G + δI)⁻¹ g from one decomposition.

With the eigenpairs G = E Λ Eᵀ, or those of K = √w A₁ᵀA₁ √w on the side of the columns, a step and
its length cost O(side²) and O(side) for every further δ:

    s = −Σ_k c_k / (λ_k + δ) e_k,        ‖s‖² = Σ_k c_k² / (λ_k + δ)²,        c_k = e_kᵀ g,

where a factorization, fifteen times cheaper, serves one δ. Small problems are decomposed by the
rows R = √w A₁ᵀ themselves: with the singular values R = U Σ Vᵀ no R is multiplied with itself, and
curvatures down to eps² λ_max are resolved, in place of eps λ_max,

    s = −V Σ (Σ² + δ)⁻¹ Uᵀ z / (N √w).

Regressions with parameters of very different influence need these digits (NIST's MGH17), and so do
physics-informed nets once δ is as small as the rounding of K: there the loss of 1,185 parameters at
200 points stands at 1e-14 by K, and at 1e-22 by rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.quadratic.cholesky import as_coordinates, is_beyond, right_side
from ddnewton.quadratic.gauss_newton import GaussNewton

FEW_ENTRIES, SHORT_SIDE = 2**17, 64
"""Up to which number of entries, and which smaller side, rows are always decomposed in place of
their products: there the decomposition takes less than the rest of a step."""

MOST_ENTRIES, LONGEST_SIDE = 2**20, 512
"""The same where products have too few digits: there it takes some tenths of a second."""

LEAST_ROWS_EPS = 1e-12
"""Up to which rounding of the columns there are digits to be had of them."""

MOST_DIGITS_LOST = 1e6
"""How much larger than its summands a gradient may be in the units of singular values."""


class Shifted(NamedTuple):
    """The damped steps of one gradient, for all dampings.

    Eigenvalues λ and eigenvectors of K or G, the rounding that λ are known to, and c = Eᵀg. Of rows
    the eigenvectors are those of G, and λ and c are as many as the smaller side is long.
    ``project`` returns c of a gradient in the range of G, by the weights of its columns.
    """

    matrix: GaussNewton
    gradient_weights: Float[Tensor, " a"]
    evals: Float[Tensor, " side"]
    vectors: Float[Tensor, "_ side"]
    rounding: Float[Tensor, ""]
    project: Callable[[Float[Tensor, " a"]], Float[Tensor, " side"]]
    coefficients: Float[Tensor, " side"]
    in_parameters: bool  # whether the vectors are, or weights of columns


def shifted(
    matrix: GaussNewton,
    gradient_weights: Float[Tensor, " a"],
    rows: Callable[[], Float[Tensor, "i d"]],
    d: int,
    *,
    everywhere: bool,
    exact: bool,
) -> Shifted | None:
    """Return the steps of a gradient for all dampings; None where only directions give them.

    That is while compiling, and for a gradient beyond the range of G that is not damped
    ``everywhere``. ``exact`` ones have the digits of the ``rows`` R where these are not too many.
    """
    if torch.compiler.is_compiling():
        return None
    beyond = is_beyond(matrix, gradient_weights)
    if beyond and not everywhere:
        return None
    # By the rows where they are few, or else by their products.
    if not beyond and _has_few_rows(matrix, d, exact=exact):
        return _of_rows(matrix, gradient_weights, rows())
    evals, vectors = torch.linalg.eigh(matrix.matrix())
    rounding = torch.finfo(evals.dtype).eps * len(evals) * evals[-1].abs()

    def project(weights: Float[Tensor, " a"]) -> Float[Tensor, " side"]:
        right = right_side(matrix, weights, everywhere=True)
        assert right is not None
        coefficients: Tensor = vectors.mT @ right
        return coefficients

    return Shifted(
        matrix=matrix,
        gradient_weights=gradient_weights,
        evals=evals.clamp(min=0),
        vectors=vectors,
        rounding=rounding,
        project=project,
        coefficients=project(gradient_weights),
        in_parameters=not matrix.on_columns,
    )


def step_at(steps: Shifted, delta: Float[Tensor, ""]) -> Float[Tensor, " d"]:
    """Return the step for a damping δ."""
    solution = steps.vectors @ (steps.coefficients * _inverse(steps, delta))
    if steps.in_parameters:
        return -solution
    coordinates = as_coordinates(steps.matrix, steps.gradient_weights, solution, delta)
    return steps.matrix.to_parameters(coordinates[None])[0]


def of_gradient(steps: Shifted, gradient_weights: Float[Tensor, " a"]) -> Shifted:
    """Return the steps of another gradient in the range of G, by the weights of its columns."""
    coefficients = steps.project(gradient_weights)
    return steps._replace(gradient_weights=gradient_weights, coefficients=coefficients)


def squared_lengths(steps: Shifted, deltas: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Return ‖s‖² of the steps for some dampings, of a gradient on the range of G.

    On the side of the columns s = A₁ √w y, so that ‖s‖² = yᵀ K y.
    """
    squares = (steps.coefficients * _inverse(steps, deltas[:, None])).square()
    if not steps.in_parameters:
        squares = squares * steps.evals
    return squares.sum(1)


def _inverse(steps: Shifted, delta: Float[Tensor, "*k"]) -> Float[Tensor, "..."]:
    """Return 1 / (λ + δ), 0 where the sum is not resolved from rounding."""
    damped = steps.evals + delta
    resolved = damped > steps.rounding
    return torch.where(resolved, 1 / torch.where(resolved, damped, 1), 0)


def _has_few_rows(matrix: GaussNewton, d: int, *, exact: bool) -> bool:
    """Return whether rows are so few, and so precise, that they are decomposed themselves."""
    if matrix.columns.eps > LEAST_ROWS_EPS:
        return False
    i = len(matrix.weights)
    if i * d <= FEW_ENTRIES and min(i, d) <= SHORT_SIDE:
        return True
    return exact and i * d <= MOST_ENTRIES and min(i, d) <= LONGEST_SIDE


def _of_rows(
    matrix: GaussNewton, gradient_weights: Float[Tensor, " i"], rows: Float[Tensor, "i d"]
) -> Shifted:
    """Return the steps from the singular values of the rows R, with c = Σ Uᵀ t, t = z / N √w.

    A row of next to no weight is lost beside the largest, and its t is as much larger: where that
    is most of the gradient, c = Vᵀ (Rᵀ t), summed row by row.
    """
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    curved = matrix.weights > 0
    root = torch.where(curved, matrix.weights, 1).sqrt()
    # What is left of a singular value that vanishes is rounding, and no damping hides it.
    rounding = (torch.finfo(values.dtype).eps * max(rows.shape) * values[0]).square()
    resolved = values.square() > rounding
    lengths = torch.linalg.vector_norm(rows, dim=1)

    def project(weights: Float[Tensor, " i"]) -> Float[Tensor, " side"]:
        t = torch.where(curved, weights / root, 0)
        size = MOST_DIGITS_LOST * (lengths @ t.abs())
        is_lost = values[0] * torch.linalg.vector_norm(t) > size
        coefficients = torch.where(is_lost, right @ (rows.mT @ t), values * (left.mT @ t))
        return torch.where(resolved, coefficients, 0)

    return Shifted(
        matrix=matrix,
        gradient_weights=gradient_weights,
        evals=values.square(),
        vectors=right.mT,
        rounding=rounding,
        project=project,
        coefficients=project(gradient_weights),
        in_parameters=True,
    )
