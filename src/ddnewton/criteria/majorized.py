"""Iteratively reweighted least squares: the curvature of a parabola above a robust loss."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.criteria.elementwise import diagonal
from ddnewton.criteria.loss import Loss, value_and_gradient
from ddnewton.criteria.monte_carlo import AnyCriterion, undrawn
from ddnewton.criteria.residuals import (
    SLOPE_AGREEMENT,
    Residuals,
    check_residuals,
    least_residual,
    residuals_of,
)
from ddnewton.criteria.root import diagonal_root
from ddnewton.errors import public
from ddnewton.linearize.precision import loss_in_float64
from ddnewton.records import pickled_as_call
from ddnewton.types import PyTree

SMALLEST_RESIDUAL = 1e-2
"""Floor of |r| at a kink, relative to the mean of the batch's |r|."""

KINK = 1e-8
"""By how much ψ must jump at a kink, relative to the largest of the batch."""


@pickled_as_call
@public
def majorized(criterion: AnyCriterion) -> Loss:
    r"""Return a criterion whose curvature is that of the parabola above each term.

    A term ρ(r) of a residual r = f − y that is concave in r² lies below the parabola in r through
    it, with its slope ψ = ρ′ and its axis at r = 0. The curvature of that parabola is

    .. math:: h = \frac{\psi(r)}{r}, \qquad h = \psi'(0) \text{ at } r = 0

    while ∇²ℓ would be ψ′(r) ≤ h: zero where a robust loss is straight, negative where it levels
    off. Undamped steps are those of iteratively reweighted least squares; for a model that is
    linear in its parameters they never raise the loss. Value and gradient are the loss's own, and
    so are its weights and what its reduction divides by.

    - In closed form: `torch.nn.HuberLoss`, `torch.nn.SmoothL1Loss` (where ψ is clamped, h is
      δ / |r|, or 1 / |r|) and `torch.nn.MSELoss`, whose h is 2. By torch.func: any function of
      ``outputs`` and ``y`` that is a sum of terms of residuals: Cauchy, Student-t, Geman-McClure,
      log-cosh. y may be a tuple or dict with further parts, such as weights or scales.
    - At a kink ψ(r) / r has no limit. There |r| counts as at least a hundredth of the mean of the
      batch's |r|: `torch.nn.L1Loss`, SmoothL1Loss with β = 0, the pinball loss.
    - A linear part may come on top, as in the pinball loss: it has no curvature. In general
      h = (ψ(r) − ψ(−r)) / 2r.

    Parameters
    ----------
    criterion
        A loss of residuals that a step takes.

    Returns
    -------
    Loss
        The criterion.

    Raises
    ------
    ValueError, TypeError
        Where the criterion is not a loss, or already drawn by `monte_carlo`. On a batch: where it
        is not a sum of terms of residuals, or these are not concave in r².

    Notes
    -----
    Sources: Holland and Welsch, "Robust regression using iteratively reweighted least-squares",
    Communications in Statistics 6, 1977; Huber, "Robust statistics", 1981; as majorization, and
    the pinball loss: Hunter and Lange, "Quantile regression via an MM algorithm", Journal of
    Computational and Graphical Statistics 9, 2000.

    Examples
    --------
    >>> import torch
    >>> f, y = torch.tensor([[0.5, 4.0]]), torch.zeros(1, 2)
    >>> majorized(torch.nn.HuberLoss()).expand(f, y).h.tolist()
    [[1.0, 0.25]]
    >>> def cauchy(outputs, y):
    ...     return torch.log1p((outputs - y) ** 2).sum()
    >>> majorized(cauchy).expand(torch.tensor([[0.0, 1.0]]), y).h.tolist()  # 2 / (1 + r²)
    [[2.0, 1.0]]
    """
    loss = undrawn(criterion, "Pass the loss itself: its residuals say what the curvature is.")

    def of_chords(outputs: Float[Tensor, "n ..."], y: PyTree) -> tuple[Tensor, Tensor, Tensor]:
        value, psi = value_and_gradient(loss, outputs, y)
        h = _chords(residuals_of(loss, outputs, y), outputs)
        return value.double(), psi.double(), h.reshape(psi.shape).double()

    def check(outputs: Float[Tensor, "n ..."], y: PyTree) -> None:
        loss.check(outputs, y)
        loss_in_float64(lambda f: check_residuals(loss, f, y), outputs, outputs)

    return loss._replace(
        expand=lambda outputs, y: diagonal(*of_chords(outputs, y)),
        check=check,
        scores=None,
        fisher=None,
        positions=None,
        root=lambda outputs, y: diagonal_root(*of_chords(outputs, y)),
        fisher_root=None,
        position_scores=None,
        depends_on_batch=True,  # by the mean of |r|, at kinks
    )


def _chords(residuals: Residuals, f: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
    """Return h = (ψ(r) − ψ(−r)) / 2r, the slope of the chord of ψ from −r to r.

    For terms that are concave in r² it lies between ψ′(r) and ψ′(0). It is kept there, as both
    ψ and r may be rounding. It is above ψ′(0) only where there is a kink at 0.
    """
    t = residuals.target
    distance = (f - t).abs()
    tangent, apex = residuals.psi_slope(f), residuals.psi_slope(t)
    size = residuals.psi(t + distance.clamp(min=least_residual(t))).abs().amax()
    # The chord itself, by the width that it has after rounding; where that is 0 it is a tangent.
    rise, width = _chord(residuals, distance)
    chord = torch.where(width == 0, tangent, rise / torch.where(width == 0, 1, width))
    # The same for residuals that are not too small: at a kink it rises by more than a smooth one.
    mean = distance.mean()
    floor = SMALLEST_RESIDUAL * torch.where(mean > 0, mean, 1)
    high_rise, high_width = _chord(residuals, torch.maximum(distance, floor))
    smooth_rise = apex * high_width * (1 + SLOPE_AGREEMENT) + KINK * size
    smooth = high_rise <= smooth_rise  # false for a nan at the kink
    between = torch.minimum(torch.maximum(chord, tangent), apex)
    h = torch.where(smooth, between, high_rise / high_width)
    return h.clamp(min=0)


def _chord(
    residuals: Residuals, distance: Float[Tensor, "n ..."]
) -> tuple[Float[Tensor, "n ..."], Float[Tensor, "n ..."]]:
    """Return ψ(r) − ψ(−r) and 2r, for residuals r of this size."""
    t = residuals.target
    high, low = t + distance, t - distance
    return residuals.psi(high) - residuals.psi(low), high - low
