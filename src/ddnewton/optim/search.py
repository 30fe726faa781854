"""The search for a step of one batch: try one, look at the loss, and take it or damp more."""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ddnewton.host_reads import answers
from ddnewton.optim.adaptation import Outcome
from ddnewton.optim.arc import (
    Arc,
    arc_of,
    first_share,
    is_whole,
    promise_at,
    vector_at,
    with_end,
)
from ddnewton.optim.box import step_inside
from ddnewton.optim.control import first_control, step_of_control
from ddnewton.optim.local_model import LocalModel, TrialPoint, in_params_units, point_at
from ddnewton.optim.promise import quadratic_along
from ddnewton.optim.settings import Settings
from ddnewton.transforms import any_known, is_batched, unwrapped
from ddnewton.trees import tree_map

MOST_ATTEMPTS = 20
"""How many steps are tried before the parameters are left where they are."""

ARC_ATTEMPTS, SHARES_TRIED, SHORTER = 5, 4, 0.85
"""How many steps that are not taken are tried again as arcs, in how many shares of these besides
all of it, and how much shorter one share is than the one before."""


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


class Searched(NamedTuple):
    """The step that a search ends with, and what the host has read of it.

    Of an ensemble that is of any of its members; while compiling nothing is read.
    """

    step: Step
    is_open: bool  # neither taken nor settled
    is_still: bool  # taken, and of no length
    is_left: bool  # not taken


def search(local: LocalModel, settings: Settings, control: Float[Tensor, ""]) -> Searched:
    """Return the first step that is taken, or that leaves nothing to gain, or the last one."""
    momentum: float | Literal["exact"] = settings.momentum
    control = first_control(local, settings, control)
    searched = _tried(local, settings, control, momentum, 0)
    for attempt in range(1, MOST_ATTEMPTS):
        # Every member of an ensemble has its step once none of them is left to search.
        if not searched.is_open:
            break
        # A step before is not shortened by damping: leave it out from the second trial on.
        step = searched.step
        searched = _tried(local, settings, step.following, 0.0, attempt)
        if is_batched(step.taken):
            ended = partial(torch.where, ~_is_open(step))
            searched = _read(tree_map(ended, step, searched.step))
    return searched


def _read(step: Step) -> Searched:
    """Return a step with what the host has to know of it."""
    still = step.taken & (step.outcome.length == 0)
    masks = (_is_open(step), still, ~step.taken)
    return Searched(step, *answers([unwrapped(mask) for mask in masks]))


def _inside(local: LocalModel, vector: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """Return a step, in the units of the model, cut to the bounds of the parameters."""
    if local.box is None:
        return vector
    step = step_inside(local.box, local.params, in_params_units(local, vector))
    return step if local.scale is None else step / local.scale


def _tried(
    local: LocalModel,
    settings: Settings,
    control: Float[Tensor, ""],
    momentum: float | Literal["exact"],
    attempt: int,
) -> Searched:
    """Try the step that a control leads to."""
    delta, (vector, slopes_along), rate = step_of_control(local, settings, control, momentum)
    stride = rate * vector
    moved, point = _inside(local, stride), _after(local, stride)
    # The decrease that the quadratic model promises, −(gᵀs + ½ sᵀG s).
    column_slopes = None
    if slopes_along is not None and moved is stride and rate.numel() == 1:
        column_slopes = (rate * slopes_along)[:, None]
    slopes, curvatures, column_slopes = quadratic_along(
        local.trials, moved[None], column_slopes=column_slopes
    )
    predicted = -(slopes[0] + curvatures[0, 0] / 2)
    decrease = local.loss - point.loss
    settled = (predicted.abs() <= local.noise) & (decrease.abs() <= local.noise)
    outcome = Outcome(
        before=local.loss,
        after=point.loss,
        predicted=predicted,
        ratio=torch.where(settled, 1, decrease / predicted),
        length=moved.norm().nan_to_num(nan=torch.inf),
        attempts=torch.full_like(local.updates, attempt),
        curvature=local.curvature,
    )
    # The adaptation's verdict; a step that changes nothing says nothing of the control.
    taken, following = settings.adaptation.judge(control, outcome)
    following = torch.where(settled & ~taken, control, following)
    step = Step(vector, rate, delta, outcome, taken, settled, following, outcome.attempts + 1)
    # Where it is not taken its outputs tell how the model bends along it.
    searched, may_bend = _read(step), settings.adaptation.by_length and attempt < ARC_ATTEMPTS
    if not (may_bend and settings.trust_radius is None and searched.is_open):
        return searched
    arc = arc_of(local.trials, delta, moved, point.outputs, column_slopes)
    return searched if arc is None else _read(_on_arc(local, settings, control, step, arc))


def _after(local: LocalModel, vector: Float[Tensor, " d"]) -> TrialPoint:
    """Return where a step leads the samples of the gradient."""
    samples = [term.objective.samples.slopes for term in local.model.terms]
    return point_at(local, 0.0 if local.proximal is None else local.proximal.decay, vector, samples)


def _on_arc(
    local: LocalModel, settings: Settings, control: Float[Tensor, ""], step: Step, arc: Arc
) -> Step:
    """Try an arc in place of a step that is not taken: all of it, then ever shorter shares."""
    # All of it, where that is short enough; the outputs there tell of its third power.
    walkable = is_whole(arc)
    if any_known(walkable):
        further, point = _at_share(local, settings, control, step, arc, torch.ones_like(control))
        step = _better(step, further, walkable)
        if not any_known(_is_open(step)):
            return step
        ended = with_end(local.trials, arc, point.outputs)
        arc = tree_map(partial(torch.where, walkable), ended, arc)
    # Shares of it, from a little beyond where the loss is predicted to fall.
    share = first_share(local.trials, arc)
    for _ in range(SHARES_TRIED):
        if not any_known(share.isfinite() & _is_open(step)):
            break
        further, _ = _at_share(local, settings, control, step, arc, share)
        step = _better(step, further, share.isfinite())
        share = SHORTER * share
    return step


def _at_share(
    local: LocalModel,
    settings: Settings,
    control: Float[Tensor, ""],
    step: Step,
    arc: Arc,
    share: Float[Tensor, ""],
) -> tuple[Step, TrialPoint]:
    """Try a share of an arc; the radius follows that of the step that it begins as."""
    vector, predicted = vector_at(arc, share), promise_at(local.trials, arc, share)
    point = _after(local, vector)
    outcome = step.outcome._replace(
        after=point.loss,
        predicted=predicted,
        ratio=(local.loss - point.loss) / predicted,
        length=share * step.outcome.length,
    )
    taken, following = settings.adaptation.judge(control, outcome)
    outcome = outcome._replace(length=_inside(local, vector).norm())
    further = step._replace(
        vector=vector,
        rate=torch.ones_like(step.rate),
        outcome=outcome,
        taken=taken,
        following=following,
    )
    return further, point


def _is_open(step: Step) -> Bool[Tensor, ""]:
    """Return whether there is more to try: the step is not taken, and has something to gain."""
    return ~(step.taken | step.settled)


def _better(step: Step, further: Step, usable: Bool[Tensor, ""]) -> Step:
    """Return a further step where it is taken and the first is not, and else with its control."""
    replaceable = usable & _is_open(step)
    step = step._replace(following=torch.where(replaceable, further.following, step.following))
    better: Step = tree_map(partial(torch.where, replaceable & further.taken), further, step)
    return better
