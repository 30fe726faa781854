"""The damping that makes a step as long as it may be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ddnewton.adaptation import SLACK
from ddnewton.transforms import surely

TRIALS, APART = 16, 16.0
"""How many dampings are tried for a bracket, and within it; and how far apart the former are."""


def least_damping(
    length: Callable[[Float[Tensor, ""]], Float[Tensor, ""]],
    guess: Float[Tensor, ""],
    least: Float[Tensor, ""],
    radius: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Return the least damping, from ``least`` upwards, with a step no longer than the radius.

    The step is then the radius long, to a tenth, or ``least`` will do. The reciprocal of a step's
    length is nearly linear in the damping, so the root is looked for along chords (Moré, Sorensen,
    "Computing a trust region step", 1983), between dampings of which one makes a longer step.
    """

    def inverse(delta: Float[Tensor, ""]) -> Float[Tensor, ""]:
        return 1 / length(delta).nan_to_num(nan=torch.inf)

    goal = 1 / radius
    low = high = guess
    at_low = at_high = inverse(guess)
    for _ in range(TRIALS):
        up, down = at_high < goal, (at_low >= goal) & (low > least)
        if not surely(up | down):
            break
        new = torch.where(up, APART * high, torch.maximum(low / APART, least))
        at_new = inverse(new)
        bracket = ((low, at_low), (high, at_high), (new, at_new))
        (low, at_low), (high, at_high) = _moved(bracket, up, down)
    free = at_low >= goal
    for _ in range(TRIALS):
        if not surely(~free & (at_high * SLACK > goal)):
            break
        chord = low + (goal / SLACK**0.5 - at_low) / (at_high - at_low) * (high - low)
        new = torch.where((chord > low) & (chord < high), chord, (low + high) / 2)
        at_new = inverse(new)
        short = at_new >= goal
        low, high = torch.where(short, low, new), torch.where(short, new, high)
        at_low, at_high = torch.where(short, at_low, at_new), torch.where(short, at_new, at_high)
    return torch.where(free, low, high)


Point = tuple[Tensor, Tensor]


def _moved(
    bracket: tuple[Point, Point, Point], up: Bool[Tensor, ""], down: Bool[Tensor, ""]
) -> tuple[Point, Point]:
    """Return the ends of a bracket that a new point extends upwards, downwards or not at all."""

    def chosen(if_up: Point, if_down: Point, if_not: Point) -> Point:
        pairs = zip(if_up, if_down, if_not, strict=True)
        x, y = (torch.where(up, a, torch.where(down, b, c)) for a, b, c in pairs)
        return x, y

    low, high, new = bracket
    return chosen(high, new, low), chosen(new, low, high)
