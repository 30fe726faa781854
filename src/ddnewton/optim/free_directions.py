r"""Trial steps of one batch along its leading directions, by products.

The formulas are those of quadratic/proximal.py, with directions as vectors of parameters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.inputs.groups import Block
from ddnewton.optim.settings import Complement
from ddnewton.quadratic.matrix_free.along import Along, dampings_along, left_out
from ddnewton.quadratic.solution import coefficients_along


class Pull(NamedTuple):
    """What pulls a step of a block besides its gradient: μ s', θ and the weight decay w."""

    centre: Float[Tensor, " d"]
    params: Float[Tensor, " d"] | None  # None without weight decay
    decay: float | Tensor


def step_along(
    along: Along,
    block: Block,
    gradient: Float[Tensor, " d"],
    pull: Pull,
    delta: Tensor,
    complement: Complement,
) -> Float[Tensor, " d"]:
    """Return the step of a block for a damping δ above what the block says."""
    kept, (gammas, lambdas) = along.kept, along.derivatives
    # The dampings, of a rule and of all directions.
    more = delta + pull.decay
    dampings = dampings_along(along, block).double() + more
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
    return vector - torch.where(outside > 0, left_out(along, gradient) / outside, 0)
