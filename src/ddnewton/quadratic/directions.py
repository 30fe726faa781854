"""The directions that every block keeps, with the derivatives of the samples along them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.quadratic.derivatives import Derivatives, first_derivatives, second_derivatives
from ddnewton.quadratic.gauss_newton import GaussNewton
from ddnewton.quadratic.kept import BlockDirections, Directions, keep
from ddnewton.quadratic.quadratic_model import QuadraticModel
from ddnewton.quadratic.spectrum import decompose
from ddnewton.quadratic.unseen_samples import unseen_column_slopes
from ddnewton.select import Leading


def directions_of(
    model: QuadraticModel, matrices: Sequence[GaussNewton], *, only_kept: bool = False
) -> list[BlockDirections]:
    """Return the directions of every block; if ``only_kept``, the spectrum may lack all others."""
    spectra, kept = [], []
    for block, matrix in zip(model.blocks, matrices, strict=True):
        leading = block.select.k if only_kept and isinstance(block.select, Leading) else None
        spectra.append(decompose(matrix, leading))
        kept.append(keep(spectra[-1], block.select, model.dtype))
    derivatives = _derivatives(model, matrices, kept)
    return list(map(BlockDirections, model.blocks, spectra, kept, derivatives))


def _derivatives(
    model: QuadraticModel, matrices: Sequence[GaussNewton], kept: Sequence[Directions]
) -> list[Derivatives]:
    """Return γ and λ of the samples asked for, in their order."""
    # Of the samples that the columns are of.
    count = len(model.curvature_weights)
    gammas = [first_derivatives(directions.column_slopes, model.z) for directions in kept]
    lambdas = [second_derivatives(block.column_slopes[:count], model.h) for block in kept]
    # Of samples that the directions have not seen, λ alone.
    if model.unseen is not None:
        column_slopes = unseen_column_slopes(model, model.unseen, matrices, kept)
        unseen = [second_derivatives(slopes, model.unseen.h) for slopes in column_slopes]
        lambdas = [torch.cat(pair) for pair in zip(lambdas, unseen, strict=True)]
    # The rows of those that were asked for.
    gamma_rows, lambda_rows = (slice(None) if rows is None else rows for rows in model.rows)
    pairs = zip(gammas, lambdas, strict=True)
    return [Derivatives(slope[gamma_rows], curvature[lambda_rows]) for slope, curvature in pairs]


def orthonormal(vectors: Float[Tensor, "k d"], kept: Directions) -> Float[Tensor, "k d"]:
    """Return eigenvectors that are orthonormal to the last digit.

    Vectors made of columns are so up to the rounding of λ_max beside their eigenvalue. The error is
    taken out by Gram and Schmidt's process, from the largest eigenvalue down: it leaves those that
    are known best as they are.
    """
    order = kept.evals.argsort(descending=True)
    place = order.argsort()
    overlaps = vectors @ vectors.mT + torch.diag_embed((~kept.live).to(vectors))
    factor = torch.linalg.cholesky(overlaps[order][:, order])
    identity = torch.eye(len(order), dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
    return inverse[place][:, place] @ vectors
