"""The damping that makes a step as long as it may be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ddnewton.optim.adaptation import RADIUS_SLACK
from ddnewton.transforms import any_known

BRACKET_TRIALS, BRACKET_FACTOR = 16, 16.0
"""How many dampings are tried for a bracket, and within it; and how far apart the former are."""


def least_damping(
    length: Callable[[Float[Tensor, ""]], Float[Tensor, ""]],
    guess: Float[Tensor, ""],
    least: Float[Tensor, ""],
    enough: Float[Tensor, ""],
    radius: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Return the least damping, from ``least`` upwards, with a step no longer than the radius.

    The step is then the radius long, to a tenth, or ``least`` will do. About ``enough`` is enough.
    The reciprocal of a step's length is nearly linear in the damping, so the root is looked for
    along chords (Moré, Sorensen, "Computing a trust region step", 1983), between dampings of which
    one makes a longer step.
    """

    def inverse(delta: Float[Tensor, ""]) -> Float[Tensor, ""]:
        return 1 / length(delta).nan_to_num(nan=torch.inf)

    goal = 1 / radius
    low = high = guess
    at_low = at_high = inverse(guess)
    for _ in range(BRACKET_TRIALS):
        up, down = at_high < goal, (at_low >= goal) & (low > least)
        if not any_known(up | down):
            break
        further = torch.where(high > 0, BRACKET_FACTOR * high, enough)
        new = torch.where(up, further, torch.maximum(low / BRACKET_FACTOR, least))
        at_new = inverse(new)
        bracket = ((low, at_low), (high, at_high), (new, at_new))
        (low, at_low), (high, at_high) = _moved(bracket, up, down)
    free = at_low >= goal
    for _ in range(BRACKET_TRIALS):
        active = ~free & (at_high * RADIUS_SLACK > goal)
        if not any_known(active):
            break
        chord = low + (goal / RADIUS_SLACK**0.5 - at_low) / (at_high - at_low) * (high - low)
        new = torch.where((chord > low) & (chord < high), chord, (low + high) / 2)
        at_new = inverse(new)
        bracket = ((low, at_low), (high, at_high), (new, at_new))
        (low, at_low), (high, at_high) = _narrowed(bracket, active, at_new >= goal)
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


def _narrowed(
    bracket: tuple[Point, Point, Point], active: Bool[Tensor, ""], short: Bool[Tensor, ""]
) -> tuple[Point, Point]:
    """Return the ends of a bracket with one of them, where it is active, at a point inside."""
    low, high, new = bracket
    raised, lowered = active & ~short, active & short
    x, at_x = (torch.where(raised, a, b) for a, b in zip(new, low, strict=True))
    y, at_y = (torch.where(lowered, a, b) for a, b in zip(new, high, strict=True))
    return (x, at_x), (y, at_y)
