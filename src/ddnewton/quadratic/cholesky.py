r"""All directions with one damping: −(G + δI)⁻¹ g without a single eigenpair.

With the columns A, the weights w = h / N and the gradient g = A z / N, the damped system is solved
on the smaller of its two sides,

    (A diag(w) Aᵀ + δI)⁻¹ A = A √w (√w AᵀA √w + δI)⁻¹ / √w,

by Cholesky's factorization, a tenth of the cost of eigenpairs. It needs a damping well above the
rounding of the matrix. A sample with a slope and no curvature leaves the range of G: there only
eigenpairs can tell what of g is inside, while all of g, damped everywhere, is

    (A₁ diag(w) A₁ᵀ + δI)⁻¹ g = (g − A₁ √w (√w A₁ᵀA₁ √w + δI)⁻¹ √w A₁ᵀ g) / δ,    A₁ = A's first i.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ddnewton.columns.gram import Columns, is_gram
from ddnewton.transforms import is_batched

CHOLESKY_CONDITION = 1e6
"""Up to which ratio of the largest curvature to δ all digits that matter are left."""

CHOLESKY_BLOCK = 96
"""Of how many columns at a time the factor is made."""


def damped_step(
    columns: Columns,
    weights: Float[Tensor, " i"],
    matrix: Float[Tensor, "side side2"],
    gradient_weights: Float[Tensor, " a"],
    delta: float | Tensor,
    *,
    everywhere: bool = False,
    condition: float = CHOLESKY_CONDITION,
) -> Float[Tensor, " j"] | None:
    """Return −(G + δI)⁻¹ g from a small matrix, or None where only eigenpairs give all digits.

    That is for the gradient on the range of G, or ``everywhere``. Like a spectrum's directions it
    is in coordinates: of the columns, or, on the other side, of the parameters.
    """
    delta = torch.as_tensor(delta, dtype=weights.dtype, device=weights.device)
    if any(map(is_batched, (weights, matrix, gradient_weights, delta))):
        return None
    i = len(weights)
    beyond = bool(((weights <= 0) & (gradient_weights[:i] != 0)).any()) or len(gradient_weights) > i
    gram_side = is_gram(matrix, weights)
    root = weights.sqrt() if gram_side else weights.new_ones(())
    damped = (root[:, None] * matrix[:i]).mul_(root) if gram_side else matrix.clone()
    if (beyond and not everywhere) or not damped.trace() <= condition * delta < math.inf:
        return None
    if not gram_side:
        right = columns.matmat(gradient_weights[None])[0]
    elif beyond:
        right = root * (matrix.mT @ gradient_weights)
    else:
        right = torch.where(weights > 0, gradient_weights / root, 0)
    damped.diagonal().add_(delta)
    factor, failed = _factorized(damped)
    half = torch.linalg.solve_triangular(factor, right[:, None], upper=False)
    solution: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)[:, 0]
    if failed or not solution.isfinite().all():
        return None
    if gram_side and beyond:
        return (F.pad(root * solution, (0, len(gradient_weights) - i)) - gradient_weights) / delta
    return -root * solution


def _factorized(own: Float[Tensor, "side side"]) -> tuple[Float[Tensor, "side side"], Tensor]:
    """Return a lower factor in the place of a matrix, one's own, and whether there is none.

    What lies above the diagonal is left there: torch's own function takes longer to clear it, and
    for new memory, than to factorize.
    """
    if not own.is_cpu:
        factor, failed = torch.linalg.cholesky_ex(own)
        return factor, failed
    failures = [own.new_zeros((), dtype=torch.int32)]
    for start in range(0, len(own), CHOLESKY_BLOCK):
        panel, end = own[start:, start : start + CHOLESKY_BLOCK], start + CHOLESKY_BLOCK
        panel.addmm_(own[start:, :start], own[start:end, :start].mT, alpha=-1)
        corner, failed = torch.linalg.cholesky_ex(panel[:CHOLESKY_BLOCK])
        below = torch.linalg.solve_triangular(
            corner.mT, panel[CHOLESKY_BLOCK:], upper=True, left=False
        )
        panel[:CHOLESKY_BLOCK], panel[CHOLESKY_BLOCK:] = corner, below
        failures.append(failed)
    return own, torch.stack(failures).any()
