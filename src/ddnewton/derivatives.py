"""Slopes and curvatures of every sample along the kept directions."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Derivatives(NamedTuple):
    """First and second derivatives of the samples' losses along directions; units of the loss."""

    gammas: Float[Tensor, "n k"]  # γ_nk = e_kᵀ ∇ℓ_n
    lambdas: Float[Tensor, "n k"]  # λ_nk = e_kᵀ J_nᵀ ∇²ℓ_n J_n e_k


def directional_derivatives(
    column_slopes: Float[Tensor, "i k"],
    slopes: Float[Tensor, "m n"],
    curvatures: Float[Tensor, "m n"],
) -> Derivatives:
    """Return γ and λ from the slopes of the columns along the directions, s_ik = a_iᵀ e_k.

    With ∇ℓ_n = L z and ∇²ℓ_n = L diag(h) Lᵀ, and column nm of A the pullback of L's column m,

        γ_nk = Σ_m z_nm s_nmk,        λ_nk = Σ_m h_nm s_nmk²:

    no gradient is formed, and nothing is divided by an eigenvalue (Dangel, Tatzel, Hennig, 2022,
    section 3.2 does so).
    """
    per_sample = column_slopes.unflatten(0, slopes.shape)
    return Derivatives(
        gammas=(slopes[..., None] * per_sample).sum(0),
        lambdas=(curvatures[..., None] * per_sample.square()).sum(0),
    )
