"""Damping for batches that change: of noisy samples, or of points drawn anew."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ddnewton.errors import BadType, BadValue, public, sentence
from ddnewton.inputs.checks import check_positive
from ddnewton.optim.adaptation.adaptation import Adaptation, Choice, Outcome
from ddnewton.optim.adaptation.fixed import check_factors, fixed_damping, within_damping_bounds
from ddnewton.records import pickled_as_call
from ddnewton.types import DampingRule


@pickled_as_call
@public
def held_out(
    fraction: float = 0.25,
    *,
    every: int = 10,
    grid: Sequence[float] = (0.1, 0.3, 1.0, 3.0, 10.0),
    start: float = 1.0,
    rule: float | Tensor | DampingRule = 0.0,
) -> Adaptation:
    """Return damping for mini-batches, chosen on a held-out part of some of them.

    δ is a multiple of the mean eigenvalue of the batch's Gauss-Newton matrix, tr G over the number
    of eigenvalues that can be positive. A multiple that is right for one net and loss is about
    right for others. It starts at ``start``. In the first update, and in every ``every``-th after
    it, the batch is split: steps are made of its first part, and the last part, a ``fraction`` of
    the batch, is held out. The best multiple in ``grid`` is the one whose whole step, without
    momentum, leads to the lowest loss on the held-out part. The multiple moves half the way there,
    in its logarithm. So batches should be shuffled. A step that lowers the loss of its own samples
    by less than half of the predicted decrease is not taken, and δ rises fourfold.

    Unless others are passed, the learning rate falls from 0.2 as 1/√(1 + t/20) with the number t of
    updates, and momentum is 0.9.

    Examples
    --------
    >>> import torch
    >>> held_out().learning_rate(torch.tensor(60))
    tensor(0.1000, dtype=torch.float64)
    """
    # The options: start and fraction, how often, and the multiples.
    check_positive("start", start)
    check_positive("fraction", fraction)
    if fraction >= 1:
        least = "fraction must be less than 1"
        raise BadValue(sentence(least, fraction, "Pass a share of the batch, such as 0.25."))
    if isinstance(every, bool) or not isinstance(every, int):
        raise BadType(sentence("every must be an integer", repr(every), "Pass a count, as 10."))
    if every < 1:
        raise BadValue(sentence("every must be at least 1", every, "Pass a count, as 10."))
    if not isinstance(grid, Sequence) or not grid:
        rule_ = "grid must be a sequence of positive numbers"
        raise BadType(sentence(rule_, repr(grid), "Pass some multiples, such as (0.1, 1.0, 10.0)."))
    for multiple in grid:
        check_positive("grid", multiple)
    # The control is the multiple of the mean eigenvalue.
    return fixed_damping("rule", rule)._replace(
        start=lambda curvature: start + 0 * curvature.trace,
        damping=lambda control, curvature: control * curvature.mean,
        judge=_judge_on_own_samples,
        choice=Choice(every, fraction, tuple(map(float, grid))),
        learning_rate=partial(_falling_rate, first=0.2, slowly=20),
        momentum=0.9,
    )


@pickled_as_call
@public
def spring(
    start: float = 1e-3,
    *,
    down: float = 1.2,
    up: float = 2.0,
    rule: float | Tensor | DampingRule = 0.0,
) -> Adaptation:
    r"""Return damping for points that are drawn anew in every update, of a loss without noise.

    That is a residual that can be zero at all points, sampled at others each time, as that of a
    differential equation in many dimensions. A step that nearly solves every batch is right there,
    and what is left to average out is where batches disagree: by momentum, 0.95, which keeps what
    the batches before have found (SPRING), and by a learning rate that falls from ½ as
    1/√(1 + t/50) with the number t of updates. Unless others are passed, these are used.

    A step is taken unless the loss of its own batch misses the predicted decrease by more than half
    of that, or is not finite; then δ is multiplied by ``up``. Where it misses by less than a
    quarter, δ is divided by ``down``. The first δ is ``start`` times the trace of the Gauss-Newton
    matrix.

    For mini-batches of noisy samples take `held_out`, which lets no batch be fitted by itself.

    Source: Goldshlager, Abrahamsen, Lin, "A Kaczmarz-inspired approach to accelerate the
    optimization of neural network wavefunctions", 2024, arXiv 2401.10190 (the step);
    Guzmán-Cordero, Dangel, Goldshlager, Zeinhofer, 2025, arXiv 2505.12149 (for differential
    equations; how to adapt damping and rate is left open there).

    Examples
    --------
    >>> import torch
    >>> spring().momentum, spring().learning_rate(torch.tensor(150))
    (0.95, tensor(0.2500, dtype=torch.float64))
    """
    check_positive("start", start)
    check_factors(down=down, up=up)

    def judge(delta: Tensor, outcome: Outcome) -> tuple[Tensor, Tensor]:
        missing, size = _missing(outcome), outcome.predicted.abs()
        taken = outcome.after.isfinite() & (missing <= size / 2)
        less = torch.where(missing <= size / 4, delta / down, delta)
        return taken, within_damping_bounds(torch.where(taken, less, delta * up), outcome)

    return fixed_damping("rule", rule)._replace(
        start=lambda curvature: start * curvature.trace,
        judge=judge,
        learning_rate=partial(_falling_rate, first=0.5, slowly=50),
        momentum=0.95,
    )


def _falling_rate(updates: Tensor, first: float, slowly: float) -> Tensor:
    """Return the learning rate, which falls so that the noise of batches averages out."""
    return first / (1 + updates.double() / slowly).sqrt()


def _missing(outcome: Outcome) -> Tensor:
    """Return the decrease that is missing: predicted − actual = predicted (1 − ratio)."""
    return outcome.predicted * (1 - outcome.ratio)


def _judge_on_own_samples(control: Tensor, outcome: Outcome) -> tuple[Tensor, Tensor]:
    """Take a step whose loss is near the predicted one; multiply the damping by 4 where it is not.

    Near is within half of the predicted decrease, or rise, which momentum may lead to. Without this
    a net that is fitted to all but a few samples, with hardly any curvature left, is thrown far
    away by these.
    """
    taken = outcome.after.isfinite() & (_missing(outcome) <= outcome.predicted.abs() / 2)
    return taken, torch.where(taken, control, 4 * control)
