"""One update around its search: from a state to the loss of a batch, and to the next state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ddnewton.optim.box import is_free
from ddnewton.optim.control import damping_so_far
from ddnewton.optim.free_matrices import FreeMatrix, free_matrices, of_free_parameters
from ddnewton.optim.free_trials import FreeTrials
from ddnewton.optim.local_model import (
    LocalModel,
    by_block,
    decay_of,
    in_model_units,
    in_params_units,
    length_of,
    loss_before,
    noise_of,
)
from ddnewton.optim.promise import curvature_of, gradients_of
from ddnewton.optim.search import Step
from ddnewton.optim.settings import Settings, decays_of
from ddnewton.optim.solved_trials import TrialSteps, trial_steps
from ddnewton.optim.state import State, UpdateInfo
from ddnewton.quadratic.flat import any_flat, check_slopes, flat_share, has_flat_samples
from ddnewton.quadratic.gauss_newton import GaussNewton
from ddnewton.quadratic.held import of_free
from ddnewton.quadratic.leafwise import any_decayed, check_leafwise
from ddnewton.quadratic.matrices import gauss_newton_matrices
from ddnewton.quadratic.matrix_free.free_model import FreeModel, check_free_slopes
from ddnewton.quadratic.proximal import Proximal, different
from ddnewton.quadratic.quadratic_model import QuadraticModel
from ddnewton.scalars import scalar_like
from ddnewton.transforms import concatenated
from ddnewton.trees import flattened, joined, real_count, tree_leaves, unflattened
from ddnewton.types import PyTree

Matrices: TypeAlias = "list[GaussNewton] | list[FreeMatrix]"
"""Those of the blocks, or what is known of them by products."""

RESOLVED_DAMPING = 1e-11
"""Down to which damping, relative to the trace, the curvatures that count are known by products of
columns."""


def local_model(
    model: QuadraticModel | FreeModel,
    settings: Settings,
    params: PyTree,
    state: State,
    held_out: Sequence[Int[Tensor, " _"]] | None,
) -> LocalModel:
    """Return the loss of a batch around the parameters, ready to be searched for a step."""
    # Refuse what weight decay leaves undefined, before the work.
    decays = decays_of(settings.weight_decay, params)
    scaled = settings.scale is not None
    check_leafwise(model, decays, settings.complement, scaled=scaled)
    model, matrices = _matrices(model, settings, params, state)
    scale = model.scaling.scale
    # The vectors that pull a step besides the gradient.
    proximal, decayed = None, any_decayed(decays)
    if settings.momentum or decayed:
        theta = in_model_units(params if decayed else state.previous, scale)[None]
        before = theta[:0]
        if settings.momentum:
            before = in_model_units(state.previous, scale)[None] if decayed else theta
        proximal = Proximal(
            previous=before,
            params=theta if decayed else theta[:0],
            decays=decays,
            decay=_by_parameter(decays, params, scale, theta),
        )
    # The slopes along the parameters; those that bounds hold have none, and no curvature.
    of_loss, free = _gradients(model, matrices, settings), None
    slopes = of_loss
    if (decay := decay_of(proximal)) is not None and proximal is not None:
        slopes = list(map(torch.add, of_loss, by_block(model, decay * proximal.params[0])))
    if settings.box is not None:
        free = is_free(settings.box, params, joined(slopes, model.leaves, model.sizes))
        model, matrices = _held(model, matrices, free)
        masks = by_block(model, free)
        of_loss, slopes = (list(map(torch.mul, part, masks)) for part in (of_loss, slopes))
    # What all trials are compared with, and whether the damping so far is lost in rounding.
    loss = loss_before(model, proximal)
    curvature = curvature_of(matrices, length_of(params, scale))
    exact = state.damping <= RESOLVED_DAMPING * curvature.trace
    local = LocalModel(
        model=model,
        trials=_trials(model, matrices, of_loss, settings, proximal, free=free, exact=exact),
        params=params,
        scale=scale,
        proximal=proximal,
        updates=state.updates,
        damping=state.damping,
        held_out=held_out,
        curvature=curvature,
        box=settings.box,
        slopes=slopes,
        gradient_norm=concatenated(of_loss).norm(),
        loss=loss,
        noise=torch.zeros_like(loss),
    )
    return local._replace(noise=noise_of(local))


def _matrices(
    model: QuadraticModel | FreeModel, settings: Settings, params: PyTree, state: State
) -> tuple[QuadraticModel | FreeModel, Matrices]:
    """Return the matrices of the blocks, on as many digits as the damping so far asks for."""
    if isinstance(model, FreeModel):
        return model, free_matrices(model)
    units = model.scaling.scale

    def least_damping(matrices: Sequence[GaussNewton]) -> Tensor:
        curvature = curvature_of(matrices, length_of(params, units))
        return damping_so_far(settings.adaptation, state, curvature)

    sizes = None if state.sizes == () else flattened(state.sizes)
    return gauss_newton_matrices(model, least_damping, sizes)


def _gradients(
    model: QuadraticModel | FreeModel, matrices: Matrices, settings: Settings
) -> list[Float[Tensor, " _"]]:
    """Return the gradients of the blocks; refuse slopes without any curvature."""
    curved = settings.complement is None
    if isinstance(model, FreeModel):
        of_blocks = [cast(FreeMatrix, matrix).gradient for matrix in matrices]
        followed = not curved or any(bool(matrix.trace() > 0) for matrix in matrices)
        check_free_slopes(model, of_blocks, curved=followed)
        return of_blocks
    exact = cast("list[GaussNewton]", matrices)
    check_slopes(model, exact, curved=curved)
    return gradients_of(model, exact)


def _held(
    model: QuadraticModel | FreeModel, matrices: Matrices, free: Bool[Tensor, " d"]
) -> tuple[QuadraticModel | FreeModel, Matrices]:
    """Return model and matrices of the parameters that no bound holds."""
    if isinstance(model, FreeModel):
        return model, of_free_parameters(model, cast("list[FreeMatrix]", matrices), free)
    return of_free(model, cast("list[GaussNewton]", matrices), free)


def _trials(
    model: QuadraticModel | FreeModel,
    matrices: Matrices,
    of_loss: Sequence[Float[Tensor, " _"]],
    settings: Settings,
    proximal: Proximal | None,
    *,
    free: Bool[Tensor, " d"] | None,
    exact: Bool[Tensor, ""],
) -> TrialSteps | FreeTrials:
    """Return the trial steps, by matrices or by products."""
    options = (settings.complement, proximal, free)
    if isinstance(model, FreeModel):
        products = cast("list[FreeMatrix]", matrices)
        return FreeTrials(model, products, *options, spaces={}, directions={}, tried=[])
    exact_matrices = cast("list[GaussNewton]", matrices)
    return trial_steps(model, exact_matrices, of_loss, *options, exact=exact)


def _by_parameter(
    decays: Sequence[float | Tensor],
    params: PyTree,
    scale: Float[Tensor, " d"] | None,
    like: Tensor,
) -> float | Float[Tensor, " d"]:
    """Return the weight decay of every parameter in the units of the model, or the one of all."""
    if len(different(decays)) == 1 and (scale is None or not any_decayed(decays)):
        return decays[0]
    pairs = zip(tree_leaves(params), decays, strict=True)
    vector = torch.cat([scalar_like(decay, like).expand(real_count(leaf)) for leaf, decay in pairs])
    return vector if scale is None else vector * scale.square()


def next_state(
    state: State, local: LocalModel, step: Step, direction: Float[Tensor, " d"]
) -> State:
    """Return the state after a step along a direction, which is zero where it is not taken."""
    previous: PyTree = ()
    if state.previous != ():
        previous = unflattened(in_params_units(local, direction), local.params)
    sizes: PyTree = state.sizes
    if state.sizes != () and local.model.scaling.sizes is not None:
        sizes = unflattened(local.model.scaling.sizes, state.sizes)
    return State(
        updates=state.updates + 1,
        control=step.following,
        damping=step.damping,
        previous=previous,
        sizes=sizes,
    )


def update_info(local: LocalModel, step: Step, settings: Settings) -> UpdateInfo:
    """Return the record of an update."""
    outcome, rule = step.outcome, settings.adaptation.rule
    rank, share = _rank_and_share(local)
    return UpdateInfo(
        loss=outcome.before,
        loss_after=torch.where(step.taken, outcome.after, outcome.before),
        predicted_decrease=torch.where(step.taken, outcome.predicted, 0),
        ratio=outcome.ratio,
        damping=step.damping if callable(rule) else step.damping + rule,
        learning_rate=step.rate.mean(),
        step_norm=torch.where(step.taken, outcome.length, 0),
        gradient_norm=local.gradient_norm,
        gradient_share=share,
        rank=rank,
        attempts=step.tried,
        accepted=step.taken,
        flat_share=_flat_share(local),
        losses=local.model.losses,
    )


def _flat_share(local: LocalModel) -> Float[Tensor, ""]:
    """Return the share of the gradient that has no curvature, nan where it is not known."""
    if isinstance(local.model, FreeModel) or isinstance(local.trials, FreeTrials):
        return torch.full_like(local.gradient_norm, torch.nan)
    blocks, count = local.trials.decompositions.directions, len(local.model.curvature_weights)
    if not blocks or any(len(block.spectrum.evals) < count for block in blocks):
        flat = any_flat(local.model)
        return torch.where(flat, torch.nan, torch.zeros_like(local.gradient_norm))
    if not has_flat_samples(local.model):
        return torch.zeros_like(local.gradient_norm)
    return flat_share(local.model, blocks, local.gradient_norm)


def _rank_and_share(local: LocalModel) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the rank, and the kept directions' share of the gradient, nan where not known."""
    unknown = torch.full_like(local.gradient_norm, torch.nan)
    if isinstance(local.model, FreeModel) or isinstance(local.trials, FreeTrials):
        return unknown, unknown
    blocks = local.trials.decompositions.directions
    if not blocks:
        return unknown, unknown
    # The squared slopes along the kept directions of all blocks, of the squared gradient.
    squares = [
        torch.where(block.kept.live, block.derivatives.gammas.mean(0), 0).square().sum()
        for block in blocks
    ]
    inside, square = torch.stack(squares).sum(), local.gradient_norm.square()
    share = torch.where(square > 0, inside / square, 1).clamp(max=1)
    # Where only leading eigenpairs of a block were computed, its rank is not known.
    count = len(local.model.curvature_weights)
    if any(len(block.spectrum.evals) < count for block in blocks):
        return unknown, share
    ranks = [block.spectrum.rank for block in blocks]
    return torch.stack(ranks).sum().to(share), share
