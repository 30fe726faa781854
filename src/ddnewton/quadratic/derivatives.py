"""Slopes and curvatures of every sample along the kept directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Derivatives(NamedTuple):
    """First and second derivatives of the samples' losses along directions; units of the loss."""

    gammas: Float[Tensor, "n k"]  # γ_nk = e_kᵀ ∇ℓ_n
    lambdas: Float[Tensor, "n2 k"]  # λ_nk = e_kᵀ J_nᵀ ∇²ℓ_n J_n e_k


def first_derivatives(
    of_basis: Float[Tensor, "i k"], of_gradients: Float[Tensor, "_ k"], z: Float[Tensor, "m n"]
) -> Float[Tensor, "n2 k"]:
    """Return γ from the slopes of the columns along the directions, s_ik = a_iᵀ e_k.

    With ∇ℓ_n = L z, and column nm of A the pullback of L's column m,

        γ_nk = Σ_m z_nm s_nmk:

    no gradient is formed, and nothing is divided by an eigenvalue (Dangel, Tatzel, Hennig, 2022,
    section 3.2 does so). Further columns are themselves ``of_gradients`` of samples.
    """
    gammas = (z[..., None] * of_basis.unflatten(0, z.shape)).sum(0)
    return torch.cat([gammas, of_gradients]) if len(of_gradients) else gammas


def second_derivatives(
    column_slopes: Float[Tensor, "i k"], h: Float[Tensor, "m n"]
) -> Float[Tensor, "n k"]:
    """Return λ from the slopes of the columns along the directions, s_ik = a_iᵀ e_k.

    With ∇²ℓ_n = L diag(h) Lᵀ,

        λ_nk = Σ_m h_nm s_nmk².
    """
    per_sample = column_slopes.unflatten(0, h.shape)
    lambdas: Tensor = (h[..., None] * per_sample.square()).sum(0)
    return lambdas


def over_all_samples(terms: Sequence[Float[Tensor, "_ k"]]) -> Float[Tensor, "n k"]:
    """Return the rows of several terms as one matrix, whose mean is the sum of theirs."""
    if len(terms) == 1:
        return terms[0]
    n = sum(map(len, terms))
    return torch.cat([rows * (n / len(rows)) for rows in terms])
