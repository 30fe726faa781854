r"""All directions with one damping: −(G + δI)⁻¹ g without a single eigenpair.

With the columns A, the weights w = h / N and the gradient g = A z / N, the damped system is solved
on the smaller of its two sides,

    (A diag(w) Aᵀ + δI)⁻¹ A = A √w (√w AᵀA √w + δI)⁻¹ / √w,

by Cholesky's factorization, a tenth of the cost of eigenpairs. It needs a damping well above the
rounding of the matrix; a compiled step, which cannot look, is nan where there is no factor. A
sample with a slope and no curvature leaves the range of G: there only eigenpairs can tell what of g
is inside, while all of g, damped everywhere, is

    (A₁ diag(w) A₁ᵀ + δI)⁻¹ g = (g − A₁ √w (√w A₁ᵀA₁ √w + δI)⁻¹ √w A₁ᵀ g) / δ,    A₁ = A's first i.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ddnewton.quadratic.gauss_newton import GaussNewton
from ddnewton.scalars import scalar_like
from ddnewton.transforms import any_known, is_batched

CHOLESKY_CONDITION = 1e6
"""Up to which ratio of the largest curvature to δ all digits that matter are left."""

CHOLESKY_BLOCK = 96
"""Of how many columns at a time the factor is made."""

SHARED_SIDE, SHARED_SIDE_ON_GPUS = 2048, 10240
"""From which side on several ranks factorize a matrix: of a smaller one, what travels takes longer
than what is saved. The second is on paper, for links of 25 GB/s and 10 TFlop/s."""

LEAST_WEIGHT = 1e-200
"""The least weight of a column beside the largest in a factorization: smaller ones are as good as
zero."""


def damped_step(
    matrix: GaussNewton,
    gradient_weights: Float[Tensor, " a"],
    delta: float | Tensor,
    *,
    everywhere: bool = False,
    condition: float = CHOLESKY_CONDITION,
) -> Float[Tensor, " j"] | None:
    """Return −(G + δI)⁻¹ g, or None where only eigenpairs give all digits.

    That is for the gradient on the range of G, or ``everywhere``. Like a spectrum's directions it
    is in coordinates: of the columns, or, on the other side, of the parameters.
    """
    weights, compiling = matrix.weights, torch.compiler.is_compiling()
    if compiling and isinstance(delta, Real) and delta <= 0:
        return None
    delta = scalar_like(delta, weights)
    batched = any(map(is_batched, (weights, matrix.entries, gradient_weights, delta)))
    if batched and not compiling:
        return None
    # None for a damping too small for a factorization, and a gradient beyond the range of G.
    if any_known(~((matrix.trace() <= condition * delta) & delta.isfinite())):
        return None
    right = right_side(matrix, gradient_weights, everywhere=everywhere)
    if right is None:
        return None
    # K + δI or G + δI = L Lᵀ, and two triangular solves.
    in_place = not compiling and (_is_large(matrix) or _is_shared(matrix))
    solved = _in_place if in_place else _of_copy
    solution, failed = solved(matrix, right, delta)
    if any_known((failed != 0) | ~solution.isfinite().all()):
        return None
    if compiling:
        solution = torch.where(failed == 0, solution, torch.nan)
    return as_coordinates(matrix, gradient_weights, solution, delta)


def _of_copy(
    matrix: GaussNewton, right: Float[Tensor, " side"], delta: Tensor
) -> tuple[Float[Tensor, " side"], Bool[Tensor, ""] | Int[Tensor, ""]]:
    """Return the solution of a damped system by a copy of its matrix, and whether there is none."""
    damped = matrix.matrix()
    damped.diagonal().add_(delta)
    factor, failed = torch.linalg.cholesky_ex(damped)
    return _solution(factor, right), failed


def _in_place(
    matrix: GaussNewton, right: Float[Tensor, " side"], delta: Tensor
) -> tuple[Float[Tensor, " side"], Bool[Tensor, ""] | Int[Tensor, ""]]:
    """Return the solution of a damped system, and whether there is none, without a copy.

    The factor is written over the lower triangle of the matrix, which is put back from the upper
    one. On the side of the columns this is AᵀA, not K: with the roots of the weights as a diagonal
    matrix √w, K + δI = √w (AᵀA + δ/w) √w. A Cholesky factorization is as exact in all such units. A
    column without weight is one of the least weight there is, whose δ/w leaves nothing beside it.
    """
    side, root = len(right), torch.ones_like(right)
    if matrix.on_columns:
        root = torch.maximum(matrix.weights, LEAST_WEIGHT * matrix.weights.amax()).sqrt()
    # By all ranks that have columns of it, or by this process.
    entries, shifts = matrix.entries[:side], delta / root.square()
    corners: list[Tensor] = []
    try:
        if matrix.of_ranks is not None and _is_shared(matrix):
            corners += _corners(entries)
            failed = matrix.of_ranks.factorized(entries, shifts)
        else:
            failed = _factorized(entries, shifts, corners)
        return _solution(entries, right / root) / root, failed
    finally:
        _put_back(entries, corners)


def _solution(
    factor: Float[Tensor, "side side"], right: Float[Tensor, " side"]
) -> Float[Tensor, " side"]:
    """Return the solution of a system by its lower factor; what is above that is not read."""
    half = torch.linalg.solve_triangular(factor, right[:, None], upper=False)
    solution: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)[:, 0]
    return solution


def right_side(
    matrix: GaussNewton, gradient_weights: Float[Tensor, " a"], *, everywhere: bool
) -> Float[Tensor, " side"] | None:
    """Return the right side of the damped system; None for a gradient beyond the range of G.

    It is g itself, √w A₁ᵀg where all of g is damped, or z / N √w where A √w spans it.
    """
    weights = matrix.weights
    beyond = is_beyond(matrix, gradient_weights)
    if beyond and not everywhere:
        return None
    if not matrix.on_columns:
        return matrix.coordinates(gradient_weights)
    root = weights.sqrt()
    if beyond:
        return root * (matrix.entries.mT @ gradient_weights)
    return torch.where(weights > 0, gradient_weights / root, 0)


def as_coordinates(
    matrix: GaussNewton,
    gradient_weights: Float[Tensor, " a"],
    solution: Float[Tensor, " side"],
    delta: Tensor,
) -> Float[Tensor, " j"]:
    """Return the step that a solution of the damped system gives: weights of columns, or itself.

    On the side of the parameters the solution is the step, but for its sign.
    """
    if not matrix.on_columns:
        return -solution
    root = matrix.weights.sqrt()
    if is_beyond(matrix, gradient_weights):
        inside = F.pad(root * solution, (0, len(gradient_weights) - len(root)))
        return torch.where(delta > 0, (inside - gradient_weights) / delta, 0)
    return -root * solution


def is_beyond(matrix: GaussNewton, gradient_weights: Float[Tensor, " a"]) -> bool:
    """Return whether a part of the gradient is of columns without curvature."""
    i = len(matrix.weights)
    if len(gradient_weights) > i:
        return True
    return any_known((matrix.weights <= 0) & (gradient_weights != 0))


def _is_large(matrix: GaussNewton) -> bool:
    """Return whether a matrix is so long that it takes less time and memory by blocks."""
    return matrix.entries.is_cpu and matrix.side > 2 * CHOLESKY_BLOCK


def _is_shared(matrix: GaussNewton) -> bool:
    """Return whether a matrix is factorized by several ranks."""
    least = SHARED_SIDE if matrix.entries.is_cpu else SHARED_SIDE_ON_GPUS
    return matrix.of_ranks is not None and matrix.side >= least


def _factorized(
    matrix: Float[Tensor, "side side"], shifts: Float[Tensor, " side"], corners: list[Tensor]
) -> Bool[Tensor, ""]:
    """Factorize a matrix with shifts of its diagonal; return whether it has no factor.

    This is written over the matrix; what lies above the blocks on the diagonal is left there. The
    blocks are put among the ``corners`` before.
    """
    block = CHOLESKY_BLOCK
    failures = [matrix.new_zeros((), dtype=torch.int32)]
    for start in range(0, len(matrix), block):
        # Take from the next columns what the factor so far explains of them.
        panel, end = matrix[start:, start : start + block], start + block
        corners.append(panel[:block].clone())
        panel[:block].diagonal().add_(shifts[start:end])
        panel.addmm_(matrix[start:, :start], matrix[start:end, :start].mT, alpha=-1)
        # Factorize the block on the diagonal, and solve for the rows below it.
        corner, failed = torch.linalg.cholesky_ex(panel[:block])
        below = torch.linalg.solve_triangular(corner.mT, panel[block:], upper=True, left=False)
        panel[:block], panel[block:] = corner, below
        failures.append(failed)
    return torch.stack(failures).any()


def _corners(matrix: Float[Tensor, "side side"]) -> list[Float[Tensor, "_ _"]]:
    """Return the blocks on the diagonal of a matrix."""
    starts = range(0, len(matrix), CHOLESKY_BLOCK)
    blocks = (slice(start, start + CHOLESKY_BLOCK) for start in starts)
    return [matrix[block, block].clone() for block in blocks]


def _put_back(matrix: Float[Tensor, "side side"], corners: Sequence[Float[Tensor, "_ _"]]) -> None:
    """Put a symmetric matrix back over its factor, from what lies above that and the corners."""
    block = CHOLESKY_BLOCK
    for number, corner in enumerate(corners):
        start, end = number * block, (number + 1) * block
        matrix[start:end, start:end] = corner
        matrix[end:, start:end] = matrix[start:end, end:].mT
