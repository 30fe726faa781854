r"""When a fit ends: by the tests of MINPACK and SciPy, and where rounding leaves nothing to gain.

With the loss F, its fall ΔF by a step s that was taken, and the parameters θ before it, these are

    ftol    ΔF < ftol · F, and ΔF above a quarter of what the quadratic model promised
    xtol    ‖s‖ < xtol · (xtol + ‖θ‖)
    gtol    max_j |g_j| / √(2 F G_jj) ≤ gtol

the first two as in `scipy.optimize.least_squares`, lengths as in MINPACK in units of the scale, and
the last one as in MINPACK: of squared errors it is the largest cosine between the residuals and the
column of a parameter, which has no units. A step may also be short because it is damped. So none of
them counts unless there is nothing more to gain: the undamped step must promise less than
max(ftol, gtol) · F, or, for the first two, no more than twice what the damped one did.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.inputs.checks import check_nonnegative, check_positive
from ddnewton.linearize.precision import narrowest
from ddnewton.optim.adaptation import SMALLEST_DAMPING
from ddnewton.optim.local_model import LocalModel, sizes_of_blocks
from ddnewton.optim.promise import quadratic_along
from ddnewton.optim.search import Step
from ddnewton.optim.solved_trials import with_blocks
from ddnewton.optim.trial_steps import trial_step
from ddnewton.trees import as_real, tree_leaves

ADEQUATE_RATIO = 0.25
"""From which ratio of the actual to the promised fall the quadratic model is right about a step."""

UNDAMPED_SHARE = 0.5
"""A step that promises this share of what the undamped one does is not held back by its damping."""

LEFT_ROUNDINGS = 16.0
"""Up to how much noise of the loss there is nothing to gain: it is made of several roundings."""

GTOL = "converged: the gradient is zero to gtol = {:g}, beside the size of the residuals"
FTOL = "converged: the loss falls by less than ftol = {:g} of itself"
XTOL = "converged: a step is shorter than xtol = {:g} of the parameters"
ROUNDING = "converged: what is left to gain is lost in the rounding of the loss"
STALLED = "stalled: no step lowers the loss, however short, and yet its gradient is not zero"


class Limits(NamedTuple):
    """What ends a fit; None for a limit that there is not."""

    ftol: float | None
    xtol: float | None
    gtol: float | None
    max_updates: int | None
    max_seconds: float | None


class Verdict(NamedTuple):
    """What an update says of the end of a fit: the cosine of gtol, and why it ends, "" if not."""

    cosine: Float[Tensor, ""]
    reason: str


def check_limits(limits: Limits, *, ranks: bool) -> None:
    """Refuse limits that break a rule; where there are ``ranks``, those that these do not share."""
    if ranks and limits.max_seconds is not None:
        rule = "max_seconds must be None where params are DTensors"
        remedy = "Clocks of ranks differ, and one would wait for another: pass max_updates."
        raise BadValue(sentence(rule, limits.max_seconds, remedy))
    # Tolerances are numbers, a count of updates is an integer, and time runs forwards.
    for name in ("ftol", "xtol", "gtol"):
        if getattr(limits, name) is not None:
            check_nonnegative(name, getattr(limits, name))
    count = limits.max_updates
    if count is not None:
        rule, remedy = "max_updates must be an integer ≥ 1, or None", "Pass a count, such as 100."
        if isinstance(count, bool) or not isinstance(count, int):
            raise BadType(sentence(rule, repr(count), remedy))
        if count < 1:
            raise BadValue(sentence(rule, count, remedy))
    if limits.max_seconds is not None:
        check_positive("max_seconds", limits.max_seconds)


def verdict(
    limits: Limits, control: Float[Tensor, ""] | None, local: LocalModel, step: Step
) -> Verdict:
    """Return whether an update is the last one.

    ``control`` is that before the update; None if the next one has other points.
    """
    outcome = step.outcome
    cosine = largest_cosine(local, outcome.before)
    passed = _passed_tests(limits, local, step, cosine)
    stuck = control is not None and bool(~step.taken & _is_last(control, local, step))
    if not (passed or stuck or step.settled):
        return Verdict(cosine, "")
    # A test that is passed counts where the undamped step has as little to gain.
    gain, size = _left_to_gain(local), outcome.before.abs()
    share = max(limits.ftol or 0.0, limits.gtol or 0.0)
    noise = LEFT_ROUNDINGS * local.noise
    little_gain = bool(gain <= torch.maximum(share * size, noise))
    undamped = bool(UNDAMPED_SHARE * gain <= outcome.predicted)
    for reason, of_step in passed:
        if little_gain or (of_step and undamped):
            return Verdict(cosine, reason)
    # What is lost in rounding, and what is tried in vain, would be the same in the next update.
    if little_gain and (stuck or step.settled):
        return Verdict(cosine, ROUNDING)
    return Verdict(cosine, STALLED if stuck else "")


def largest_cosine(local: LocalModel, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return max_j |g_j| / √(2 F G_jj).

    On the side of the columns, where the G_jj are not known, it is that of all parameters of a
    block together, ‖g‖ / √(2 F tr G), which is no larger.
    """
    blocks = sizes_of_blocks(local)
    cosines = [size.slopes / (2 * loss.abs() * size.curvatures).sqrt() for size in blocks]
    # Where there is neither a loss nor a slope, the ratio of both is zero.
    largest: Tensor = torch.cat(cosines).nan_to_num(nan=0.0, posinf=torch.inf).amax()
    return largest


def _passed_tests(
    limits: Limits, local: LocalModel, step: Step, cosine: Float[Tensor, ""]
) -> list[tuple[str, bool]]:
    """Return the reasons of the tests that are passed, and whether they are of the step alone."""
    passed, outcome = [], step.outcome
    # The slope before the step.
    if limits.gtol is not None and cosine <= limits.gtol:
        passed.append((GTOL.format(limits.gtol), False))
    if not step.taken:
        return passed
    # The fall of the loss, and the length of the step.
    fall, size = outcome.before - outcome.after, outcome.before.abs()
    adequate = outcome.ratio > ADEQUATE_RATIO
    if limits.ftol is not None and adequate and fall < limits.ftol * size:
        passed.append((FTOL.format(limits.ftol), True))
    norm = local.curvature.params
    if limits.xtol is not None and outcome.length < limits.xtol * (limits.xtol + norm):
        passed.append((XTOL.format(limits.xtol), True))
    return passed


def _is_last(control: Float[Tensor, ""], local: LocalModel, step: Step) -> Bool[Tensor, ""]:
    """Return whether the next update could be no other, or no step of it be told from none."""
    eps = torch.finfo(narrowest(tree_leaves(as_real(local.params)))).eps
    unchanged = (step.following == control) | (step.following.isnan() & control.isnan())
    shortest: Tensor = step.outcome.length <= eps * local.curvature.params
    return shortest | unchanged | step.settled


def _left_to_gain(local: LocalModel) -> Float[Tensor, ""]:
    """Return the fall of the loss that the quadratic model promises for the least damped step.

    What a rule says of single directions holds for it too, a number that damps all of them not.
    """
    blocks = [b if callable(b.damping) else b._replace(damping=0.0) for b in local.model.blocks]
    vector, _ = trial_step(
        with_blocks(local.trials, blocks), SMALLEST_DAMPING * local.curvature.trace, 0.0
    )
    slopes, curvatures, _ = quadratic_along(local.trials, vector[None])
    return -(slopes[0] + curvatures[0, 0] / 2)
