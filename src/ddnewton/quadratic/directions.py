"""The directions that are kept, and the slopes and curvatures of the samples along them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.inputs.groups import Block
from ddnewton.quadratic.derivatives import Derivatives, first_derivatives, second_derivatives
from ddnewton.quadratic.kept import Directions, keep
from ddnewton.quadratic.quadratic_model import GaussNewton, QuadraticModel
from ddnewton.quadratic.spectrum import Spectrum, decompose
from ddnewton.quadratic.unseen_samples import unseen_slopes
from ddnewton.select import Leading


class BlockDirections(NamedTuple):
    """A block with its directions, and what is known along them."""

    block: Block
    spectrum: Spectrum
    kept: Directions
    derivatives: Derivatives


def directions_of(
    problem: QuadraticModel, systems: Sequence[GaussNewton], *, only_kept: bool = False
) -> list[BlockDirections]:
    """Return the directions that every block keeps; those alone if ``only_kept``."""
    spectra, kept = [], []
    for block, system in zip(problem.blocks, systems, strict=True):
        leading = block.select.k if only_kept and isinstance(block.select, Leading) else None
        spectra.append(decompose(*system, leading))
        kept.append(keep(spectra[-1], block.select, problem.dtype))
    derivatives = _derivatives(problem, systems, kept)
    return list(map(BlockDirections, problem.blocks, spectra, kept, derivatives))


def _derivatives(
    problem: QuadraticModel,
    systems: Sequence[GaussNewton],
    kept: Sequence[Directions],
) -> list[Derivatives]:
    """Return the derivatives of the samples asked for, in their order."""
    gammas = [first_derivatives(each.column_slopes, problem.z) for each in kept]
    seen = [each.column_slopes[: len(problem.curvature_weights)] for each in kept]
    lambdas = [second_derivatives(slopes, problem.h) for slopes in seen]
    if problem.unseen is not None:
        unseen = unseen_slopes(problem, problem.unseen, systems, kept)
        further = [second_derivatives(slopes, problem.unseen.h) for slopes in unseen]
        lambdas = [torch.cat(pair) for pair in zip(lambdas, further, strict=True)]
    chosen = (problem.gamma_rows, problem.lambda_rows)
    rows = [slice(None) if row is None else row for row in chosen]
    pairs = zip(gammas, lambdas, strict=True)
    return [Derivatives(gamma[rows[0]], curvature[rows[1]]) for gamma, curvature in pairs]


def orthonormal(vectors: Float[Tensor, "k d"], kept: Directions) -> Float[Tensor, "k d"]:
    """Return eigenvectors that are orthonormal to the last digit.

    Vectors made of columns are so up to the rounding of λ_max beside their eigenvalue. What is left
    is taken out by Gram and Schmidt's process, from the largest eigenvalue down: it leaves those
    that are known best as they are.
    """
    order = kept.evals.argsort(descending=True)
    place = order.argsort()
    overlaps = vectors @ vectors.mT + torch.diag_embed((~kept.live).to(vectors))
    factor = torch.linalg.cholesky(overlaps[order][:, order])
    identity = torch.eye(len(order), dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
    return inverse[place][:, place] @ vectors
