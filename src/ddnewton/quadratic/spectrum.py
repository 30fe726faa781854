r"""Eigenpairs of the Gauss-Newton matrix, from whichever of its two sides is smaller.

With the columns A [d, i] and the weights w = h / N the Gauss-Newton matrix is G = A diag(w) Aᵀ
[d, d]. The Gram matrix K = √w AᵀA √w [i, i] has the same nonzero eigenvalues λ, and of a pair of
eigenvectors each gives the other:

    e = A √w u / √λ,        u = √w Aᵀe / √λ.

What a direction has to do with a single column is its slope along it, a_iᵀ e = √λ u_i / √w_i:
slopes and curvatures of every sample follow from it (`quadratic.derivatives`). A column whose
weight is so small that K does not resolve it, on a sample the net is certain of, say, counts for
the gradient but not for the curvature; its slopes are the inner products AᵀA √w u / √λ. So are
those of the columns that never had a weight: parts of the gradient, counted after the others.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ddnewton.columns.gram import Columns
from ddnewton.iterative.lanczos import leading_eigenpairs, start_block
from ddnewton.process import ONE_THREAD
from ddnewton.quadratic.gauss_newton import GaussNewton, check_eigenpairs_fit
from ddnewton.transforms import any_possible, is_batched

COLUMN_ROUNDINGS = 32.0
"""From how many roundings upwards a length counts: a singular value, a part of the gradient."""

LEADING_FROM, LEADING_SHARE = 256, 8
"""From which size on, and from how many times fewer, only leading eigenpairs are computed."""


LEADING_RESIDUAL = 1e-13
"""The residuals of leading eigenpairs by products, relative to the largest eigenvalue."""


class Spectrum(NamedTuple):
    """Eigenpairs, in float64 and ascending: all NM eigenvalues, the last r = min(NM, D) directions.

    Columns are counted as those NM of the curvature, i, or as all of them, a. A direction is
    written in coordinates j: weights of the columns on their side, parameters on the other;
    ``to_parameters`` turns coordinates into parameters. A direction that is not ``live`` has no
    eigenvalue beyond rounding. If that is the rounding of the decomposition, not of the columns, it
    is ``faint``: of its curvature nothing is known but that it is as good as zero, while the slope
    along it, the root of the curvature, may be large enough to matter. ``outside_live`` returns, of
    Σ z_i a_i, the part outside the live directions.
    """

    evals: Float[Tensor, " i"]
    evecs: Float[Tensor, "i r"]  # u_k
    column_slopes: Float[Tensor, "a r"]  # a_iᵀ e_k
    vectors: Float[Tensor, "j r"]  # e_k
    live: Bool[Tensor, " r"]
    faint: Bool[Tensor, " r"]
    resolved: Bool[Tensor, " a"]  # the columns that count for the curvature
    rounding: Float[Tensor, ""]  # of the decomposition: eigenvalues below it are not known
    sizes: Float[Tensor, " i"]  # ‖a_i‖
    outside_live: Callable[[Float[Tensor, " a"]], Float[Tensor, " j"]]
    to_parameters: Callable[[Float[Tensor, "k j"]], Float[Tensor, "k d"]]


def decompose(matrix: GaussNewton, leading: int | None = None) -> Spectrum:
    """Return the eigenpairs of a Gauss-Newton matrix.

    Where only the ``leading`` ones are asked for, computing these is half the work, or less.
    """
    if matrix.on_columns or leading is None:
        check_eigenpairs_fit(matrix)
    return _of_columns(matrix, leading) if matrix.on_columns else _of_parameters(matrix, leading)


def _of_columns(matrix: GaussNewton, leading: int | None) -> Spectrum:
    """Return the eigenpairs from the Gram matrix K = √w A₁ᵀA₁ √w."""
    weights, products, i = matrix.weights, matrix.entries, len(matrix.weights)
    padding = (0, len(products) - i)  # for the columns of the gradient alone
    # K, of the columns that the decomposition can resolve; the rest of them weigh nothing in it.
    lengths = products.diagonal()
    diagonal = weights * lengths
    curved = _resolved(diagonal)
    root = torch.where(curved, weights, 0).sqrt()
    evals, evecs = _eigh((root[:, None] * products[:i]).mul_(root), leading)
    live, faint, rounding = _judge(evals, evecs, diagonal, matrix.columns, i)
    # The directions e = A √w u / √λ, as weights of the columns.
    scale = torch.where(live, evals, 1).sqrt()
    vectors = torch.where(live, root[:, None] * evecs / scale, 0)
    # The slopes a_iᵀe. Dividing by √w keeps all digits where the column is resolved, multiplying by
    # AᵀA does not.
    column_slopes = torch.where(live, scale * evecs, 0) / torch.where(curved, root, 1)[:, None]
    if any_possible(~curved):
        column_slopes = torch.where(curved[:, None], column_slopes, products[:i] @ vectors)
    column_slopes = torch.cat([column_slopes, products[i:] @ vectors])
    vectors, resolved = F.pad(vectors, (0, 0, *padding)), F.pad(curved, padding)

    def outside_live(z: Float[Tensor, " a"]) -> Float[Tensor, " a"]:
        # Of unresolved columns all but their part along the directions; of the others the part
        # along faint directions.
        flat = torch.where(resolved, 0, z)
        faint_part = torch.where(faint, evecs.mT @ torch.where(curved, z[:i] / root, 0), 0)
        part: Tensor = flat - vectors @ (column_slopes.mT @ flat)
        return part + F.pad(root * (evecs @ faint_part), padding)

    return Spectrum(
        evals=evals.clamp(min=0),
        evecs=evecs,
        column_slopes=column_slopes,
        vectors=vectors,
        live=live,
        faint=faint,
        resolved=resolved,
        rounding=rounding,
        sizes=lengths.sqrt(),
        outside_live=outside_live,
        to_parameters=matrix.to_parameters,
    )


def _of_parameters(matrix: GaussNewton, leading: int | None) -> Spectrum:
    """Return the eigenpairs from G itself; of leading ones alone, slopes along these alone."""
    evals, vectors = _leading_of(matrix.entries, leading) or torch.linalg.eigh(matrix.entries)
    # The slopes of the columns are inner products, and tell which columns are resolved.
    i, column_slopes = len(matrix.weights), matrix.columns.rmatmat(vectors)
    lengths = column_slopes[:i].square().sum(1)
    diagonal = matrix.weights * lengths
    curved = _resolved(diagonal)
    # The eigenvectors of the Gram matrix, u = √w Aᵀe / √λ.
    root = torch.where(curved, matrix.weights, 0).sqrt()
    evecs: Tensor = F.normalize(root[:, None] * column_slopes[:i], dim=0)
    live, faint, rounding = _judge(evals, evecs, diagonal, matrix.columns, len(matrix.entries))
    resolved = F.pad(curved, (0, len(column_slopes) - i))
    column_slopes = torch.where(live | faint | ~resolved[:, None], column_slopes, 0)

    def outside_live(z: Float[Tensor, " i"]) -> Float[Tensor, " d"]:
        part: Tensor = vectors @ torch.where(live, 0, column_slopes.mT @ z)
        return part

    # Of fewer columns than parameters, as many directions as columns.
    skipped = max(0, len(evals) - i)
    return Spectrum(
        evals=evals.clamp(min=0) if len(evals) < len(matrix.entries) else _padded(evals, i),
        evecs=evecs[:, skipped:],
        column_slopes=column_slopes[:, skipped:],
        vectors=vectors[:, skipped:],
        live=live[skipped:],
        faint=faint[skipped:],
        resolved=resolved,
        rounding=rounding,
        sizes=lengths.sqrt(),
        outside_live=outside_live,
        to_parameters=matrix.to_parameters,
    )


def _leading_of(
    matrix: Float[Tensor, "d d"], leading: int | None
) -> tuple[Float[Tensor, " k"], Float[Tensor, "d k"]] | None:
    """Return leading eigenpairs by Lanczos's method; None for all, and where few are no gain."""
    d = len(matrix)
    if leading is None or LEADING_SHARE * leading > d or d < LEADING_FROM or is_batched(matrix):
        return None
    pairs = leading_eigenpairs(
        lambda block: matrix @ block,
        d,
        leading,
        tol=LEADING_RESIDUAL,
        limit=d,
        start=start_block(d, matrix.device),
    )
    return (pairs.evals, pairs.vectors) if pairs.converged else None


def eigenvalues(matrix: GaussNewton) -> Float[Tensor, " i"]:
    """Return all NM eigenvalues of a Gauss-Newton matrix, ascending."""
    return _padded(torch.linalg.eigvalsh(matrix.matrix()), len(matrix.weights))


def _padded(evals: Float[Tensor, " side"], i: int) -> Float[Tensor, " i"]:
    """Return i eigenvalues, none of them negative, with the zeros of further columns in front."""
    skipped = max(0, len(evals) - i)
    padded: Tensor = F.pad(evals[skipped:].clamp(min=0), (i - len(evals) + skipped, 0))
    return padded


def _eigh(
    matrix: Float[Tensor, "i i"], leading: int | None
) -> tuple[Float[Tensor, " k"], Float[Tensor, "i k"]]:
    """Return eigenpairs, the leading ones by LAPACK's subset driver where SciPy has it at hand."""
    count = matrix.shape[0]
    if leading is not None and LEADING_SHARE * leading <= count and count >= LEADING_FROM:
        # Looked for only here: on small problems the search would take as long as the rest.
        at_hand = find_spec("scipy") and find_spec("threadpoolctl")
        if at_hand and not (matrix.is_cuda or is_batched(matrix)):
            return _subset(matrix, leading)
    evals, evecs = torch.linalg.eigh(matrix)
    return evals, evecs


def _subset(
    matrix: Float[Tensor, "i i"], count: int
) -> tuple[Float[Tensor, " k"], Float[Tensor, "i k"]]:
    """Return so many of the largest eigenvalues, ascending, and their eigenvectors."""
    from scipy.linalg import eigh  # noqa: PLC0415 - importing ddnewton must stay light
    from threadpoolctl import threadpool_limits  # noqa: PLC0415

    # SciPy's threads and torch's would wait for each other's cores.
    with ONE_THREAD, threadpool_limits(1, user_api="blas"):
        subset = (len(matrix) - count, len(matrix) - 1)
        evals, evecs = eigh(matrix.numpy(), subset_by_index=subset, driver="evr")
    return torch.from_numpy(evals), torch.from_numpy(evecs)


def _resolved(diagonal: Float[Tensor, " i"]) -> Bool[Tensor, " i"]:
    """Return a mask of the columns that stand out from the rounding of the decomposition."""
    rounding = torch.finfo(diagonal.dtype).eps * diagonal.shape[0]
    return diagonal > rounding * diagonal.amax()


def _judge(
    evals: Float[Tensor, " r"],
    evecs: Float[Tensor, "i r"],
    diagonal: Float[Tensor, " i"],
    columns: Columns,
    side: int,
) -> tuple[Bool[Tensor, " r"], Bool[Tensor, " r"], Float[Tensor, ""]]:
    """Return masks of the live and the faint directions, and the decomposition's rounding.

    Columns are wrong by eps of their size, so an eigenvalue that ought to vanish comes out as
    eps² times the mean square of its columns, Σ_i u_i² K_ii; where their products are summed in
    float32, as the eps of those sums times that. On a net that is certain of most samples columns
    differ by orders of magnitude, and a small eigenvalue made of small columns is as good as a
    large one; a tolerance relative to λ_max alone would lose the step.
    """
    column, total = COLUMN_ROUNDINGS * columns.eps, COLUMN_ROUNDINGS * columns.sums
    of_columns: Tensor = (column**2 + total) * (evecs.square().mT @ diagonal)
    rounding: Tensor = torch.finfo(evals.dtype).eps * side * evals[-1].abs()
    live = evals > of_columns + rounding
    return live, ~live & (of_columns < rounding), rounding
