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
from ddnewton.plotting.style import (
    COLORS,
    MEAN_LINE,
    POINT_MARKS,
    curve_with_gaps,
    finish_panel,
    marks_along_edge,
    panels,
)

SHOWN_GROUPS = 6
"""An overview shows the directions of so many groups at most."""

SHOWN_RATIOS = (-1.0, 3.0)
"""The range of ratios that is drawn; near a minimum they are rounding over rounding."""

Lines: TypeAlias = Sequence[Mapping[str, Any]]


def training(ax: Axes, curves: Mapping[str, Sequence[float]], quantity: str) -> None:
    """Draw one quantity over the steps of several methods, in the order of `COLORS`."""
    for color, (label, values) in zip(COLORS, curves.items(), strict=False):
        ax.plot(range(len(values)), values, color=color, label=label, linewidth=1.1)
    ax.set(xlabel="step", ylabel=quantity)
    finish_panel(ax, "no step")


def decreases(ax: Axes, predicted: Sequence[float], actual: Sequence[float]) -> None:
    """Draw the actual decrease of every mini-batch's loss against that of its quadratic model.

    There is no point where one of the two is not positive: the axes are logarithmic.
    """
    pairs = torch.tensor([predicted, actual])
    pairs = pairs[:, (pairs > 0).all(0)]
    if pairs.numel():
        ax.scatter(pairs[0], pairs[1], s=9, color=COLORS[0], alpha=0.5, linewidth=0)
        ends = [pairs.min().item(), pairs.max().item()]
        ax.plot(ends, ends, color="black", linewidth=0.8, label="predicted = actual")
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="predicted decrease of the loss",
        ylabel="actual decrease",
    )
    finish_panel(ax, "no decrease")


def history(axes: Sequence[Axes], lines: Lines) -> None:
    """Draw the course of a run on up to six Axes.

    In this order: the loss, with those of its terms and all numbers whose names end in ``loss``;
    the damping; the actual over the predicted decrease; the rank; the share of the squared gradient
    norm inside the kept directions; the lengths of the gradient and of the step.

    ``lines`` are those that `diagnostics.read` returns. A number that is missing or not finite
    leaves a gap. Steps are counted from 1, or are the numbers called ``step`` where every line has
    one.
    """
    steps = _steps(lines)
    drawings = (_draw_loss, _draw_damping, _draw_ratio, _draw_rank, _draw_share, _draw_lengths)
    for ax, draw in zip(axes, drawings, strict=False):
        draw(ax, steps, lines)
        ax.set_xlabel("step")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
        finish_panel(ax, "not in this run")


@public
def overview(lines: Lines, path: str | Path) -> None:
    """Save a figure of a run: its `history`, and the directions of the last step that has any.

    Of the directions it shows `spectrum`, `signal_to_noise` and `budget`; with groups in a row for
    each of the first six.

    Raises
    ------
    ValueError
        If there are no lines.
    """
    if not lines:
        raise BadValue(sentence("a run must have at least one step", "none", "Log some."))
    # The last line with directions, of every group.
    last = max((i for i, line in enumerate(lines) if "directions" in line), default=0)
    groups, step = summaries(lines[last]), _steps(lines)[last].item()
    # Two rows of history, and a row for every group below.
    with panels(2 + min(len(groups), SHOWN_GROUPS), 3) as (figure, axes):
        history(axes[:6], lines)
        for i, directions in enumerate(groups[:SHOWN_GROUPS]):
            a, b, c = axes[6 + 3 * i : 9 + 3 * i]
            spectrum(a, directions)
            signal_to_noise(b, directions)
            budget(c, directions)
            group = f", group {i + 1} of {len(groups)}" if len(groups) > 1 else ""
            a.set_title(f"step {step:.0f}{group}")
        figure.savefig(path)


def _steps(lines: Lines) -> Float[Tensor, " t"]:
    """Return the number of every step."""
    steps = _column(lines, "step")
    counted = torch.arange(1, len(lines) + 1, dtype=steps.dtype)
    return steps if steps.isfinite().all() else counted


def _column(lines: Lines, name: str) -> Float[Tensor, " t"]:
    """Return the numbers of one name in all lines; nan where there is none."""
    values = [line.get(name) for line in lines]
    numbers = [float(x) if isinstance(x, int | float) else torch.nan for x in values]
    return torch.tensor(numbers, dtype=torch.float64)


def _terms(lines: Lines) -> dict[str, Float[Tensor, " t"]]:
    """Return the loss of every term, where there are several."""
    logged = [line.get("losses") for line in lines]
    of_terms = [losses if isinstance(losses, Mapping) else {} for losses in logged]
    names = dict.fromkeys(name for losses in of_terms for name in losses)
    return {name: _column(of_terms, name) for name in names}


def _draw_loss(ax: Axes, steps: Float[Tensor, " t"], lines: Lines) -> None:
    """Draw all numbers whose names end in ``loss``, and mark the steps that were not taken."""
    # The loss of the batches, a value a step.
    values = _column(lines, "loss")
    drawn = [values]
    names = dict.fromkeys(name for line in lines for name in line if name.endswith("loss"))
    names.pop("loss", None)
    other_losses = _terms(lines) | {name: _column(lines, name) for name in names}
    curve_with_gaps(ax, steps, values, label="loss" if other_losses else None)
    # Other losses, such as ``test_loss``, may be there only now and then: joined, without gaps.
    for color, (name, values) in zip(COLORS[1:], other_losses.items(), strict=False):
        logged = values.isfinite()
        points: dict[str, Any] = {} if logged.all() else {"marker": ".", "markersize": 5}
        curve_with_gaps(ax, steps[logged], values[logged], color, label=name, **points)
        drawn.append(values)
    # Steps that were not taken.
    refused = torch.tensor([line.get("accepted") is False for line in lines], dtype=torch.bool)
    marks_along_edge(ax, steps, refused, "no step")
    _choose_scale(ax, torch.cat(drawn))
    ax.set_ylabel("loss")


def _draw_damping(ax: Axes, steps: Float[Tensor, " t"], lines: Lines) -> None:
    """Draw the damping δ; on a logarithmic axis zeros are marks along the edge."""
    values = _column(lines, "damping")
    _choose_scale(ax, values[values > 0])
    if ax.get_yscale() == "log":
        marks_along_edge(ax, steps, values == 0, r"$\delta = 0$")
        values = values.where(values > 0, torch.nan)
    curve_with_gaps(ax, steps, values)
    ax.set_ylabel(r"damping $\delta$  (loss / length$^2$)")


def _draw_ratio(ax: Axes, steps: Float[Tensor, " t"], lines: Lines) -> None:
    """Draw the actual over the predicted decrease; triangles at the edge are values beyond it."""
    values, (low, high) = _column(lines, "ratio"), SHOWN_RATIOS
    if values.isfinite().any():
        ax.axhline(1, **MEAN_LINE)
    curve_with_gaps(
        ax, steps, values.where((values >= low) & (values <= high), torch.nan), **POINT_MARKS
    )
    for beyond, edge, marker in ((values < low, low, "v"), (values > high, high, "^")):
        if beyond.any():
            label = f"{'below' if marker == 'v' else 'above'} {edge:g}: {int(beyond.sum())}"
            edges = torch.full_like(steps[beyond], edge)
            ax.plot(steps[beyond], edges, marker, color=COLORS[1], markersize=4, label=label)
    ax.set_ylabel("actual / predicted decrease")


def _draw_rank(ax: Axes, steps: Float[Tensor, " t"], lines: Lines) -> None:
    """Draw the numerical rank of the Gauss-Newton matrix."""
    curve_with_gaps(ax, steps, _column(lines, "rank"))
    ax.set(ylim=(0, None), ylabel="numerical rank")
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))


def _draw_share(ax: Axes, steps: Float[Tensor, " t"], lines: Lines) -> None:
    """Draw the share of the squared gradient norm that is inside the kept directions."""
    curve_with_gaps(ax, steps, _column(lines, "gradient_share"))
    ax.set(ylim=(-0.03, 1.03), ylabel="share of gradient$^2$ kept")


def _draw_lengths(ax: Axes, steps: Float[Tensor, " t"], lines: Lines) -> None:
    """Draw the lengths of the gradient and of the step."""
    names = {"gradient_norm": "gradient", "step_norm": "step"}
    columns = {label: _column(lines, name) for name, label in names.items()}
    for color, (label, values) in zip(COLORS, columns.items(), strict=False):
        curve_with_gaps(ax, steps, values.where(values > 0, torch.nan), color, label=label)
    _choose_scale(ax, torch.cat([values[values > 0] for values in columns.values()]))
    ax.set_ylabel("norm")


def _choose_scale(ax: Axes, values: Float[Tensor, " _"]) -> None:
    """Make the axis logarithmic if all values are positive, and span a decade or more."""
    values = values[values.isfinite()]
    if values.numel() and 0 < 10 * values.min() <= values.max():
        ax.set_yscale("log")
