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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ddnewton.columns.gram import Columns
from ddnewton.quadratic.gauss_newton import GaussNewton, check_eigenpairs_fit
from ddnewton.transforms import any_possible

COLUMN_ROUNDINGS = 32.0
"""From how many roundings upwards a length counts: a singular value, a part of the gradient."""


class Decomposition(NamedTuple):
    """Leading eigenpairs of K or G, ascending: of all eigenvalues, or of none but theirs.

    Of the eigenvalues ``below`` no vectors were computed; it is None where they are not known.
    """

    evals: Float[Tensor, " k"]
    evecs: Float[Tensor, "side k"]
    below: Float[Tensor, " _"] | None


class Spectrum(NamedTuple):
    """Eigenpairs, in float64 and ascending: all NM eigenvalues, the last r = min(NM, D) directions.

    Where few directions are asked for, these are the last r, and the eigenvalues may lack all
    others. ``rank`` counts the live ones among all whose eigenvalues are here.

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
    rank: Int[Tensor, ""]
    rounding: Float[Tensor, ""]  # of the decomposition: eigenvalues below it are not known
    sizes: Float[Tensor, " i"]  # ‖a_i‖
    outside_live: Callable[[Float[Tensor, " a"]], Float[Tensor, " j"]]
    to_parameters: Callable[[Float[Tensor, "k j"]], Float[Tensor, "k d"]]


def decompose(matrix: GaussNewton) -> Spectrum:
    """Return all eigenpairs of a Gauss-Newton matrix."""
    if not torch.compiler.is_compiling():  # which knows nothing of the system
        check_eigenpairs_fit(matrix)
    evals, evecs = torch.linalg.eigh(resolved_matrix(matrix))
    return spectrum_of(matrix, Decomposition(evals, evecs, evals[:0]))


def resolved_matrix(matrix: GaussNewton) -> Float[Tensor, "side side"]:
    """Return the matrix to decompose: G, or K of the columns that a decomposition can resolve.

    All other columns weigh nothing in it.
    """
    if not matrix.on_columns:
        return matrix.entries
    root, _ = _root_of_weights(matrix)
    return (root[:, None] * matrix.entries[: len(root)]).mul_(root)


def spectrum_of(matrix: GaussNewton, decomposition: Decomposition) -> Spectrum:
    """Return the spectrum of a matrix from eigenpairs of its `resolved_matrix`."""
    of_side = _of_columns if matrix.on_columns else _of_parameters
    return of_side(matrix, decomposition)


def _root_of_weights(matrix: GaussNewton) -> tuple[Float[Tensor, " i"], Bool[Tensor, " i"]]:
    """Return √w, zero where a column is not resolved, and which are; on the side of the columns."""
    curved = _resolved(matrix.weights * matrix.entries.diagonal())
    return torch.where(curved, matrix.weights, 0).sqrt(), curved


def _of_columns(matrix: GaussNewton, decomposition: Decomposition) -> Spectrum:
    """Return the spectrum from eigenpairs of the Gram matrix K = √w A₁ᵀA₁ √w."""
    products, i = matrix.entries, len(matrix.weights)
    padding = (0, len(products) - i)  # for the columns of the gradient alone
    lengths, (evals, evecs, below) = products.diagonal(), decomposition
    root, curved = _root_of_weights(matrix)
    diagonal = matrix.weights * lengths
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
        evals=_with(below, evals).clamp(min=0),
        evecs=evecs,
        column_slopes=column_slopes,
        vectors=vectors,
        live=live,
        faint=faint,
        resolved=resolved,
        rank=live.sum(),
        rounding=rounding,
        sizes=lengths.sqrt(),
        outside_live=outside_live,
        to_parameters=matrix.to_parameters,
    )


def _of_parameters(matrix: GaussNewton, decomposition: Decomposition) -> Spectrum:
    """Return the spectrum from eigenpairs of G; of leading ones alone, slopes along these alone."""
    evals, vectors, below = decomposition
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
        evals=evals.clamp(min=0) if below is None else padded(_with(below, evals), i),
        evecs=evecs[:, skipped:],
        column_slopes=column_slopes[:, skipped:],
        vectors=vectors[:, skipped:],
        live=live[skipped:],
        faint=faint[skipped:],
        resolved=resolved,
        rank=live.sum(),
        rounding=rounding,
        sizes=lengths.sqrt(),
        outside_live=outside_live,
        to_parameters=matrix.to_parameters,
    )


def eigenvalues(matrix: GaussNewton) -> Float[Tensor, " i"]:
    """Return all NM eigenvalues of a Gauss-Newton matrix, ascending."""
    return padded(torch.linalg.eigvalsh(matrix.matrix()), len(matrix.weights))


def padded(evals: Float[Tensor, " side"], i: int) -> Float[Tensor, " i"]:
    """Return i eigenvalues, none of them negative, with the zeros of further columns in front."""
    skipped = max(0, len(evals) - i)
    padded: Tensor = F.pad(evals[skipped:].clamp(min=0), (i - len(evals) + skipped, 0))
    return padded


def _with(below: Float[Tensor, " _"] | None, evals: Float[Tensor, " k"]) -> Float[Tensor, " _"]:
    """Return the eigenvalues that are known, ascending."""
    return evals if below is None else torch.cat([below, evals])


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
    of_columns: Tensor = column_rounding(columns) * (evecs.square().mT @ diagonal)
    rounding = rounding_of(evals, side)
    live = evals > of_columns + rounding
    return live, ~live & (of_columns < rounding), rounding


def column_rounding(columns: Columns) -> float:
    """Return the rounding of an eigenvalue, relative to the mean square of its columns."""
    return (COLUMN_ROUNDINGS * columns.eps) ** 2 + COLUMN_ROUNDINGS * columns.sums


def rounding_of(evals: Float[Tensor, " k"], side: int) -> Float[Tensor, ""]:
    """Return the rounding of a decomposition, by its largest eigenvalue."""
    rounding: Tensor = torch.finfo(evals.dtype).eps * side * evals[-1].abs()
    return rounding
