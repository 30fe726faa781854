r"""All directions with one damping: −(G + δI)⁻¹ g without a single eigenpair.

With the columns A, the weights w = h / N and the gradient g = A z / N, the damped system is solved
on the smaller of its two sides,

    (A diag(w) Aᵀ + δI)⁻¹ A = A √w (√w AᵀA √w + δI)⁻¹ / √w,

by Cholesky's factorization, a tenth of the cost of eigenpairs. It needs a damping well above the
rounding of the matrix; and a sample with a slope and no curvature leaves the range of G, where
only eigenpairs can follow it.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.gram import Columns, is_gram
from ddnewton.transforms import is_batched

CONDITION = 1e6
"""Up to which ratio of the largest curvature to δ all digits that matter are left."""


def damped_step(
    columns: Columns,
    weights: Float[Tensor, " i"],
    matrix: Float[Tensor, "side side2"],
    shares: Float[Tensor, " a"],
    delta: float | Tensor,
) -> Float[Tensor, " j"] | None:
    """Return −(G + δI)⁻¹ g from a small matrix, or None where only eigenpairs give all digits.

    Like a spectrum's directions it is in coordinates: of the columns, or, on the other side, of the
    parameters.
    """
    delta = torch.as_tensor(delta, dtype=weights.dtype, device=weights.device)
    if len(shares) > len(weights) or any(map(is_batched, (weights, matrix, shares, delta))):
        return None
    outside = (weights <= 0) & (shares != 0)
    gram_side = is_gram(matrix, weights)
    root = weights.sqrt() if gram_side else weights.new_ones(())
    matrix = (root[:, None] * matrix).mul_(root) if gram_side else matrix.clone()
    if outside.any() or not matrix.trace() <= CONDITION * delta < math.inf:
        return None
    right = (
        torch.where(weights > 0, shares / root, 0)
        if gram_side
        else columns.combine(shares[None])[0]
    )
    matrix.diagonal().add_(delta)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    solution = -torch.cholesky_solve(right[:, None], factor)[:, 0]
    if failed or not solution.isfinite().all():
        return None
    return root * solution
