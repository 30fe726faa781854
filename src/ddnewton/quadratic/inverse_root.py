r"""A root of the inverse of the Gauss-Newton matrix, to as many digits as the columns have.

With the rows √w_i a_i as a matrix B [i, d], G = BᵀB. Forming G would square the condition number,
so that B is factorized itself,

    B = Q R,    R = T diag(c),    T = U S Vᵀ,    G⁻¹ = W Wᵀ with W = diag(1/c) V S⁻¹,

with c the lengths of the columns of R, which are those of B: in units in which every parameter
matters alike. Householder's method is as exact for every column as that column's own rounding,
whatever its units, and R is made of some rows of B after the other: [R; rows] = Q' R'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ddnewton.columns.factors import Jacobian
from ddnewton.columns.normal_equations import weighted_rows
from ddnewton.inputs.memory import check_fits


class InverseRoot(NamedTuple):
    """W with G⁻¹ = W Wᵀ, and which parameters G does not determine."""

    root: Float[Tensor, "d k"]
    undetermined: Bool[Tensor, " d"]


def inverse_root(jacobians: Sequence[Jacobian], weights: Float[Tensor, " i"]) -> InverseRoot:
    """Return a root of the inverse of G = A diag(w) Aᵀ, of all parameters as one block.

    Where G has no inverse, the root is that of its pseudo-inverse, in units of the columns.
    """
    factor = _triangle(jacobians, weights)
    lengths = torch.linalg.vector_norm(factor, dim=0)
    units = torch.where(lengths > 0, lengths, 1)
    _, singular_values, directions = torch.linalg.svd(factor / units, full_matrices=False)
    # What is rounding beside the largest is as good as zero, as for `scipy.optimize.curve_fit`.
    eps = max(jacobian.eps for jacobian in jacobians)
    live = singular_values > eps * max(len(weights), len(units)) * singular_values.amax()
    inverse = torch.where(live, 1 / torch.where(live, singular_values, 1), 0)
    # A parameter along which a direction without curvature has a part is not determined.
    stray = torch.where(live[:, None], 0, directions).square().sum(0)
    return InverseRoot(
        root=directions.mT * inverse / units[:, None],
        undetermined=stray > torch.finfo(stray.dtype).eps ** 0.5,
    )


def _triangle(jacobians: Sequence[Jacobian], weights: Float[Tensor, " i"]) -> Float[Tensor, "d d"]:
    """Return R, square, of the rows √w_i a_i of all columns."""
    leaves, d = range(len(jacobians[0].sizes)), sum(jacobians[0].sizes)
    what = f"the covariance of {d} parameters, and three more matrices of its size"
    remedy = "Of fewer parameters: keep the others in model_fn, or as one group's standard errors."
    check_fits(4 * d**2 * torch.float64.itemsize, what, remedy, weights.device)
    factor = weights.new_zeros(d, d)
    for rows in weighted_rows(jacobians, leaves, weights):
        factor = torch.linalg.qr(torch.cat([factor, rows]), mode="r").R
    return factor
