"""Damping for losses without noise: as little of it as lets the loss fall."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from ddnewton.errors import BadValue, public, sentence
from ddnewton.inputs.checks import check_positive
from ddnewton.optim.adaptation.adaptation import Adaptation, Outcome
from ddnewton.optim.adaptation.fixed import (
    SMALLEST_DAMPING,
    check_factors,
    fixed_damping,
    within_damping_bounds,
)
from ddnewton.records import pickled_as_call
from ddnewton.types import DampingRule

LEAST_RATIO = 1e-4
"""The ratio of the actual to the predicted decrease from which on a step is taken."""

FINE_TRIALS, COARSE_SHRINK, COARSE_UP = 10, 0.5, 10.0
"""For how many trials a radius shrinks, or a damping rises, as it is asked to, and how much they do
after that: a loss that has not fallen by then is far from its quadratic model, or not finite."""


@pickled_as_call
@public
def trust_region(
    start: float = 1.0,
    *,
    grow: float = 2.0,
    shrink: float = 0.85,
    rule: float | Tensor | DampingRule = 0.0,
) -> Adaptation:
    r"""Return damping for losses without noise, by a radius that no damped step may exceed.

    δ is the smallest for which ‖s / scale‖ is no longer than the radius. The loss never rises: a
    step is taken where it falls. If not, its outputs tell how the model bends along it,
    ρ = f(θ + s) − f(θ) − J s, and the arc

    .. math:: t s + t^2 c, \qquad c = -(G + \delta I)^{-1} J^\top H \rho / N,

    with the Hessians H of the loss in the outputs, is tried: all of it, then four shares t from a
    little beyond where the outputs so far predict that the loss falls. If none is taken the radius
    becomes ``shrink`` times the length of the last t s, and another step is tried, from the same
    decomposition; from the eleventh on half of it. After a step that is taken the radius is
    ``grow`` times the length of s, or t s. So steps are about as long as they can be while the loss
    falls, however small the share of the predicted decrease: in the curved valleys of regressions
    and of physics-informed nets longer steps get there in fewer. The first radius is ``start``
    times the length of the parameters, ‖θ / scale‖, or where they are zero, the length of a step
    damped by 1e-3 of the trace. The scale that goes with it is "jac".

    A first step as long as the parameters throws a constant that the residuals hardly know of, such
    as one of an equation beside an untrained net, far away: take ``start=0.1``, or bounds, there.

    Arcs go with least squares and any other loss on all samples; with momentum, weight decay,
    directions that are selected, sub-samples or a ``trust_radius`` steps are straight.

    Source: Moré, "The Levenberg-Marquardt algorithm: implementation and theory", in *Numerical
    Analysis*, Lecture Notes in Mathematics 630, 1978 (δ of a radius, and the scale by the largest
    sizes of the columns so far); Transtrum, Sethna, "Improvements to the Levenberg-Marquardt
    algorithm for nonlinear least-squares minimization", 2012, arXiv 1201.5885 (delayed
    gratification: damp fast down, slowly up; geodesic acceleration, which 2c is to leading order).

    Examples
    --------
    >>> trust_region().by_length
    True
    """
    check_positive("start", start)
    check_positive("shrink", shrink)
    check_factors(grow=grow)
    if not shrink < 1:
        raise BadValue(sentence("shrink must be below 1", shrink, "Pass a share, such as 0.9."))

    def judge(radius: Tensor, outcome: Outcome) -> tuple[Tensor, Tensor]:
        taken = _loss_falls(outcome)
        length, coarse = torch.fmin(outcome.length, radius), min(shrink, COARSE_SHRINK)
        shorter = torch.where(outcome.attempts < FINE_TRIALS, shrink * length, coarse * length)
        next_radius = torch.where(taken, grow * outcome.length, shorter)
        return taken, torch.where(outcome.length > 0, next_radius, torch.nan)  # nan: start anew

    return fixed_damping("rule", rule)._replace(
        start=lambda curvature: start * curvature.params,
        damping=lambda control, curvature: SMALLEST_DAMPING * curvature.trace,
        judge=judge,
        by_length=True,
        scale="jac",
    )


@pickled_as_call
@public
def levenberg_marquardt(
    start: float = 1e-3,
    *,
    down: float = 10.0,
    up: float = 1.5,
    rule: float | Tensor | DampingRule = 0.0,
) -> Adaptation:
    r"""Return damping for losses without noise, by δ itself.

    A step is taken where the loss falls, and δ is divided by ``down``; where it does not, δ is
    multiplied by ``up``, from the eleventh trial on by 10, and another step is tried on the same
    batch: fast down and slowly up, to about the least damping with which the loss falls. The loss
    never rises. The first δ is ``start`` times the trace of the Gauss-Newton matrix, which is of
    the size of its largest eigenvalue. The scale that goes with it is "jac".

    `trust_region` does the same by the length of steps, which stays what it is where curvatures
    change by orders of magnitude: it solves more problems.

    Source: Marquardt, "An algorithm for least-squares estimation of nonlinear parameters", SIAM
    J. Appl. Math. 11, 1963 (the loop, and the scale); Transtrum, Sethna, "Improvements to the
    Levenberg-Marquardt algorithm for nonlinear least-squares minimization", 2012, arXiv 1201.5885
    (delayed gratification).

    Examples
    --------
    >>> levenberg_marquardt().learning_rate
    1.0
    """
    check_positive("start", start)
    check_factors(down=down, up=up)

    def judge(delta: Tensor, outcome: Outcome) -> tuple[Tensor, Tensor]:
        taken = _loss_falls(outcome)
        more = torch.where(outcome.attempts < FINE_TRIALS, delta * up, delta * max(up, COARSE_UP))
        return taken, within_damping_bounds(torch.where(taken, delta / down, more), outcome)

    return fixed_damping("rule", rule)._replace(
        start=lambda curvature: start * curvature.trace, judge=judge, scale="jac"
    )


def _loss_falls(outcome: Outcome) -> Bool[Tensor, ""]:
    """Return whether a step lowers the loss, by some share of the predicted decrease."""
    return (outcome.after <= outcome.before) & (outcome.ratio > LEAST_RATIO)
