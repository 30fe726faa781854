"""The quadratic model of some of the parameters, while others are held where they are.

Everything keeps its size: a parameter that is held has a scale of zero, and so a row of zeros in
the columns A.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ddnewton.columns.gram import columns_of
from ddnewton.quadratic.gauss_newton import GaussNewton, block_matrices
from ddnewton.quadratic.quadratic_model import QuadraticModel
from ddnewton.transforms import any_known


def of_free(
    model: QuadraticModel, matrices: Sequence[GaussNewton], free: Bool[Tensor, " d"]
) -> tuple[QuadraticModel, list[GaussNewton]]:
    """Return model and matrices of the free parameters."""
    if not any_known(~free):
        return model, list(matrices)
    before, mask = model.jacobians[0].scale, free.to(model.curvature_weights)
    scale = mask if before is None else mask * before
    jacobians = [jacobian._replace(scale=scale) for jacobian in model.jacobians]
    weights = model.curvature_weights, model.gradient_weights
    parts, masked = mask.split(list(model.sizes)), []
    for matrix, leaves in zip(matrices, model.leaves, strict=True):
        # A contraction of columns on their side, zeros on that of the parameters.
        if matrix.on_columns:
            masked += block_matrices(jacobians, len(model.terms), [leaves], *weights)
        else:
            own = torch.cat([mask[:0], *(parts[leaf] for leaf in leaves)])
            masked.append(_masked(matrix, own)._replace(columns=columns_of(jacobians, leaves)))
    return model._replace(jacobians=jacobians), masked


def _masked(matrix: GaussNewton, mask: Float[Tensor, " d"]) -> GaussNewton:
    """Return G and g with zeros where the mask has them."""
    return matrix._replace(
        entries=mask[:, None] * matrix.entries * mask, gradient=mask * matrix.gradient
    )
