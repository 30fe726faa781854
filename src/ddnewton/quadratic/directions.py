"""The directions that every block keeps, with the derivatives of the samples along them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ddnewton.quadratic.derivatives import (
    Derivatives,
    first_derivatives,
    over_all_samples,
    second_derivatives,
)
from ddnewton.quadratic.gauss_newton import GaussNewton
from ddnewton.quadratic.kept import BlockDirections, Directions, keep, selection_of
from ddnewton.quadratic.leading import spectrum_and_selection
from ddnewton.quadratic.quadratic_model import QuadraticModel
from ddnewton.quadratic.spectrum import decompose
from ddnewton.quadratic.unseen_samples import unseen_column_slopes


def directions_of(
    model: QuadraticModel,
    matrices: Sequence[GaussNewton],
    *,
    only_kept: bool = False,
    ranked: bool = False,
) -> list[BlockDirections]:
    """Return the directions of every block; if ``only_kept``, the spectrum may lack all others.

    If ``ranked`` as well, it tells the rank all the same.
    """
    spectra, kept = [], []
    for block, matrix in zip(model.blocks, matrices, strict=True):
        if only_kept:
            spectrum, selection = spectrum_and_selection(model, matrix, block.select, ranked=ranked)
        else:
            spectrum = decompose(matrix)
            selection = selection_of(spectrum, block.select, model.dtype)
        spectra.append(spectrum)
        kept.append(keep(spectrum, selection))
    derivatives = _derivatives(model, matrices, kept)
    return list(map(BlockDirections, model.blocks, spectra, kept, derivatives))


def _derivatives(
    model: QuadraticModel, matrices: Sequence[GaussNewton], kept: Sequence[Directions]
) -> list[Derivatives]:
    """Return γ and λ of the samples asked for, in their order, term by term.

    Those of a term are scaled so that the mean over the samples of all terms is the sum of the
    terms' means.
    """
    # The slopes of every term's columns: of those of the curvature, then of the gradient's own.
    counts = [term.z.numel() for term in model.terms]
    counts += [len(term.further_weights) for term in model.terms]
    slopes = [directions.column_slopes.split(counts) for directions in kept]
    parts: list[list[Derivatives]] = [[] for _ in kept]
    for t, term in enumerate(model.terms):
        of_curvature = [by_term[t] for by_term in slopes]
        further = [by_term[len(model.terms) + t] for by_term in slopes]
        gammas = list(map(partial(first_derivatives, z=term.z), of_curvature, further))
        lambdas = [second_derivatives(columns, term.h) for columns in of_curvature]
        # Of samples that the directions have not seen, λ alone.
        if term.unseen is not None:
            column_slopes = unseen_column_slopes(model, term, term.unseen, matrices, kept)
            unseen = [second_derivatives(columns, term.unseen.h) for columns in column_slopes]
            lambdas = [torch.cat(pair) for pair in zip(lambdas, unseen, strict=True)]
        # The rows of those that were asked for.
        gamma_rows, lambda_rows = (slice(None) if rows is None else rows for rows in term.rows)
        for b, (slope, curvature) in enumerate(zip(gammas, lambdas, strict=True)):
            parts[b].append(Derivatives(slope[gamma_rows], curvature[lambda_rows]))
    return [Derivatives(*map(over_all_samples, zip(*of_block, strict=True))) for of_block in parts]


def orthonormal(
    vectors: Float[Tensor, "k d"], evals: Float[Tensor, " k"], live: Bool[Tensor, " k"]
) -> Float[Tensor, "k d"]:
    """Return eigenvectors that are orthonormal to the last digit.

    Vectors made of columns are so up to the rounding of λ_max beside their eigenvalue. The error is
    taken out by Gram and Schmidt's process, from the largest eigenvalue down: it leaves those that
    are known best as they are.
    """
    order = evals.argsort(descending=True)
    place = order.argsort()
    overlaps = vectors @ vectors.mT + torch.diag_embed((~live).to(vectors))
    factor = torch.linalg.cholesky(overlaps[order][:, order])
    identity = torch.eye(len(order), dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
    return inverse[place][:, place] @ vectors
