"""The least damping whose step is no longer than a trust radius."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ddnewton.transforms import any_known

RADIUS_SLACK = 0.9
"""A step of this share of the radius, or longer, counts as being as long as the radius."""

BRACKET_TRIALS, BRACKET_FACTOR = 16, 16.0
"""How many dampings are tried for a bracket, and again within it; the factor between the first."""


GRID_POINTS, LEAST_SHARE = 48, 1e-30
"""How many dampings are looked at together, and the least of them, of the largest."""


def damping_of_length(
    lengths: Callable[[Float[Tensor, " k"]], Float[Tensor, " k"]],
    least: Float[Tensor, ""],
    sufficient: Float[Tensor, ""],
    radius: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Return the same where ``lengths`` gives those of many steps at once, which cost little.

    The step is as long as the radius, to about one percent. A length falls with the damping: the
    root lies between two neighbours of a grid, and of ever finer ones between these.
    """
    low = torch.maximum(least, LEAST_SHARE * sufficient)
    high = torch.maximum(sufficient, low)
    for _ in range(3):
        exponents = torch.linspace(0, 1, GRID_POINTS, dtype=low.dtype, device=low.device)
        deltas = low * (high / low) ** exponents
        short = lengths(deltas) <= radius
        # The first that is short enough, the last where rounding leaves none.
        place = torch.where(short.any(), short.long().argmax(), GRID_POINTS - 1)
        low, high = deltas.gather(0, torch.stack([(place - 1).clamp(min=0), place]))
    return torch.where(lengths(least[None])[0] <= radius, least, high)


class Point(NamedTuple):
    """A damping δ that was tried, and 1/‖s(δ)‖ of its step."""

    damping: Float[Tensor, ""]
    inverse_length: Float[Tensor, ""]


def least_damping(
    length: Callable[[Float[Tensor, ""]], Float[Tensor, ""]],
    guess: Float[Tensor, ""],
    least: Float[Tensor, ""],
    sufficient: Float[Tensor, ""],
    radius: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Return the least damping, from ``least`` upwards, with a step no longer than the radius.

    Its step is at most a tenth shorter than the radius, unless the step of ``least`` is short
    enough. The search starts at ``guess``; ``sufficient`` is a damping that about shortens a step
    enough. The reciprocal of a step's length is nearly linear in the damping, so the root of
    1/‖s(δ)‖ = 1/radius is looked for along chords (Moré, Sorensen, "Computing a trust region step",
    1983), between two dampings of which the smaller makes too long a step.
    """

    def point(delta: Float[Tensor, ""]) -> Point:
        return Point(delta, 1 / length(delta).nan_to_num(nan=torch.inf))

    # Find two dampings with the root between them.
    goal = 1 / radius
    low, high = _bracket(point, guess, least, sufficient, goal)
    short_enough = low.inverse_length >= goal  # the step of ``least``: there is no root above it
    for _ in range(BRACKET_TRIALS):
        # End where the step of the larger damping is as long as the radius, to a tenth.
        active = ~short_enough & (high.inverse_length * RADIUS_SLACK > goal)
        if not any_known(active):
            break
        # Aim along the chord at a step in the middle of that tenth; bisect where it leads outside.
        width, rise = high.damping - low.damping, high.inverse_length - low.inverse_length
        missing = goal / RADIUS_SLACK**0.5 - low.inverse_length
        chord = low.damping + missing / rise * width
        inside = (chord > low.damping) & (chord < high.damping)
        new = point(torch.where(inside, chord, (low.damping + high.damping) / 2))
        # The new damping replaces the end that lies on its side of the root.
        low, high = _narrowed((low, high, new), active, new.inverse_length >= goal)
    return torch.where(short_enough, low.damping, high.damping)


def _bracket(
    point: Callable[[Float[Tensor, ""]], Point],
    guess: Float[Tensor, ""],
    least: Float[Tensor, ""],
    sufficient: Float[Tensor, ""],
    goal: Float[Tensor, ""],
) -> tuple[Point, Point]:
    """Return two dampings, one with too long a step, or ``least``, and one with a short enough."""
    low = high = point(guess)
    for _ in range(BRACKET_TRIALS):
        up = high.inverse_length < goal
        down = (low.inverse_length >= goal) & (low.damping > least)
        if not any_known(up | down):
            break
        larger = torch.where(high.damping > 0, BRACKET_FACTOR * high.damping, sufficient)
        smaller = torch.maximum(low.damping / BRACKET_FACTOR, least)
        low, high = _extended((low, high, point(torch.where(up, larger, smaller))), up, down)
    return low, high


def _extended(
    bracket: tuple[Point, Point, Point], up: Bool[Tensor, ""], down: Bool[Tensor, ""]
) -> tuple[Point, Point]:
    """Return the ends of a bracket that a new point extends upwards, downwards or not at all."""

    def where(if_up: Point, if_down: Point, if_neither: Point) -> Point:
        pairs = zip(if_up, if_down, if_neither, strict=True)
        return Point(*(torch.where(up, a, torch.where(down, b, c)) for a, b, c in pairs))

    low, high, new = bracket
    return where(high, new, low), where(new, low, high)


def _narrowed(
    bracket: tuple[Point, Point, Point], active: Bool[Tensor, ""], short: Bool[Tensor, ""]
) -> tuple[Point, Point]:
    """Return the ends of a bracket, one of them moved inside, where the search is active.

    That is the upper end where the step of the new point is short enough, and else the lower one.
    """
    low, high, new = bracket
    raised, lowered = active & ~short, active & short
    return (
        Point(*(torch.where(raised, a, b) for a, b in zip(new, low, strict=True))),
        Point(*(torch.where(lowered, a, b) for a, b in zip(new, high, strict=True))),
    )
