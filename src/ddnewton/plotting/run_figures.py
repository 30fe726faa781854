"""Figures of training: many steps, of one method or of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ddnewton.diagnostics import summaries
from ddnewton.errors import BadValue, public, sentence
from ddnewton.plotting.step_figures import budget, signal_to_noise, spectrum
from ddnewton.plotting.style import COLORS, MEAN_LINE, POINT_MARKS, curve, finish, panels, rug

SHOWN_GROUPS = 6
"""Of how many groups an overview shows the directions."""

SHOWN_RATIOS = (-1.0, 3.0)
"""What a panel of ratios shows; near a minimum they are rounding over rounding."""

Lines: TypeAlias = Sequence[Mapping[str, Any]]


def training(ax: Axes, curves: Mapping[str, Sequence[float]], quantity: str) -> None:
    """Draw one quantity over the steps of several methods, in the order of `COLORS`."""
    for color, (label, values) in zip(COLORS, curves.items(), strict=False):
        ax.plot(range(len(values)), values, color=color, label=label, linewidth=1.1)
    ax.set(xlabel="step", ylabel=quantity)
    finish(ax, "no step")


def decreases(ax: Axes, predicted: Sequence[float], actual: Sequence[float]) -> None:
    """Draw by how much the loss fell on every mini-batch against what its quadratic model said.

    Where one of the two is not positive there is no point: the axes are logarithmic.
    """
    both = torch.tensor([predicted, actual])
    both = both[:, (both > 0).all(0)]
    if both.numel():
        ax.scatter(both[0], both[1], s=9, color=COLORS[0], alpha=0.5, linewidth=0)
        ends = [both.min().item(), both.max().item()]
        ax.plot(ends, ends, color="black", linewidth=0.8, label="predicted = actual")
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="predicted decrease of the loss",
        ylabel="actual decrease",
    )
    finish(ax, "no decrease")


def history(axes: Sequence[Axes], lines: Lines) -> None:
    """Draw the course of a run on up to six Axes.

    In this order: the loss, with all numbers whose names end in ``loss``; the damping; the actual
    over the predicted decrease; the rank; the share of the squared gradient norm inside the kept
    directions; the lengths of the gradient and of the step.

    ``lines`` are what `diagnostics.read` returns. What is missing or not finite leaves a gap. Steps
    are counted from 1, or are the numbers called ``step`` where every line has one.
    """
    steps = _steps(lines)
    for ax, draw in zip(axes, (_loss, _damping, _ratio, _rank, _share, _lengths), strict=False):
        draw(ax, steps, lines)
        ax.set_xlabel("step")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
        finish(ax, "not in this run")


@public
def overview(lines: Lines, path: str | Path) -> None:
    """Save a figure of a run: its `history`, and the last directions in it, if there are any.

    Of these it shows `spectrum`, `signal_to_noise` and `budget`; with groups a row for each, of the
    first six.

    Raises
    ------
    ValueError
        If there are no lines.
    """
    if not lines:
        raise BadValue(sentence("a run must have at least one step", "none", "Log some."))
    last = max((i for i, line in enumerate(lines) if "directions" in line), default=0)
    found, step = summaries(lines[last]), _steps(lines)[last].item()
    with panels(2 + min(len(found), SHOWN_GROUPS), 3) as (figure, axes):
        history(axes[:6], lines)
        for i, each in enumerate(found[:SHOWN_GROUPS]):
            a, b, c = axes[6 + 3 * i : 9 + 3 * i]
            spectrum(a, each)
            signal_to_noise(b, each)
            budget(c, each)
            group = f", group {i + 1} of {len(found)}" if len(found) > 1 else ""
            a.set_title(f"step {step:.0f}{group}")
        figure.savefig(path)


def _steps(lines: Lines) -> Float[Tensor, " t"]:
    steps = _column(lines, "step")
    counted = torch.arange(1, len(lines) + 1, dtype=steps.dtype)
    return steps if steps.isfinite().all() else counted


def _column(lines: Lines, name: str) -> Float[Tensor, " t"]:
    """Return a number of every step; nan where there is none."""
    values = [line.get(name) for line in lines]
    numbers = [float(x) if isinstance(x, int | float) else torch.nan for x in values]
    return torch.tensor(numbers, dtype=torch.float64)


def _loss(ax: Axes, steps: Float[Tensor, " t"], lines: Lines) -> None:
    values = _column(lines, "loss")
    known = [values]
    others = {name: None for line in lines for name in line if name.endswith("loss")}
    others.pop("loss", None)
    curve(ax, steps, values, label="loss" if others else None)
    for color, name in zip(COLORS[1:], others, strict=False):
        values = _column(lines, name)
        seen = values.isfinite()  # now and then: joined, not left as gaps
        points: dict[str, Any] = {} if seen.all() else {"marker": ".", "markersize": 5}
        curve(ax, steps[seen], values[seen], color, label=name, **points)
        known.append(values)
    refused = torch.tensor([line.get("accepted") is False for line in lines], dtype=torch.bool)
    rug(ax, steps, refused, "no step")
    _scale(ax, torch.cat(known))
    ax.set_ylabel("loss")


def _damping(ax: Axes, steps: Float[Tensor, " t"], lines: Lines) -> None:
    values = _column(lines, "damping")
    _scale(ax, values[values > 0])
    if ax.get_yscale() == "log":
        rug(ax, steps, values == 0, r"$\delta = 0$")
        values = values.where(values > 0, torch.nan)
    curve(ax, steps, values)
    ax.set_ylabel(r"damping $\delta$  (loss / length$^2$)")


def _ratio(ax: Axes, steps: Float[Tensor, " t"], lines: Lines) -> None:
    values, (low, high) = _column(lines, "ratio"), SHOWN_RATIOS
    if values.isfinite().any():
        ax.axhline(1, **MEAN_LINE)
    curve(ax, steps, values.where((values >= low) & (values <= high), torch.nan), **POINT_MARKS)
    for beyond, edge, marker in ((values < low, low, "v"), (values > high, high, "^")):
        if beyond.any():
            label = f"{'below' if marker == 'v' else 'above'} {edge:g}: {int(beyond.sum())}"
            edges = torch.full_like(steps[beyond], edge)
            ax.plot(steps[beyond], edges, marker, color=COLORS[1], markersize=4, label=label)
    ax.set_ylabel("actual / predicted decrease")


def _rank(ax: Axes, steps: Float[Tensor, " t"], lines: Lines) -> None:
    curve(ax, steps, _column(lines, "rank"))
    ax.set(ylim=(0, None), ylabel="numerical rank")
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))


def _share(ax: Axes, steps: Float[Tensor, " t"], lines: Lines) -> None:
    curve(ax, steps, _column(lines, "gradient_share"))
    ax.set(ylim=(-0.03, 1.03), ylabel="share of gradient$^2$ kept")


def _lengths(ax: Axes, steps: Float[Tensor, " t"], lines: Lines) -> None:
    names = {"gradient_norm": "gradient", "step_norm": "step"}
    columns = {label: _column(lines, name) for name, label in names.items()}
    for color, (label, values) in zip(COLORS, columns.items(), strict=False):
        curve(ax, steps, values.where(values > 0, torch.nan), color, label=label)
    _scale(ax, torch.cat([values[values > 0] for values in columns.values()]))
    ax.set_ylabel("norm")


def _scale(ax: Axes, values: Float[Tensor, " _"]) -> None:
    """Make an axis logarithmic if there is a decade to show, and nothing below it."""
    values = values[values.isfinite()]
    if values.numel() and 0 < 10 * values.min() <= values.max():
        ax.set_yscale("log")
