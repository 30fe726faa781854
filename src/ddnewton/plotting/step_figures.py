"""Figures of one step: eigenvalues, slopes, curvatures and damping, direction by direction."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from ddnewton.diagnostics import Info, summary
from ddnewton.plotting.style import (
    COLORS,
    MEAN_LINE,
    POINT_MARKS,
    curve_with_gaps,
    finish_panel,
    marks_along_edge,
)
from ddnewton.quadratic.info import NewtonInfo

FEW_DIRECTIONS = 50
"""With fewer directions the axis is labelled with 1, 2, 5, 10 in place of powers of ten."""


def spectrum(ax: Axes, info: Info, *, color: str = COLORS[0], label: str | None = None) -> None:
    """Draw the kept eigenvalues λ_k of the Gauss-Newton matrix, the largest first.

    A dotted line marks the numerical rank. Eigenvalues beyond it, which are there only if
    ``select`` asked for them, are rounding, and drawn faint.
    """
    evals, rank = info.evals.detach().double().cpu().sort(descending=True).values, _rank(info)
    _log_line(ax, evals[:rank], color=color, label=label)
    if rank < len(evals):
        _log_line(ax, evals[rank:], start=rank + 1, color=color, alpha=0.35)
        ax.axvline(rank + 0.5, color=color, linestyle=":", linewidth=1.0)
    _label_directions(ax, r"eigenvalue $\lambda_k$  (loss / length$^2$)")


def slopes(ax: Axes, info: NewtonInfo, *, color: str = COLORS[0]) -> None:
    """Draw |γ_nk|, its median and spread over samples, and the slope of their mean, |γ_k|.

    Where the mean lies far below the median, the samples pull in opposite directions.
    """
    _sample_bands(ax, _in_rank(info.gammas.abs(), info), color, r"$|\gamma_{nk}|$")
    mean = _in_rank(info.gammas.mean(0).abs(), info)
    _log_line(ax, mean, label=r"|mean $\gamma_{nk}$| = $|\gamma_k|$", **MEAN_LINE)
    _label_directions(ax, r"slope $|\gamma|$  (loss / length)")


def curvatures(ax: Axes, info: NewtonInfo, *, color: str = COLORS[0]) -> None:
    """Draw λ_nk, its median and spread over samples, and their mean, the eigenvalue λ_k."""
    _sample_bands(ax, _in_rank(info.lambdas, info), color, r"$\lambda_{nk}$")
    mean = _in_rank(info.lambdas.mean(0), info)
    _log_line(ax, mean, label=r"mean $\lambda_{nk}$ = $\lambda_k$", **MEAN_LINE)
    _label_directions(ax, r"curvature $\lambda$  (loss / length$^2$)")


def signal_to_noise(ax: Axes, info: Info) -> None:
    """Draw γ_k² / var γ_nk and λ_k² / var λ_nk: how far samples agree on slope and curvature.

    Below 1/N, the squared mean of N samples is less than its own variance: it may be all noise.
    The measure and its line are those of Dangel, Tatzel, Hennig, *ViViT*, TMLR 2022, arXiv
    2106.02624.
    """
    # Squared means over variances.
    directions = summary(info)
    slope = _in_rank(directions.slope.square() / directions.slope_variance, directions)
    curvature = _in_rank(directions.curvature.square() / directions.curvature_variance, directions)
    blue, red = COLORS[:2]
    _log_line(ax, curvature, color=red, label=r"curvature: $\lambda_k^2\,/\,$var $\lambda_{nk}$")
    _log_line(
        ax, slope, color=blue, label=r"slope: $\gamma_k^2\,/\,$var $\gamma_{nk}$", **POINT_MARKS
    )
    # The line 1/N, or two of them where slopes and curvatures are of different numbers of samples.
    counts = {int(directions.samples): blue, int(directions.curvature_samples): red}
    for count, color in counts.items() if ax.has_data() else ():
        shade = color if len(counts) == 2 else "black"
        ax.axhline(1 / count, color=shade, linestyle=":", label=f"1/N, N = {count}")
    _label_directions(ax, "signal to noise", "no spread of samples", room=0.5)


def budget(ax: Axes, info: Info) -> None:
    """Draw |γ_k|, λ_k, δ_k, and the predicted decrease of the loss, which follows from them.

    The decrease along a direction is c_k (|γ_k| − ½ λ_k c_k), and c_k = |γ_k| / (λ_k + δ_k) is the
    length of the step along it. Directions that the step leaves out, because their damping is
    infinite or their slope zero, are marked along the lower edge.
    """
    # What the step follows from: curvature, damping and slope.
    step = summary(info)
    curvature, damping = _in_rank(step.curvature, step), _in_rank(step.dampings, step)
    _log_line(ax, curvature, label=r"curvature $\lambda_k$", **MEAN_LINE)
    dash = POINT_MARKS | {"marker": "_", "markersize": 4}
    _log_line(ax, damping, color=COLORS[1], label=r"damping $\delta_k$", **dash)
    slope = _in_rank(step.slope.abs(), step)
    _log_line(ax, slope, color=COLORS[0], label=r"slope $|\gamma_k|$", **POINT_MARKS)
    # What it leads to, and the directions without a step.
    gain, length = _in_rank(step.predicted_decrease, step), _in_rank(step.coefficients, step)
    _log_line(ax, gain, color=COLORS[2], label="predicted gain", **POINT_MARKS)
    if ax.has_data():
        k = torch.arange(1, len(damping) + 1)
        marks_along_edge(ax, k, damping.isinf() | (length == 0), "skipped")
    _label_directions(ax, "loss, per length, per length$^2$", room=0.5, ncols=2, columnspacing=1)


def curvature_bias(
    ax: Axes, info: Info, *, color: str = COLORS[0], label: str | None = None
) -> None:
    """Draw how many times larger a curvature looks to the directions' own samples than to others.

    ``info`` is of a step with ``subsampling_curvature``: samples that the directions are not made
    of. The band is one standard error of their mean λ_k to either side. Without such samples, all
    ratios are 1.
    """
    # λ_k over its mean on the held-out samples, and the relative standard error of that.
    directions = summary(info)
    ratio = _in_rank(directions.evals / directions.curvature, directions)
    deviation = (directions.curvature_variance / directions.curvature_samples).sqrt()
    error = _in_rank(deviation / directions.curvature, directions).exp()
    # The band is as high above the ratio as below, on the logarithmic axis.
    k = torch.arange(1, len(ratio) + 1)
    drawn = (ratio > 0) & ratio.isfinite()
    if drawn.any():
        low, high = ((ratio * edge).where(drawn, torch.nan) for edge in (1 / error, error))
        ax.fill_between(k, low, high, color=color, alpha=0.25, linewidth=0, label="standard error")
        ax.axhline(1, **MEAN_LINE)
    _log_line(ax, ratio, color=color, label=label)
    _label_directions(ax, r"eigenvalue / held-out $\lambda_k$")


def _in_rank(values: Float[Tensor, "*n k"], info: Info) -> Float[Tensor, "*n r"]:
    """Return the values of the directions within the numerical rank, the leading one first."""
    order = info.evals.argsort(descending=True)[: _rank(info)]
    return values.detach()[..., order].double().cpu()


def _rank(info: Info) -> int:
    """Return the numerical rank or, where leading eigenvalues alone are known, their number."""
    rank = int(info.rank)
    return len(info.evals) if rank < 0 else rank


def _sample_bands(ax: Axes, values: Float[Tensor, "n k"], color: str, label: str) -> None:
    """Draw the median over samples, and the bands that hold half and 90 % of them."""
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=values.dtype)
    if not (values > 0).any():
        return
    curves = values.quantile(levels, dim=0)
    low, lower, median, upper, high = curves.clamp(min=curves[curves > 0].min())
    k = torch.arange(1, values.shape[1] + 1)
    ax.fill_between(k, low, high, color=color, alpha=0.18, linewidth=0, label="90 % of samples")
    ax.fill_between(k, lower, upper, color=color, alpha=0.35, linewidth=0, label="50 %")
    _log_line(ax, median, color=color, label=f"median {label}")


def _log_line(ax: Axes, values: Float[Tensor, " k"], start: int = 1, **look: Any) -> None:
    """Draw a line of the positive values; a logarithmic axis has no place for the others."""
    k = torch.arange(start, start + len(values))
    curve_with_gaps(ax, k, values.where(values > 0, torch.nan), **look)


def _label_directions(
    ax: Axes, quantity: str, empty: str = "no direction", *, room: float = 0.0, **legend: Any
) -> None:
    """Label logarithmic axes of a quantity by direction, and finish the panel.

    ``room`` is the height that is kept free for the legend, as a multiple of what is drawn.
    """
    ax.set(xscale="log", yscale="log", xlabel="direction $k$", ylabel=quantity)
    low, high = ax.get_xlim()
    ax.set_xlim(max(low, 0.8), auto=None)
    if high < FEW_DIRECTIONS:  # 1, 2, 5, 10 in place of powers of ten
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
    if room:
        low, high = ax.get_ylim()
        ax.set_ylim(low * (low / high) ** room, high)
        legend["loc"] = "lower left"
    finish_panel(ax, empty, **legend)
