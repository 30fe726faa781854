"""The updates of a fit, one after the other, until there is a reason to end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ddnewton.distributed.team import Team
from ddnewton.errors import BadType, BadValue, NotFinite, sentence
from ddnewton.inputs.callables import accepts_arguments
from ddnewton.optim.fit_record import Fit, continued, history_of
from ddnewton.optim.local_model import LocalModel
from ddnewton.optim.progress import Tell
from ddnewton.optim.pure_functions import Update, observed_update
from ddnewton.optim.search import Step
from ddnewton.optim.state import State
from ddnewton.optim.stopping import Limits, Verdict, verdict
from ddnewton.transforms import is_batched
from ddnewton.trees import tree_leaves
from ddnewton.types import PyTree

RUNNING = "running"
"""The reason of a fit that a callback is shown."""


class Job(NamedTuple):
    """What a fit is made of: its update, points, what ends it, and who looks on."""

    plan: Update
    points: Callable[[int], tuple[PyTree, PyTree]]
    fixed: bool  # whether the points are the same at every update
    limits: Limits
    watch: Callable[[Fit], str]
    team: Team | None  # the ranks that hold the points


def fitted(job: Job, params: PyTree, state: State) -> Fit:
    """Return the fit after the last update, whatever ends it but an error."""
    began, reason = time.monotonic(), ""
    latest: Fit | None = None
    best: Fit | None = None
    try:
        while not reason:
            latest, reason = _updated(job, params, state, latest)
            params, state = latest.params, latest.state
            # The best has the lowest loss; at other points the losses before say nothing.
            if best is None or not job.fixed or not latest.loss > best.loss:
                best = latest
            watched = _watched(job, latest, began)
            reason = reason or watched
    except KeyboardInterrupt:
        # There is nothing yet to return, or ranks that are not where this one is.
        if best is None or job.team is not None:
            raise
        reason = "interrupted: by the keyboard"
    except NotFinite as error:
        if best is None:
            raise
        reason = f"ended where the next update is not defined: {error}"
    assert latest is not None
    assert best is not None
    return best._replace(updates=latest.updates, reason=reason, history=latest.history)


def _updated(job: Job, params: PyTree, state: State, before: Fit | None) -> tuple[Fit, str]:
    """Return the fit after one more update, and why it is the last one, or ""."""
    began = time.monotonic()
    control, updates = state.control if job.fixed else None, int(state.updates)

    def observe(local: LocalModel, step: Step) -> tuple[Verdict, float]:
        return verdict(job.limits, control, local, step), time.monotonic() - began

    (params, state, info), ((cosine, reason), seconds) = observed_update(
        *(job.plan, params, state, lambda: job.points(updates)), observe=observe
    )
    history = history_of(info, cosine, seconds)
    if before is not None:
        history = continued(before.history, history)
    fit = Fit(
        params=params,
        loss=info.loss_after,
        updates=len(history.losses),
        reason=RUNNING,
        info=info,
        state=state,
        history=history,
    )
    return fit, reason


def watcher(callback: Callable[[Fit], object] | None, tell: Tell) -> Callable[[Fit], str]:
    """Return a function that shows a fit, and returns why a callback ends it, or ""."""

    def watch(fit: Fit) -> str:
        tell(fit.updates, float(fit.loss), float(fit.info.damping))
        if callback is not None:
            try:
                callback(fit)
            except StopIteration:
                return "stopped: by the callback"
        return ""

    return watch


def _watched(job: Job, fit: Fit, began: float) -> str:
    """Return why a fit ends that has been shown, on any of the ranks, or is out of time, or ""."""

    def shown() -> tuple[str, float]:
        return job.watch(fit), time.monotonic() - began

    of_ranks = [shown()] if job.team is None else job.team.exchanged(shown)
    reasons = (reason for reason, _ in of_ranks if reason)
    return next(reasons, _out_of(job.limits, fit, of_ranks[0][1]))


def _out_of(limits: Limits, fit: Fit, seconds: float) -> str:
    """Return the reason of a fit whose updates or seconds are used up, or ""."""
    if limits.max_updates is not None and fit.updates >= limits.max_updates:
        return f"ended after max_updates = {limits.max_updates}"
    if limits.max_seconds is not None and seconds >= limits.max_seconds:
        return f"ended after max_seconds = {limits.max_seconds:g}"
    return ""


def check_alone(*trees: PyTree) -> None:
    """Require one fit, not an ensemble: when to end is not the same for all its members."""
    if any(isinstance(leaf, Tensor) and is_batched(leaf) for leaf in tree_leaves(trees)):
        rule, remedy = "fit is of one set of parameters", "Map directional_newton's update instead."
        raise BadValue(sentence(rule, "an ensemble under vmap, or a graph to compile", remedy))


def check_watching(callback: object, progress: object) -> None:
    """Require a function that is shown the fit, or None, and a choice that is true or false."""
    if callback is not None and not (callable(callback) and accepts_arguments(callback, 1)):
        rule, remedy = "callback must be a function of a Fit, or None", "Pass callback(fit)."
        raise BadType(sentence(rule, repr(callback), remedy))
    if not isinstance(progress, bool):
        rule, remedy = "progress must be True or False", "True shows a bar."
        raise BadType(sentence(rule, repr(progress), remedy))
