r"""Eigenpairs of the Gauss-Newton matrix, from whichever of its two sides is smaller.

With the columns A [d, i] and the weights w = h / N the Gauss-Newton matrix is G = A diag(w) Aᵀ
[d, d]. The Gram matrix K = √w AᵀA √w [i, i] has the same nonzero eigenvalues λ, and of a pair of
eigenvectors each gives the other:

    e = A √w u / √λ,        u = √w Aᵀe / √λ.

What a direction has to do with a single column is its slope along it, a_iᵀ e = √λ u_i / √w_i:
slopes and curvatures of every sample follow from it (`ddnewton.derivatives`). A column whose
weight is so small that K does not resolve it, on a sample the net is certain of, say, counts for
the gradient but not for the curvature; its slopes are the inner products AᵀA √w u / √λ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ddnewton.checks import check_derivatives
from ddnewton.gram import Columns
from ddnewton.transforms import possibly

NOISE = 1024.0
"""Rank tolerance in squared roundings: a singular value counts from 32 roundings upwards."""


class Spectrum(NamedTuple):
    """Eigenpairs, in float64 and ascending: all NM eigenvalues, the last r = min(NM, D) directions.

    A direction is written in coordinates j, weights of the columns on the Gram side and
    parameters on the other; ``lift`` turns coordinates into parameters. One that is not ``live``
    has no eigenvalue beyond rounding, and belongs to the null space.
    """

    evals: Float[Tensor, " i"]
    evecs: Float[Tensor, "i r"]  # u_k
    slopes: Float[Tensor, "i r"]  # a_iᵀ e_k
    span: Float[Tensor, "j r"]  # e_k
    live: Bool[Tensor, " r"]
    resolved: Bool[Tensor, " i"]  # the columns that count for the curvature
    stray: Callable[[Float[Tensor, " i"]], Float[Tensor, " j"]]  # Σ z_i a_i off the live directions
    lift: Callable[[Float[Tensor, " j"]], Float[Tensor, " d"]]


def decompose(columns: Columns, weights: Float[Tensor, " i"], d: int) -> Spectrum:
    """Return the eigenpairs of A diag(w) Aᵀ."""
    return (_gram_side if weights.shape[0] <= d else _parameter_side)(columns, weights)


def _gram_side(columns: Columns, weights: Float[Tensor, " i"]) -> Spectrum:
    inner = columns.gram()
    check_derivatives(inner)
    diagonal = weights * inner.diagonal()
    resolved = _resolved(diagonal)
    root = torch.where(resolved, weights, 0).sqrt()
    evals, evecs = torch.linalg.eigh(root[:, None] * inner * root)
    live = evals > _rank_tolerance(evals, evecs, diagonal, columns.eps)
    scale = torch.where(live, evals, 1).sqrt()
    span = torch.where(live, root[:, None] * evecs / scale, 0)
    # Dividing by √w keeps all digits where the column is resolved, multiplying by AᵀA does not.
    slopes = torch.where(live, scale * evecs, 0) / torch.where(resolved, root, 1)[:, None]
    if possibly(~resolved):
        slopes = torch.where(resolved[:, None], slopes, inner @ span)

    def stray(z: Float[Tensor, " i"]) -> Float[Tensor, " i"]:
        return z - span @ (slopes.mT @ z)

    return Spectrum(
        evals=evals.clamp(min=0),
        evecs=evecs,
        slopes=slopes,
        span=span,
        live=live,
        resolved=resolved,
        stray=stray,
        lift=columns.combine,
    )


def _parameter_side(columns: Columns, weights: Float[Tensor, " i"]) -> Spectrum:
    ggn = columns.outer(weights)
    check_derivatives(ggn)
    evals, span = torch.linalg.eigh(ggn)
    slopes = columns.project(span)
    diagonal = weights * slopes.square().sum(1)
    resolved = _resolved(diagonal)
    root = torch.where(resolved, weights, 0).sqrt()
    evecs: Tensor = F.normalize(root[:, None] * slopes, dim=0)
    live = evals > _rank_tolerance(evals, evecs, diagonal, columns.eps)
    slopes = torch.where(live | ~resolved[:, None], slopes, 0)

    def stray(z: Float[Tensor, " i"]) -> Float[Tensor, " d"]:
        part: Tensor = span @ torch.where(live, 0, slopes.mT @ z)
        return part

    return Spectrum(
        evals=F.pad(evals.clamp(min=0), (weights.shape[0] - evals.shape[0], 0)),
        evecs=evecs,
        slopes=slopes,
        span=span,
        live=live,
        resolved=resolved,
        stray=stray,
        lift=lambda coordinates: coordinates,
    )


def _resolved(diagonal: Float[Tensor, " i"]) -> Bool[Tensor, " i"]:
    """Return which columns stand out from the rounding of the decomposition itself."""
    rounding = torch.finfo(diagonal.dtype).eps * diagonal.shape[0]
    return diagonal > rounding * diagonal.amax()


def _rank_tolerance(
    evals: Float[Tensor, " r"],
    evecs: Float[Tensor, "i r"],
    diagonal: Float[Tensor, " i"],
    eps: float,
) -> Float[Tensor, " r"]:
    """Return the size below which an eigenvalue is rounding, for every direction its own.

    Columns are wrong by eps of their size, so an eigenvalue that ought to vanish comes out as
    eps² times the mean square of its columns, Σ_i u_i² K_ii. On a net that is certain of most
    samples columns differ by orders of magnitude, and a small eigenvalue made of small columns is
    as good as a large one; a tolerance relative to λ_max alone would lose the step.
    """
    mean_square: Tensor = evecs.square().mT @ diagonal
    return (
        NOISE * eps**2 * mean_square
        + torch.finfo(evals.dtype).eps * evals.shape[0] * evals[-1].abs()
    )
