"""The search for a step of one batch: try one, look at the loss, and take it or damp more."""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ddnewton.optim.adaptation import Outcome
from ddnewton.optim.box import step_inside
from ddnewton.optim.local_model import LocalModel, in_params_units, loss_at
from ddnewton.optim.promise import quadratic_along
from ddnewton.optim.settings import Settings
from ddnewton.optim.trial_steps import TrialSteps, lengths_at, trial_step
from ddnewton.optim.trust_radius import damping_of_length, least_damping
from ddnewton.quadratic.leafwise import is_leafwise
from ddnewton.transforms import any_known, is_batched
from ddnewton.trees import tree_map

MOST_ATTEMPTS = 20
"""How many steps are tried before the parameters are left where they are."""

FIRST_DAMPING = 1e-3
"""The damping, relative to the trace, whose step is the first radius where parameters are zero."""


EXACT_SHARE = 1e-15
"""How much smaller the least damping of a radius is, where curvatures are known to the square of
the rounding."""

LEAST_METRIC = 1e-10
"""The least damping of a radius, relative to the trace, where weight decay differs inside a block:
leaves with and without it are compared in coordinates scaled by the root of their damping."""


class Step(NamedTuple):
    """A step that was tried: its direction s, how much of it, where it leads, and the verdict."""

    vector: Float[Tensor, " d"]
    rate: Float[Tensor, "..."]  # one number, or one a parameter
    damping: Float[Tensor, ""]
    outcome: Outcome
    taken: Bool[Tensor, ""]
    settled: Bool[Tensor, ""]  # what there is to gain is lost in rounding
    following: Float[Tensor, ""]  # the control of the next trial, or the next batch
    tried: Int[Tensor, ""]


def search(local: LocalModel, settings: Settings, control: Float[Tensor, ""]) -> Step:
    """Return the first step that is taken, or that leaves nothing to gain, or the last one."""
    momentum: float | Literal["exact"] = settings.momentum
    step = _tried(local, settings, _first_control(local, settings, control), momentum, 0)
    for attempt in range(1, MOST_ATTEMPTS):
        # Every member of an ensemble has its step once none of them is left to search.
        ended = step.taken | step.settled
        if not any_known(~ended):
            break
        # A step before is not shortened by damping: leave it out from the second trial on.
        trial = _tried(local, settings, step.following, 0.0, attempt)
        several = is_batched(ended)
        step = tree_map(partial(torch.where, ended), step, trial) if several else trial
    return step


def _inside(local: LocalModel, vector: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """Return a step, in the units of the model, cut to the bounds of the parameters."""
    if local.box is None:
        return vector
    step = step_inside(local.box, local.params, in_params_units(local, vector))
    return step if local.scale is None else step / local.scale


def _first_control(
    local: LocalModel, settings: Settings, control: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Return the control of this batch: the first one, the one so far, or one from the grid."""
    adaptation = settings.adaptation
    # Where there is none yet, the first; for a radius of zero that of a damped step.
    first = adaptation.start(local.curvature)
    if adaptation.by_length and any_known(control.isnan() & ~(first > 0)):
        delta = FIRST_DAMPING * local.curvature.trace
        length = trial_step(local.trials, delta, 0.0).norm()
        first = torch.where(first > 0, first, torch.where(length > 0, length, torch.nan))
    control = torch.where(control.isnan(), first, control)
    if local.held_out is None or adaptation.choice is None:
        return control
    # The loss of the samples held out, after the step of every multiple in the grid: the largest
    # multiple first, so that it is the choice where several, or none, are best.
    multiples = sorted(adaptation.choice.grid, reverse=True)
    controls = torch.stack([control * 0 + multiple for multiple in multiples])
    dampings = [adaptation.damping(multiple, local.curvature) for multiple in controls]
    steps = (trial_step(local.trials, damping, 0.0) for damping in dampings)
    losses = torch.stack([loss_at(local, 0.0, step, local.held_out) for step in steps])
    # Half the way to the best, in the logarithm.
    best = losses.nan_to_num(nan=torch.inf).argmin(0, keepdim=True)
    return (control * controls.gather(0, best)[0]).sqrt()


def _tried(
    local: LocalModel,
    settings: Settings,
    control: Float[Tensor, ""],
    momentum: float | Literal["exact"],
    attempt: int,
) -> Step:
    """Try the step that a control leads to."""
    # The damping of the control, raised until the step is no longer than it may be.
    delta = settings.adaptation.damping(control, local.curvature)
    radius = torch.full_like(delta, settings.trust_radius or torch.inf)
    if settings.adaptation.by_length:
        if is_leafwise(local.trials.proximal_blocks):
            delta = torch.maximum(delta, LEAST_METRIC * local.curvature.trace)
        elif local.trials.exact:
            delta = delta * EXACT_SHARE
        radius = torch.minimum(radius, control.nan_to_num(nan=torch.inf))
    if any_known(radius.isfinite()):
        delta = _within_radius(local, settings, radius, delta, momentum)
    # The step; a part of it that no damping shortens, a step before with momentum, is cut.
    vector, rate = _direction(local, settings, delta, momentum)
    rate = rate * (radius / (rate * vector).norm()).nan_to_num(nan=1.0).clamp(max=1)
    moved = _inside(local, rate * vector)
    # The loss before and after, of the samples of the gradient.
    samples = [term.objective.samples.slopes for term in local.model.terms]
    decay = 0.0 if local.proximal is None else local.proximal.decay
    before, after = local.loss, loss_at(local, decay, rate * vector, samples)
    # The decrease that the quadratic model promises, −(gᵀs + ½ sᵀG s).
    slopes, curvatures = quadratic_along(local.trials, moved[None])
    predicted = -(slopes[0] + curvatures[0, 0] / 2)
    settled = (predicted.abs() <= local.noise) & ((before - after).abs() <= local.noise)
    outcome = Outcome(
        before=before,
        after=after,
        predicted=predicted,
        ratio=torch.where(settled, 1, (before - after) / predicted),
        length=moved.norm().nan_to_num(nan=torch.inf),
        attempts=torch.full_like(local.updates, attempt),
        curvature=local.curvature,
    )
    # The adaptation's verdict; a step that changes nothing says nothing of the control.
    taken, following = settings.adaptation.judge(control, outcome)
    following = torch.where(settled & ~taken, control, following)
    return Step(vector, rate, delta, outcome, taken, settled, following, outcome.attempts + 1)


def _direction(
    local: LocalModel,
    settings: Settings,
    delta: Float[Tensor, ""],
    momentum: float | Literal["exact"],
) -> tuple[Float[Tensor, " d"], Float[Tensor, "..."]]:
    """Return a direction, and how far to go along it."""
    vector = trial_step(local.trials, delta, 0.0 if momentum == "exact" else momentum)
    if momentum == "exact" and local.proximal is not None:
        both = torch.cat([vector[None], local.proximal.previous])
        vector = _minimizer(local.trials, both, delta) @ both
    if settings.learning_rate == "exact":
        return vector, _minimizer(local.trials, vector[None], delta)[0]
    return vector, _rate(local, settings)


def _rate(local: LocalModel, settings: Settings) -> Float[Tensor, "..."]:
    """Return the learning rate, which is not the exact one."""
    rate = settings.learning_rate
    number = rate(local.updates) if callable(rate) else rate
    return torch.as_tensor(number, dtype=torch.float64, device=local.gradient_norm.device)


def _minimizer(
    trials: TrialSteps, vectors: Float[Tensor, "k d"], delta: Float[Tensor, ""]
) -> Float[Tensor, " k"]:
    """Return the multiples of vectors whose sum makes the damped quadratic model lowest."""
    slopes, damped = quadratic_along(trials, vectors, delta)
    sizes = damped.diagonal().sqrt()
    sizes = torch.where(sizes > 0, sizes, 1)  # a vector of zeros stays one
    scaled = damped / sizes / sizes[:, None]
    inverse = torch.linalg.pinv(scaled, rtol=1e-12, hermitian=True)
    multiples: Tensor = -(inverse @ (slopes / sizes)) / sizes
    return multiples


def _within_radius(
    local: LocalModel,
    settings: Settings,
    radius: Float[Tensor, ""],
    least: Float[Tensor, ""],
    momentum: float | Literal["exact"],
) -> Float[Tensor, ""]:
    """Return the least damping, from ``least`` upwards, with a step no longer than the radius."""

    def length(delta: Float[Tensor, ""]) -> Float[Tensor, ""]:
        vector, rate = _direction(local, settings, delta, momentum)
        norm: Tensor = (rate * vector).norm()
        return norm

    guess, enough = least, torch.maximum(local.gradient_norm / radius, least)
    # From the spectrum alone where nothing else decides on the length of a step.
    if settings.learning_rate != "exact":
        rate, lengths = _rate(local, settings), lengths_at(local.trials)
        if lengths is not None and rate.numel() == 1:
            least = torch.maximum(least, lengths.least)
            enough = torch.maximum(enough, least)
            return damping_of_length(lengths.of_dampings, least, enough, radius / rate.reshape(()))
    if settings.adaptation.by_length:  # which mostly needs more than the least
        guess = torch.maximum(torch.where(local.damping.isnan(), enough, local.damping), least)
    return least_damping(length, guess, least, enough, radius)
