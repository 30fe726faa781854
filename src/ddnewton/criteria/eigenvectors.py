"""Expansions from matrices: L of eigenvectors, and rounding that counts as zero."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.criteria.hessian_blocks import HESSIAN_ROUNDINGS
from ddnewton.criteria.loss import Expansion, spanned
from ddnewton.linearize.basis import written_out


def hessians_of(expansion: Expansion) -> Float[Tensor, "n c c"]:
    """Return the Hessians L diag(h) Lᵀ."""
    basis, h = written_out(expansion.basis), expansion.h
    hessians: Tensor = torch.einsum("ncm,nm,nbm->ncb", basis, h, basis)
    return hessians


def in_eigenvectors(
    value: Float[Tensor, " n"], gradients: Float[Tensor, "n c"], H: Float[Tensor, "n c c"]
) -> Expansion:
    """Return the expansion of losses with these gradients and Hessians, H = Q diag(h) Qᵀ."""
    h, Q = torch.linalg.eigh(H)
    rounding = HESSIAN_ROUNDINGS * torch.finfo(H.dtype).eps * H.shape[1] * H.abs().amax((1, 2))
    h = torch.where(h.abs() <= rounding[:, None], 0, h)
    return spanned(value, Q, torch.einsum("ncm,nc->nm", Q, gradients), h)
