"""The search for a step of one batch: try, look at the loss, take it or damp more."""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ddnewton.linearize.precision import narrowest
from ddnewton.optim.adaptation import Adaptation, Curvature, LearningRate, Outcome
from ddnewton.optim.trial_steps import Complement, Proximal, Trials
from ddnewton.optim.trust_radius import least_damping
from ddnewton.quadratic.quadratic_model import QuadraticModel
from ddnewton.transforms import any_known
from ddnewton.trees import flattened, tree_leaves, tree_map, unflattened
from ddnewton.types import PyTree

MOST_ATTEMPTS = 13
"""How many steps are tried before the parameters are left where they are."""

LOSS_ROUNDINGS = 16.0
"""From how many roundings of the loss upwards a decrease of it can be compared with another."""


class Settings(NamedTuple):
    """How a step follows from the steps that damping leads to."""

    adaptation: Adaptation
    learning_rate: LearningRate
    momentum: float | Literal["exact"]
    weight_decay: float
    trust_radius: float | None
    complement: Complement


class Local(NamedTuple):
    """A batch around the parameters: its trial steps, and its loss elsewhere."""

    problem: QuadraticModel
    trials: Trials
    params: PyTree
    inertia: Proximal | None
    updates: Int[Tensor, ""]
    damping: Float[Tensor, ""]  # of the step before
    others: Int[Tensor, " _"] | None  # those held out, None for none
    curvature: Curvature
    gradient_norm: Float[Tensor, ""]


class Step(NamedTuple):
    """A step that was tried: s, how much of it, where it leads, and what came of it."""

    vector: Float[Tensor, " d"]
    rate: Float[Tensor, "..."]  # one number, or one a parameter
    damping: Float[Tensor, ""]
    outcome: Outcome
    taken: Bool[Tensor, ""]
    settled: Bool[Tensor, ""]  # what there is to gain is lost in rounding
    following: Float[Tensor, ""]
    tried: Int[Tensor, ""]


def search(local: Local, settings: Settings, control: Float[Tensor, ""]) -> Step:
    """Return the first step that is taken, or that leaves nothing to gain, or the last one."""
    found: Step | None = None
    momentum: float | Literal["exact"] = settings.momentum
    control = _started(local, settings, control)
    for attempt in range(MOST_ATTEMPTS):
        step = _tried(local, settings, control, momentum, attempt)
        found = step if found is None else _first(found, step)
        control = found.following
        if not any_known(~(found.taken | found.settled)):
            break
        momentum = 0.0  # which no damping shortens
    assert found is not None
    return found


def _first(found: Step, step: Step) -> Step:
    """Return the step found, or where it is not taken another."""
    first: Step = tree_map(partial(torch.where, found.taken | found.settled), found, step)
    return first


def loss_at(
    local: Local, decay: float, vector: Float[Tensor, " d"], samples: Int[Tensor, " _"] | None
) -> Float[Tensor, ""]:
    """Return the loss of some samples, with its penalty, after a step, as its dtype has it."""
    moved = added(local.params, vector)
    leaves = [
        new.to(leaf)
        for new, leaf in zip(tree_leaves(moved), local.problem.model.leaves, strict=True)
    ]
    return _penalised(local.problem.losses_at(leaves, samples).mean(), decay, moved)


def _penalised(loss: Float[Tensor, ""], decay: float, params: PyTree) -> Float[Tensor, ""]:
    """Return a loss with the penalty of weight decay."""
    return loss + decay / 2 * flattened(params).square().sum() if decay else loss


def added(params: PyTree, vector: Float[Tensor, " d"]) -> PyTree:
    """Return the parameters after a step."""
    return tree_map(torch.add, params, unflattened(vector, params))


def _started(local: Local, settings: Settings, control: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return the control of this batch: the first, the one so far, or one that is chosen."""
    adaptation = settings.adaptation
    first = adaptation.start(local.curvature)
    if adaptation.by_length and any_known(control.isnan()):
        length = local.trials.step(first, 0.0).norm()
        first = torch.where(length > 0, length, torch.nan)
    control = torch.where(control.isnan(), first, control)
    if local.others is None or adaptation.choice is None:
        return control
    # The largest first, which is the choice where several, or none, will do.
    multiples = sorted(adaptation.choice.grid, reverse=True)
    controls = torch.stack([control * 0 + multiple for multiple in multiples])
    steps = (local.trials.step(adaptation.damping(each, local.curvature), 0.0) for each in controls)
    losses = torch.stack([loss_at(local, 0.0, step, local.others) for step in steps])
    best = losses.nan_to_num(nan=torch.inf).argmin(0, keepdim=True)
    return (control * controls.gather(0, best)[0]).sqrt()


def _tried(
    local: Local,
    settings: Settings,
    control: Float[Tensor, ""],
    momentum: float | Literal["exact"],
    attempt: int,
) -> Step:
    """Try the step that a control leads to."""
    delta = settings.adaptation.damping(control, local.curvature)
    radius = torch.full_like(delta, settings.trust_radius or torch.inf)
    if settings.adaptation.by_length:
        radius = torch.minimum(radius, control.nan_to_num(nan=torch.inf))
    if any_known(radius.isfinite()):
        delta = _within(local, settings, radius, delta, momentum)
    vector, rate = _directed(local, settings, delta, momentum)
    # What no damping shortens, a step before with momentum, is cut.
    rate = rate * (radius / (rate * vector).norm()).nan_to_num(nan=1.0).clamp(max=1)
    moved = rate * vector
    decay, problem = settings.weight_decay, local.problem
    own = problem.gradient_samples
    values = problem.losses if own is None else problem.losses[own]
    before = _penalised(values.mean(), decay, local.params)
    after = loss_at(local, decay, moved, own)
    slopes, curvatures = local.trials.model(moved[None], None)
    predicted = -(slopes[0] + curvatures[0, 0] / 2)
    noise = _noise(local, before)
    settled = (predicted.abs() <= noise) & ((before - after).abs() <= noise)
    outcome = Outcome(
        before=before,
        after=after,
        predicted=predicted,
        ratio=torch.where(settled, 1, (before - after) / predicted),
        length=moved.norm().nan_to_num(nan=torch.inf),
        attempts=torch.full_like(local.updates, attempt),
        curvature=local.curvature,
    )
    taken, following = settings.adaptation.judge(control, outcome)
    following = torch.where(settled & ~taken, control, following)
    return Step(vector, rate, delta, outcome, taken, settled, following, outcome.attempts + 1)


def _noise(local: Local, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return by how much the rounding of the loss and of the parameters moves the loss."""
    dtype = narrowest(tree_leaves(local.params))
    apart = torch.finfo(dtype).eps * flattened(local.params).norm()
    of_loss = torch.finfo(local.problem.model.precise.dtype).eps * loss.abs()
    of_params: Tensor = local.gradient_norm * apart + local.curvature.trace * apart**2
    return of_params + LOSS_ROUNDINGS * of_loss


def _directed(
    local: Local,
    settings: Settings,
    delta: Float[Tensor, ""],
    momentum: float | Literal["exact"],
) -> tuple[Float[Tensor, " d"], Float[Tensor, "..."]]:
    """Return a direction, and how far to go along it."""
    vector = local.trials.step(delta, 0.0 if momentum == "exact" else momentum)
    if momentum == "exact" and local.inertia is not None:
        both = torch.cat([vector[None], local.inertia.previous])
        vector = _best(local.trials, both, delta) @ both
    if settings.learning_rate == "exact":
        return vector, _best(local.trials, vector[None], delta)[0]
    rate = settings.learning_rate
    number = rate(local.updates) if callable(rate) else rate
    return vector, torch.as_tensor(number, dtype=vector.dtype, device=vector.device)


def _best(
    trials: Trials, vectors: Float[Tensor, "k d"], delta: Float[Tensor, ""]
) -> Float[Tensor, " k"]:
    """Return by how much of each vector the damped quadratic model is lowest."""
    slopes, damped = trials.model(vectors, delta)
    sizes = damped.diagonal().sqrt()
    sizes = torch.where(sizes > 0, sizes, 1)  # a vector of zeros stays one
    scaled = damped / sizes / sizes[:, None]
    inverse = torch.linalg.pinv(scaled, rtol=1e-12, hermitian=True)
    best: Tensor = -(inverse @ (slopes / sizes)) / sizes
    return best


def _within(
    local: Local,
    settings: Settings,
    radius: Float[Tensor, ""],
    least: Float[Tensor, ""],
    momentum: float | Literal["exact"],
) -> Float[Tensor, ""]:
    """Return the least damping, from ``least`` upwards, with a step no longer than the radius."""

    def length(delta: Float[Tensor, ""]) -> Float[Tensor, ""]:
        vector, rate = _directed(local, settings, delta, momentum)
        norm: Tensor = (rate * vector).norm()
        return norm

    guess, enough = least, torch.maximum(local.gradient_norm / radius, least)
    if settings.adaptation.by_length:  # which has most often something to do
        guess = torch.maximum(torch.where(local.damping.isnan(), enough, local.damping), least)
    return least_damping(length, guess, least, enough, radius)
