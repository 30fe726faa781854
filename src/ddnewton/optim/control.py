"""From the control of an adaptation to a step: its damping, direction and length."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.optim.adaptation import Adaptation, Curvature
from ddnewton.optim.free_trials import FreeTrials
from ddnewton.optim.local_model import LocalModel, point_at
from ddnewton.optim.promise import quadratic_along
from ddnewton.optim.settings import Settings
from ddnewton.optim.solved_trials import TrialSteps, lengths_at
from ddnewton.optim.state import State
from ddnewton.optim.trial_steps import TrialStep, trial_step, trial_vectors
from ddnewton.optim.trust_radius import damping_of_length, least_damping
from ddnewton.quadratic.leafwise import is_leafwise
from ddnewton.scalars import scalar_like
from ddnewton.transforms import any_known

FIRST_DAMPING = 1e-3
"""The damping, relative to the trace, whose step is the first radius where parameters are zero."""

EXACT_SHARE = 1e-15
"""How much smaller the least damping of a radius is, where curvatures are known to the square of
the rounding."""

LEAST_METRIC = 1e-10
"""The least damping of a radius, relative to the trace, where weight decay differs inside a block:
leaves with and without it are compared in coordinates scaled by the root of their damping."""


class ControlledStep(NamedTuple):
    """The step that a control leads to: its damping, direction, and how much of that."""

    damping: Float[Tensor, ""]
    direction: TrialStep
    rate: Float[Tensor, "..."]  # one number, or one a parameter


def damping_so_far(adaptation: Adaptation, state: State, curvature: Curvature) -> Float[Tensor, ""]:
    """Return δ of the step before; of the first step the one that its search begins with.

    Nothing is known of it where the control is a length.
    """
    if adaptation.by_length:
        return 0 * curvature.trace
    first = torch.where(state.control.isnan(), adaptation.start(curvature), state.control)
    return torch.where(state.damping.isnan(), adaptation.damping(first, curvature), state.damping)


def first_control(
    local: LocalModel, settings: Settings, control: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Return the control of this batch: the first one, the one so far, or one from the grid."""
    adaptation = settings.adaptation
    # Where there is none yet, the first; for a radius of zero that of a damped step.
    first = adaptation.start(local.curvature)
    if adaptation.by_length and any_known(control.isnan() & ~(first > 0)):
        delta = FIRST_DAMPING * local.curvature.trace
        length = trial_step(local.trials, delta, 0.0).vector.norm()
        first = torch.where(first > 0, first, torch.where(length > 0, length, torch.nan))
    control = torch.where(control.isnan(), first, control)
    if local.held_out is None or adaptation.choice is None:
        return control
    # The loss of the samples held out, after the step of every multiple in the grid: the largest
    # multiple first, so that it is the choice where several, or none, are best.
    multiples = sorted(adaptation.choice.grid, reverse=True)
    controls = torch.stack([control * 0 + multiple for multiple in multiples])
    dampings = [adaptation.damping(multiple, local.curvature) for multiple in controls]
    steps = trial_vectors(local.trials, dampings)
    losses = torch.stack([point_at(local, 0.0, step, local.held_out).loss for step in steps])
    # Half the way to the best, in the logarithm.
    best = losses.nan_to_num(nan=torch.inf).argmin(0, keepdim=True)
    return (control * controls.gather(0, best)[0]).sqrt()


def step_of_control(
    local: LocalModel,
    settings: Settings,
    control: Float[Tensor, ""],
    momentum: float | Literal["exact"],
) -> ControlledStep:
    """Return the step that a control leads to."""
    # The damping of the control, raised until the step is no longer than it may be.
    delta = settings.adaptation.damping(control, local.curvature)
    if settings.trust_radius is None and not settings.adaptation.by_length:
        return ControlledStep(delta, *_direction(local, settings, delta, momentum))
    radius = torch.full_like(delta, settings.trust_radius or torch.inf)
    if settings.adaptation.by_length:
        if isinstance(local.trials, TrialSteps) and is_leafwise(local.trials.proximal_blocks):
            delta = torch.maximum(delta, LEAST_METRIC * local.curvature.trace)
        elif isinstance(local.trials, TrialSteps):
            delta = torch.where(local.trials.exact, EXACT_SHARE * delta, delta)
        radius = torch.minimum(radius, control.nan_to_num(nan=torch.inf))
    if any_known(radius.isfinite()):
        delta = _within_radius(local, settings, radius, delta, momentum)
    # The step; a part of it that no damping shortens, a step before with momentum, is cut.
    direction, rate = _direction(local, settings, delta, momentum)
    length = (rate * direction.vector).norm()
    rate = rate * (radius / length).nan_to_num(nan=1.0).clamp(max=1)
    return ControlledStep(delta, direction, rate)


def _direction(
    local: LocalModel,
    settings: Settings,
    delta: Float[Tensor, ""],
    momentum: float | Literal["exact"],
) -> tuple[TrialStep, Float[Tensor, "..."]]:
    """Return a direction, and how far to go along it."""
    direction = trial_step(local.trials, delta, 0.0 if momentum == "exact" else momentum)
    if momentum == "exact" and local.proximal is not None:
        vectors = torch.cat([direction.vector[None], local.proximal.previous])
        direction = TrialStep(_minimizer(local.trials, vectors, delta) @ vectors, None)
    if settings.learning_rate == "exact":
        return direction, _minimizer(local.trials, direction.vector[None], delta)[0]
    return direction, _rate(local, settings)


def _rate(local: LocalModel, settings: Settings) -> Float[Tensor, "..."]:
    """Return the learning rate, which is not the exact one."""
    rate = settings.learning_rate
    number: Any = rate(local.updates) if callable(rate) else rate
    return scalar_like(number, local.loss, torch.float64)


def _minimizer(
    trials: TrialSteps | FreeTrials, vectors: Float[Tensor, "k d"], delta: Float[Tensor, ""]
) -> Float[Tensor, " k"]:
    """Return the multiples of vectors whose sum makes the damped quadratic model lowest."""
    slopes, damped, _ = quadratic_along(trials, vectors, delta)
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
        direction, rate = _direction(local, settings, delta, momentum)
        norm: Tensor = (rate * direction.vector).norm()
        return norm

    guess, enough = least, torch.maximum(local.gradient_norm / radius, least)
    # From the spectrum alone where nothing else decides on the length of a step.
    if settings.learning_rate != "exact":
        rate, lengths = _rate(local, settings), lengths_at(local.trials)
        if lengths is not None and rate.numel() == 1:
            least = torch.maximum(least, lengths.least)
            enough = torch.maximum(enough, least)
            longest = radius / rate.reshape(())
            delta = damping_of_length(lengths.of_dampings, least, enough, longest)
            # By products lengths are those of the spaces so far, which grow for what they give.
            while lengths.grow(delta):
                delta = damping_of_length(lengths.of_dampings, least, enough, longest)
            return delta
    if settings.adaptation.by_length:  # which mostly needs more than the least
        guess = torch.maximum(torch.where(local.damping.isnan(), enough, local.damping), least)
    return least_damping(length, guess, least, enough, radius)
