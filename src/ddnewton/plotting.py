"""Figures of what a step found, and of training with steps; each function draws on given Axes.

Directions are numbered from the leading one, k = 1. They have unit length, so a slope is a loss
per length in parameter space, and a curvature a loss per length squared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.info import NewtonInfo

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as missing:
    _message = "ddnewton.plotting needs matplotlib: python -m pip install 'ddnewton[plot]'"
    raise ImportError(_message, name=missing.name) from missing

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
"""Five of Okabe and Ito's colours, which the colour-blind tell apart."""

MEAN: dict[str, Any] = {"color": "black", "linewidth": 0.8}


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
            "legend.frameon": False,
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


def spectrum(
    ax: Axes, info: NewtonInfo, *, color: str = COLORS[0], label: str | None = None
) -> None:
    """Draw the kept eigenvalues λ_k of the Gauss-Newton matrix, the largest first.

    A dotted line marks the numerical rank. Eigenvalues beyond it, which are there only if
    ``select`` asked for them, are rounding, and drawn faint.
    """
    evals, rank = info.evals.detach().double().cpu().sort(descending=True).values, int(info.rank)
    _line(ax, evals[:rank], color=color, label=label)
    if rank < len(evals):
        _line(ax, evals[rank:], start=rank + 1, color=color, alpha=0.35)
        ax.axvline(rank + 0.5, color=color, linestyle=":", linewidth=1.0)
    _directions(ax, r"eigenvalue $\lambda_k$  (loss / length$^2$)")


def slopes(ax: Axes, info: NewtonInfo, *, color: str = COLORS[0]) -> None:
    """Draw |γ_nk|, its median and spread over samples, and the slope of their mean, |γ_k|.

    Where the mean lies far below the median, the samples pull in opposite directions.
    """
    _spread(ax, _live(info.gammas.abs(), info), color, r"$|\gamma_{nk}|$")
    mean = _live(info.gammas.mean(0).abs(), info)
    _line(ax, mean, label=r"|mean $\gamma_{nk}$| = $|\gamma_k|$", **MEAN)
    _directions(ax, r"slope $|\gamma|$  (loss / length)")


def curvatures(ax: Axes, info: NewtonInfo, *, color: str = COLORS[0]) -> None:
    """Draw λ_nk, its median and spread over samples, and their mean, the eigenvalue λ_k."""
    _spread(ax, _live(info.lambdas, info), color, r"$\lambda_{nk}$")
    mean = _live(info.lambdas.mean(0), info)
    _line(ax, mean, label=r"mean $\lambda_{nk}$ = $\lambda_k$", **MEAN)
    _directions(ax, r"curvature $\lambda$  (loss / length$^2$)")


def training(ax: Axes, curves: Mapping[str, Sequence[float]], quantity: str) -> None:
    """Draw one quantity over the steps of several methods, in the order of `COLORS`."""
    for color, (label, values) in zip(COLORS, curves.items(), strict=False):
        ax.plot(range(len(values)), values, color=color, label=label, linewidth=1.1)
    ax.set(xlabel="step", ylabel=quantity)
    _legend(ax)


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
    _legend(ax)


def _live(values: Float[Tensor, "*n k"], info: NewtonInfo) -> Float[Tensor, "*n r"]:
    """Return the directions within the numerical rank, the leading one first."""
    order = info.evals.argsort(descending=True)[: int(info.rank)]
    return values.detach()[..., order].double().cpu()


def _spread(ax: Axes, values: Float[Tensor, "n k"], color: str, label: str) -> None:
    """Draw the median over samples, and the bands that hold half and 90 % of them."""
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=values.dtype)
    if not (values > 0).any():
        return
    curves = values.quantile(levels, dim=0)
    low, lower, median, upper, high = curves.clamp(min=curves[curves > 0].min())
    k = torch.arange(1, values.shape[1] + 1)
    ax.fill_between(k, low, high, color=color, alpha=0.18, linewidth=0, label="90 % of samples")
    ax.fill_between(k, lower, upper, color=color, alpha=0.35, linewidth=0, label="50 %")
    _line(ax, median, color=color, label=f"median {label}")


def _line(ax: Axes, values: Float[Tensor, " k"], start: int = 1, **look: Any) -> None:
    """Draw what is positive; a logarithmic axis has no place for the rest."""
    positive = values > 0
    if positive.any():
        k = torch.arange(start, start + len(values))
        ax.plot(k, values.where(positive, torch.nan), **look)


def _directions(ax: Axes, quantity: str) -> None:
    ax.set(xscale="log", yscale="log", xlabel="direction $k$", ylabel=quantity)
    _legend(ax)


def _legend(ax: Axes) -> None:
    if ax.get_legend_handles_labels()[0]:
        ax.legend()
