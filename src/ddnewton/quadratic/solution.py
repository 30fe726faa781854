r"""The damped step of a block, by Cholesky's factorization where that will do, or by eigenpairs.

Damping may pull a step to a centre c instead of to zero. It is the minimum over s of

    gᵀs + ½ sᵀG s + ½ Σ_k δ_k (e_kᵀ(s − c))²,    s = c − Σ_k (γ_k + λ_k c_k) / (λ_k + δ_k) e_k,

with c_k = e_kᵀc: c, and a step of a gradient that is further by G c = A (w ∘ Aᵀc).
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ddnewton.damping import as_rule, check_dampings
from ddnewton.quadratic.cholesky import CHOLESKY_CONDITION, damped_step
from ddnewton.quadratic.complement import outside, vanishing
from ddnewton.quadratic.directions import BlockDirections
from ddnewton.quadratic.kept import Directions
from ddnewton.quadratic.quadratic_model import GaussNewton, QuadraticModel


class Solution(NamedTuple):
    """A step along the directions of a block, and in the coordinates of its spectrum."""

    dampings: Float[Tensor, " k"]
    coefficients: Float[Tensor, " k"]
    coordinates: Float[Tensor, " j"]


class Centre(NamedTuple):
    """Where the damping δ of all directions pulls the step of a block: Aᵀc, for the columns A.

    ``decay`` is what weight decay has moved it by: what a rule adds to δ pulls to where it was.
    """

    slopes: Float[Tensor, " a"]
    decay: Float[Tensor, " a"]
    delta: Float[Tensor, ""]


def without_eigenpairs(
    problem: QuadraticModel,
    systems: Sequence[GaussNewton],
    complements: Sequence[float | Tensor | None],
    centres: Sequence[Centre] | None = None,
    condition: float = CHOLESKY_CONDITION,
) -> list[Float[Tensor, " _"]] | None:
    """Return the steps of the blocks, if one damping of all directions is all there is to them."""
    if problem.lambda_rows is not None:
        return None
    steps = []
    for b, (block, system) in enumerate(zip(problem.blocks, systems, strict=True)):
        delta, beyond = block.damping, complements[b]
        if block.select is not None or callable(delta):
            return None
        if beyond is not None and not _same(beyond, delta):
            return None
        shares = problem.gradient_weights
        if centres is not None:
            further = (
                problem.curvature_weights * centres[b].slopes[: len(problem.curvature_weights)]
            )
            shares = shares + F.pad(further, (0, len(shares) - len(further)))
        step = damped_step(
            *system, shares, delta, everywhere=beyond is not None, condition=condition
        )
        if step is None:
            return None
        steps.append(step)
    return steps


def solve(
    problem: QuadraticModel,
    along: BlockDirections,
    complement: float | Tensor | None,
    centre: Centre | None = None,
) -> Solution:
    """Ask for the dampings of the directions, and walk along them."""
    block, spectrum, kept, derivatives = along.block, along.spectrum, along.kept, along.derivatives
    i = len(problem.curvature_weights)
    known = [kept.evals, kept.evecs, *derivatives]
    if callable(block.damping):  # the rule's own copies, to be changed as it likes
        known = [tensor.to(problem.dtype, copy=True) for tensor in known]
    dampings = as_rule(block.damping)(*known)
    check_dampings(dampings, kept.evals.shape[0])
    gamma, curvature = derivatives.gammas.mean(0), derivatives.lambdas.mean(0)
    held = torch.zeros_like(gamma)  # along a direction that a rule skips, but for weight decay
    if centre is not None:
        held = _along(kept, problem.curvature_weights, centre.decay)
        added = torch.where(dampings.isfinite(), dampings - centre.delta, 0)
        inner = _along(kept, problem.curvature_weights, centre.slopes)
        gamma = gamma + curvature * inner + added * held
    damped = curvature + dampings.double()
    coefficients = torch.where(kept.live & (damped > 0), -gamma / damped, 0)
    coefficients = torch.where(kept.live & damped.isinf(), -held, coefficients)
    coordinates = kept.vectors @ coefficients
    if complement is not None:
        beyond = outside(spectrum, problem.gradient_weights, kept)
        damped = torch.as_tensor(complement, dtype=beyond.dtype, device=beyond.device)
        coordinates = coordinates - torch.where(damped > 0, beyond / damped, 0)
    elif block.select is None and not callable(block.damping) and problem.lambda_rows is None:
        curved = F.pad(problem.h.reshape(-1) > 0, (0, len(problem.gradient_weights) - i))
        coordinates = coordinates - vanishing(
            spectrum, problem.gradient_weights, curved, block.damping
        )
    return Solution(dampings, coefficients, coordinates)


def _same(one: float | Tensor, other: float | Tensor) -> bool:
    """Return whether two dampings are known to be one."""
    return one is other or (isinstance(one, Real) and isinstance(other, Real) and one == other)


def _along(
    kept: Directions, weights: Float[Tensor, " i"], slopes: Float[Tensor, " a"]
) -> Float[Tensor, " k"]:
    """Return e_kᵀc from Aᵀc, by e_k = A √w u_k / √λ_k."""
    inner = kept.evecs.mT @ (weights.sqrt() * slopes[: len(weights)])
    return torch.where(kept.live, inner / torch.where(kept.live, kept.evals, 1).sqrt(), 0)
