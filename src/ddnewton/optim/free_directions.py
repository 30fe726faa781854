r"""Trial steps of one batch along its leading directions, by products.

The formulas are those of quadratic/proximal.py, with directions as vectors of parameters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.damping import as_rule, check_dampings
from ddnewton.inputs.groups import Block
from ddnewton.optim.settings import Complement
from ddnewton.quadratic.derivatives import Derivatives
from ddnewton.quadratic.matrix_free.free_model import FreeModel
from ddnewton.quadratic.matrix_free.leading_directions import (
    FreeDirections,
    coordinates_of,
    free_directions,
)
from ddnewton.quadratic.matrix_free.operator import Operator
from ddnewton.quadratic.solution import coefficients_along


class Along(NamedTuple):
    """The directions of a block with the derivatives along them, and what rules ask for."""

    kept: FreeDirections
    derivatives: Derivatives
    evecs: Float[Tensor, "i k"]
    gradient: Float[Tensor, " d"]
    dtype: torch.dtype  # that of what rules get


class Pull(NamedTuple):
    """What pulls a step of a block besides its gradient: μ s', θ and the weight decay w."""

    centre: Float[Tensor, " d"]
    params: Float[Tensor, " d"] | None  # None without weight decay
    decay: float | Tensor


def along_of(
    model: FreeModel, block: Block, operator: Operator, gradient: Float[Tensor, " d"]
) -> Along:
    """Return the directions of a block, with the derivatives along them."""
    kept = free_directions(operator, block.select, model.arguments.tol, model.dtype)
    evecs = coordinates_of(operator, kept) if callable(block.damping) else kept.evals[:0, None]
    return Along(kept, operator.derivatives(kept.vectors), evecs, gradient, model.dtype)


def step_along(
    along: Along,
    block: Block,
    pull: Pull,
    delta: Tensor,
    complement: Complement,
) -> Float[Tensor, " d"]:
    """Return the step of a block for a damping δ above what the block says."""
    kept, (gammas, lambdas) = along.kept, along.derivatives
    # The dampings, of a rule and of all directions.
    parts = [kept.evals, along.evecs, gammas, lambdas]
    asked = as_rule(block.damping)(*(part.to(along.dtype, copy=True) for part in parts))
    check_dampings(asked, len(kept.evals))
    more = delta + pull.decay
    dampings = asked.double() + more
    # The centre is that of the damping outside of the directions.
    scalar = more if callable(block.damping) else more + block.damping
    outside = None
    if complement is not None:
        outside = scalar if complement == "damping" else complement + delta
    shared = scalar if outside is None else outside
    decayed = torch.zeros_like(pull.centre)
    if pull.params is not None:
        decayed = -pull.decay / shared * (pull.params + pull.centre)
    centre = pull.centre + decayed
    # s = c − Σ_k (γ_k + λ_k c_k) / (λ_k + δ_k) e_k.
    gamma, curvature = gammas.mean(0), lambdas.mean(0)
    added = torch.where(dampings.isfinite(), dampings - shared, 0)
    gamma = gamma + curvature * (kept.vectors @ centre) + added * (kept.vectors @ decayed)
    coefficients = coefficients_along(gamma, curvature, dampings, kept.live)
    skipped = kept.live & dampings.isinf()
    coefficients = torch.where(skipped, -(kept.vectors @ decayed), coefficients)
    vector = centre + coefficients @ kept.vectors
    if outside is None:
        return vector
    remainder = along.gradient - (kept.vectors @ along.gradient) @ kept.vectors
    return vector - torch.where(outside > 0, remainder / outside, 0)
