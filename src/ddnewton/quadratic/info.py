"""What a step was made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.quadratic.directions import BlockDirections
from ddnewton.quadratic.quadratic_model import QuadraticModel


class NewtonInfo(NamedTuple):
    """What a step was made of, in the dtype of the model's outputs or float32 if that is narrower.

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


def info_of(
    problem: QuadraticModel,
    along: BlockDirections,
    gradient: Float[Tensor, " d"],
    dampings: Float[Tensor, " k"],
    coefficients: Float[Tensor, " k"],
) -> NewtonInfo:
    """Return the record of a step in a block."""
    spectrum, kept, (gammas, lambdas) = along.spectrum, along.kept, along.derivatives
    gamma, curvature = gammas.mean(0), lambdas.mean(0)
    square = gradient.square().sum()
    inside = torch.where(kept.live, gamma, 0).square().sum()
    info = NewtonInfo(
        loss=problem.losses.mean(),
        evals=kept.evals,
        gammas=gammas,
        lambdas=lambdas,
        dampings=dampings,
        coefficients=coefficients,
        predicted_decrease=-coefficients * (gamma + curvature * coefficients / 2),
        gradient_norm=square.sqrt(),
        gradient_share=torch.where(square > 0, inside / square, 1).clamp(max=1),
        rank=spectrum.live.sum(),
    )
    cast = (x if x.dtype == torch.int64 else x.to(problem.dtype) for x in info)
    return NewtonInfo(*cast)
