"""The gradient of one criterion with the curvature of another: natural gradients, surrogates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import overload

import torch
from torch import Tensor

from ddnewton.criteria.loss import Expansion, Loss, Uniform, sample_gradient, value_and_gradient
from ddnewton.criteria.monte_carlo import AnyCriterion, MonteCarlo, undrawn
from ddnewton.criteria.root import (
    PositionScores,
    Root,
    changed_root,
    scaled_scores,
    with_gradient,
)
from ddnewton.criteria.torch_losses import record_of
from ddnewton.errors import public
from ddnewton.records import pickled_as_call
from ddnewton.types import Criterion, PyTree


@overload
def with_curvature(criterion: AnyCriterion, metric: MonteCarlo) -> MonteCarlo: ...
@overload
def with_curvature(criterion: AnyCriterion, metric: Criterion | Loss) -> Loss: ...
@public
def with_curvature(criterion: AnyCriterion, metric: AnyCriterion) -> Loss | MonteCarlo:
    r"""Return a criterion with the value and gradient of one, and the curvature of another.

    .. math:: g = \frac{1}{d} \sum_n J_n^\top \nabla\ell_n, \qquad
              G = \frac{1}{d'} \sum_n J_n^\top \nabla^2\ell'_n J_n

    for losses ℓ of the criterion and ℓ′ of the metric, each divided by what its own reduction
    divides by. The criterion need not be convex. Both get the same outputs and the same y; a metric
    that needs a part of y is a function of it, ``lambda outputs, y: cross_entropy(outputs, y[0])``.
    The gradient need not lie in the range of G: ``complement`` says what becomes of the remainder.

    Parameters
    ----------
    criterion
        Loss to be lowered: anything that a step takes but `monte_carlo`, convex or not.
    metric
        Criterion whose curvature is taken: anything that a step takes.

    Returns
    -------
    Loss or MonteCarlo
        The criterion; `MonteCarlo` for a metric of `monte_carlo`.

    Raises
    ------
    ValueError, TypeError
        Where one of them is not a loss, or the criterion is drawn by `monte_carlo`.

    Notes
    -----
    Source: Amari, "Natural gradient works efficiently in learning", Neural Computation 10, 1998,
    where the metric is the negative log-likelihood whose Fisher information measures distance.

    Examples
    --------
    >>> import torch
    >>> criterion = with_curvature(torch.nn.L1Loss(), torch.nn.MSELoss())
    >>> expansion = criterion.expand(torch.tensor([[3.0]]), torch.zeros(1, 1))
    >>> expansion.value.item(), expansion.R.item(), expansion.h.item()
    (3.0, 1.0, 2.0)
    """
    loss = undrawn(criterion, "Pass monte_carlo(…) as the metric: a gradient is not drawn.")
    if isinstance(metric, MonteCarlo):
        return metric._replace(loss=_with_metric(loss, metric.loss))
    return _with_metric(loss, record_of(metric))


@pickled_as_call
def _with_metric(loss: Loss, metric: Loss) -> Loss:
    """Return a record of a loss with the curvature, and the likelihood, of another."""

    def ratio(outputs: Tensor, y: PyTree) -> Tensor:
        # The batch is divided by the loss's own denominator d: d / d′ makes that of the metric d′.
        denominators = (record.denominator(outputs, y) for record in (loss, metric))
        d, d_metric = (
            torch.as_tensor(x, dtype=torch.float64, device=outputs.device) for x in denominators
        )
        return d / d_metric

    def with_slopes(
        expand: Callable[[Tensor, PyTree], Expansion],
    ) -> Callable[[Tensor, PyTree], Expansion]:
        def expansion(outputs: Tensor, y: PyTree) -> Expansion:
            value, r = value_and_gradient(loss, outputs, y)
            _, basis, z, h, _ = expand(outputs, y)
            return Expansion(value, basis, 0 * z, ratio(outputs, y) * h, R=r.to(z)[:, :, None])

        return expansion

    def scores(outputs: Tensor, y: PyTree, count: int, uniform: Uniform) -> Tensor:
        assert metric.scores is not None
        return ratio(outputs, y).sqrt() * metric.scores(outputs, y, count, uniform)

    def position_scores(outputs: Tensor, y: PyTree, count: int, uniform: Uniform) -> PositionScores:
        assert metric.position_scores is not None
        by_products = metric.position_scores(outputs, y, count, uniform)
        return scaled_scores(by_products, ratio(outputs, y).sqrt())

    def root_with_slopes(root: Root, outputs: Tensor, y: PyTree) -> Root:
        value, r = value_and_gradient(loss, outputs, y)
        return with_gradient(root, value.double(), r.double(), ratio(outputs, y))

    def check(outputs: Tensor, y: PyTree) -> None:
        loss.check(outputs, y)
        metric.check(outputs, y)

    return Loss(
        expand=with_slopes(metric.expand),
        denominator=loss.denominator,
        check=check,
        scores=scores if metric.scores else None,
        gradient=partial(sample_gradient, loss),
        fisher=with_slopes(metric.fisher) if metric.fisher else None,
        joint=loss.joint,
        positions=metric.positions,
        root=changed_root(metric.root, root_with_slopes),
        fisher_root=changed_root(metric.fisher_root, root_with_slopes),
        position_scores=position_scores if metric.position_scores else None,
        curvature_ratio=ratio,
        depends_on_batch=metric.depends_on_batch or metric.joint is not None,
    )
