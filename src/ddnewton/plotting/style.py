"""The look that all figures share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import torch
from jaxtyping import Bool, Shaped
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
"""Five of Okabe and Ito's colours, which the colour-blind tell apart."""

MEAN_LINE: dict[str, Any] = {"color": "black", "linewidth": 0.8}

POINT_MARKS: dict[str, Any] = {
    "linestyle": "none",
    "marker": ".",
    "markersize": 3,
    "markevery": None,
}
"""Points in place of a line, for values that jump from one to the next."""


@contextmanager
def panels(rows: int, columns: int) -> Iterator[tuple[Figure, list[Axes]]]:
    """Open a figure of lettered panels in a paper's sizes; draw on it and save it inside.

    No window opens, and matplotlib's settings are restored at the end.

    Examples
    --------
    >>> with panels(1, 2) as (figure, (left, right)):
    ...     print(left.get_title(loc="left"), right.get_title(loc="left"))
    a b
    """
    with mpl.rc_context(
        {
            "font.size": 9,
            "axes.labelsize": 9,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": 9,
            "figure.constrained_layout.h_pad": 0.08,
            "figure.constrained_layout.w_pad": 0.08,
            "figure.dpi": 150,
            "legend.fontsize": 8,
            "legend.edgecolor": "none",
            "legend.fancybox": False,
            "legend.framealpha": 0.75,
            "legend.handlelength": 1.4,
            "lines.linewidth": 1.4,
            "savefig.dpi": 200,
            "savefig.facecolor": "white",
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
        }
    ):
        figure = Figure(figsize=(3.1 * columns, 2.6 * rows), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for letter, ax in zip("abcdefghijklmnopqrstuvwxyz", axes, strict=False):
            ax.set_title(letter, loc="left", fontweight="bold", fontsize=11)
        yield figure, axes


def curve_with_gaps(
    ax: Axes, x: Shaped[Tensor, " x"], y: Shaped[Tensor, " x"], color: str = COLORS[0], **look: Any
) -> None:
    """Draw a line with gaps where y is not finite; a value between two gaps is a point."""
    finite = y.isfinite()
    if finite.any():
        padded = torch.nn.functional.pad(finite, (1, 1))
        isolated = finite & ~padded[:-2] & ~padded[2:]
        if isolated.any():
            look = {"marker": ".", "markersize": 4, "markevery": isolated.tolist()} | look
        ax.plot(x, y.where(finite, torch.nan), color=color, **look)


def marks_along_edge(
    ax: Axes, x: Shaped[Tensor, " x"], marked: Bool[Tensor, " x"], label: str
) -> None:
    """Mark places along the lower edge, and say in the legend how many there are."""
    count = int(marked.sum())
    if count:
        ax.plot(
            x[marked],
            torch.full((count,), 0.02),
            "|",
            transform=ax.get_xaxis_transform(),
            color="0.45",
            markersize=5,
            label=f"{label}: {count}",
        )


def finish_panel(ax: Axes, empty: str, **legend: Any) -> None:
    """Add a legend if something has a label, or the text ``empty`` if nothing is drawn."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(**legend)
    if not ax.has_data():
        ax.tick_params(which="both", length=0, labelleft=False, labelbottom=False)
        ax.text(0.5, 0.5, empty, transform=ax.transAxes, ha="center", va="center", color="0.45")
