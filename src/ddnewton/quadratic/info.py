"""The record of a step."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.quadratic.term import TermLosses


class NewtonInfo(NamedTuple):
    """The parts of a step, in the dtype of the model's outputs or float32 if that is narrower.

    λ, δ and ``evals`` have the units of curvature (loss per squared parameter), γ of slope. With
    ``subsampling_curvature``, λ stands beside ``evals`` for the bias of these.
    """

    loss: Float[Tensor, ""]
    evals: Float[Tensor, " k"]
    gammas: Float[Tensor, "n k"]
    lambdas: Float[Tensor, "n2 k"]
    dampings: Float[Tensor, " k"]
    coefficients: Float[Tensor, " k"]
    """−γ_k / (λ_k + δ_k): how far the step goes along each direction."""
    predicted_decrease: Float[Tensor, " k"]
    """−γ_k c_k − ½ λ_k c_k²: by how much the quadratic model falls along each direction. Their
    sum is the model's fall where λ is of the directions' own samples, and it has no other terms."""
    gradient_norm: Float[Tensor, ""]
    gradient_share: Float[Tensor, ""]
    """Σ_k γ_k² / ‖g‖²: the share of the squared gradient norm inside the kept directions."""
    rank: Int[Tensor, ""]
    """Number of eigenvalues above the rank tolerance."""
    flat_share: Float[Tensor, ""]
    """Share of the squared gradient norm that comes from samples whose loss has a slope and no
    curvature, and lies outside all directions with curvature. Only ``complement`` follows it."""
    losses: TermLosses
    """The losses of the terms by their names, whose sum is the loss; or the loss, of one term."""
