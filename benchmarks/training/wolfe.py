"""A line search for the strong Wolfe conditions, each trial with its gradient.

Source: Nocedal and Wright, *Numerical Optimization*, 2nd edition, algorithms 3.5 and 3.6, with the
cubic interpolation of their equation 3.59; also where rounding has made the loss flat, the
approximate conditions of Hager and Zhang 2005, equation 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

ARMIJO = 1e-4
CURVATURE = 0.9
"""The constants of the two conditions, as everybody has them for quasi-Newton methods."""
TRIALS = 30
FLATNESS = 1e-13
"""By how much of itself a loss may rise for the approximate conditions to hold."""


class Trial(NamedTuple):
    """A length along the direction, the loss there, its slope along the direction, its gradient."""

    length: float
    value: float
    slope: float
    gradient: Tensor


Evaluate = Callable[[float], Trial]


def cubic_minimum(a: Trial, b: Trial) -> float:
    """Return the minimum of the cubic through two trials and their slopes; nan if it has none."""
    width = b.length - a.length
    d1 = a.slope + b.slope - 3 * (b.value - a.value) / width
    square = d1 * d1 - a.slope * b.slope
    if not math.isfinite(square) or square < 0:
        return math.nan
    d2 = math.copysign(math.sqrt(square), width)
    below = b.slope - a.slope + 2 * d2
    return b.length - width * (b.slope + d2 - d1) / below if below else math.nan


def between(a: Trial, b: Trial) -> float:
    """Return a length between two trials, a tenth of their distance at least from either."""
    low, high = sorted((a.length, b.length))
    margin = (high - low) / 10
    length = cubic_minimum(a, b)
    inside = low + margin <= length <= high - margin
    if math.isfinite(length) and not inside:
        return min(max(length, low + margin), high - margin)
    return length if inside else (low + high) / 2


def beyond(before: Trial, last: Trial) -> float:
    """Return a longer length, twice to ten times the last, by the cubic where it has a minimum."""
    length = cubic_minimum(before, last)
    if not length > last.length:
        length = 10 * last.length
    return min(max(length, 2 * last.length), 10 * last.length)


def conditions(start: Trial) -> tuple[Callable[[Trial], bool], Callable[[Trial], bool]]:
    """Return whether a trial lowers the loss enough, and whether its slope is flat enough."""

    def lower(trial: Trial) -> bool:
        if trial.value <= start.value + ARMIJO * trial.length * start.slope:
            return True
        # Where the loss cannot tell any more its slope still can.
        near = trial.value <= start.value + FLATNESS * abs(start.value)
        return near and trial.slope <= (2 * ARMIJO - 1) * start.slope

    return lower, lambda trial: abs(trial.slope) <= -CURVATURE * start.slope


def strong_wolfe(evaluate: Evaluate, start: Trial, first: float) -> Trial | None:
    """Return a trial that satisfies the conditions, None where none is to be had.

    Where only the curvature's condition fails after all trials, the lowest trial is returned.
    """
    lower, flat_enough = conditions(start)
    low, length = start, first
    # Bracket a minimum: the first trial that is too high or has an ascending slope ends it.
    for used in range(TRIALS):
        trial = evaluate(length)
        finite = math.isfinite(trial.value) and math.isfinite(trial.slope)
        if not finite or not lower(trial) or (used and trial.value >= low.value):
            return narrowed(evaluate, start, low, trial, TRIALS - used)
        if flat_enough(trial):
            return trial
        if trial.slope >= 0:
            return narrowed(evaluate, start, trial, low, TRIALS - used)
        length, low = beyond(low, trial), trial
    return low


def narrowed(
    evaluate: Evaluate, start: Trial, low: Trial, high: Trial, trials: int
) -> Trial | None:
    """Return a trial between the lowest so far and one on the other side of a minimum."""
    lower, flat_enough = conditions(start)
    for _ in range(trials):
        if abs(high.length - low.length) <= 1e-14 * max(high.length, low.length):
            break
        finite = math.isfinite(high.value) and math.isfinite(high.slope)
        length = between(low, high) if finite else (low.length + high.length) / 4
        trial = evaluate(length)
        if not math.isfinite(trial.value) or not lower(trial) or trial.value >= low.value:
            high = trial
            continue
        if flat_enough(trial):
            return trial
        # Keep the minimum between the two: the slope of the lowest points to the other.
        if trial.slope * (high.length - low.length) >= 0:
            high = low
        low = trial
    return low if low.length else None
