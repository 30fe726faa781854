"""The record of a step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ddnewton.quadratic.derivatives import Derivatives
from ddnewton.quadratic.term import TermLosses
from ddnewton.trees import tree_map


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
    """Number of eigenvalues above the rank tolerance; −1 where only leading ones are known."""
    flat_share: Float[Tensor, ""]
    """Share of the squared gradient norm that comes from samples whose loss has a slope and no
    curvature, and lies outside all directions with curvature. Only ``complement`` follows it."""
    losses: TermLosses
    """The losses of the terms by their names, whose sum is the loss; or the loss, of one term."""
    lost: Float[Tensor, ""]
    """With ``gram="free"`` and one damping of all directions: an upper bound on the share of the
    decrease −(gᵀs + ½ sᵀ(G + δI)s) of the exact step that this one gives away. 0 where matrices
    give the step; nan for a step along several directions, whose ``residuals`` tell."""
    products: Int[Tensor, ""]
    """With ``gram="free"``: how many products with G were made; else 0."""
    residuals: Float[Tensor, " k2"]
    """With ``gram="free"``: ‖G e_k − λ_k e_k‖ of every direction, or, of a linear system, the one
    number ‖g + (G + δI)s‖; else none."""
    rounding: Float[Tensor, ""]
    """How much the columns of the Jacobian are rounded, relatively: 2e-16 where the model was
    evaluated in float64, 1e-7 in float32, 8e-3 where it casts to bfloat16 inside. Along e_k the
    step may be wrong by that times √(λ_max / (λ_k + δ_k)); see ``precision``."""


def record_of(
    derivatives: Derivatives,
    live: Bool[Tensor, " k"],
    gradient: Float[Tensor, " d"],
    dtype: torch.dtype,
    **fields: Tensor | TermLosses,
) -> NewtonInfo:
    """Return the record of a step along directions, of its parts and what follows from these."""
    gammas, lambdas = derivatives
    gamma, curvature, coefficients = gammas.mean(0), lambdas.mean(0), fields["coefficients"]
    assert isinstance(coefficients, Tensor)
    square = gradient.square().sum()
    inside = torch.where(live, gamma, 0).square().sum()
    info = NewtonInfo(
        gammas=gammas,
        lambdas=lambdas,
        predicted_decrease=-coefficients * (gamma + curvature * coefficients / 2),
        gradient_norm=square.sqrt(),
        gradient_share=torch.where(square > 0, inside / square, 1).clamp(max=1),
        **fields,  # type: ignore[arg-type]
    )
    cast: NewtonInfo = tree_map(lambda x: x if x.dtype == torch.int64 else x.to(dtype), info)
    return cast
