"""A loss times a positive number: one of several terms, or the inverse of a noise's variance."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import overload

import torch
from torch import Tensor

from ddnewton.criteria.loss import Expansion, Loss, Uniform, sample_gradient, sample_values
from ddnewton.criteria.monte_carlo import AnyCriterion, MonteCarlo
from ddnewton.criteria.root import PositionScores, Root, changed_root, scaled_root, scaled_scores
from ddnewton.criteria.torch_losses import record_of
from ddnewton.errors import BadType, BadValue, public, sentence
from ddnewton.records import pickled_as_call
from ddnewton.scalars import scalar_like
from ddnewton.transforms import any_known, unwrapped
from ddnewton.types import Criterion, PyTree


@overload
def weighted(criterion: MonteCarlo, weight: float | Tensor) -> MonteCarlo: ...
@overload
def weighted(criterion: Criterion | Loss, weight: float | Tensor) -> Loss: ...
@public
def weighted(criterion: AnyCriterion, weight: float | Tensor) -> Loss | MonteCarlo:
    r"""Return a criterion times a positive number.

    .. math:: \ell_n \to w \ell_n, \qquad \nabla\ell_n \to w \nabla\ell_n, \qquad
              \nabla^2\ell_n \to w \nabla^2\ell_n

    What the reduction divides by stays as it is. Directions and rank stay, eigenvalues are w times
    as large: a damping of w δ makes the same step as δ without the weight.

    Parameters
    ----------
    criterion
        Any criterion that a step takes: that of `monte_carlo` too, whose columns are √w times as
        large, and `empirical_fisher`, whose matrix is w times as large. The empirical Fisher matrix
        of a weighted loss is another one, w² times as large.
    weight
        Number w > 0, or a 0-d tensor of one, which `torch.func.vmap` may map over.

    Returns
    -------
    Loss or MonteCarlo
        The criterion; `MonteCarlo` for the criterion of `monte_carlo`.

    Raises
    ------
    ValueError, TypeError
        Where the criterion is not a loss, or the weight no finite number above zero.

    Examples
    --------
    >>> import torch
    >>> expansion = weighted(torch.nn.MSELoss(), 10).expand(torch.ones(1, 1), torch.zeros(1, 1))
    >>> expansion.value.item(), expansion.z.item(), expansion.h.item()
    (10.0, 20.0, 20.0)
    """
    _check_positive(weight)
    if isinstance(criterion, MonteCarlo):
        return criterion._replace(loss=_times(criterion.loss, weight))
    return _times(record_of(criterion), weight)


@pickled_as_call
def _times(loss: Loss, weight: float | Tensor) -> Loss:
    """Return a record of w ℓ: value, z, h and R are w times as large, and L stays."""

    # Each function that the record has, with its result scaled; E[s sᵀ] is, where s is by √w.
    def scaled(part: Tensor) -> Tensor:
        return part * scalar_like(weight, part)

    def of_expansion(expansion: Expansion) -> Expansion:
        value, basis, z, h, R = expansion
        return Expansion(scaled(value), basis, scaled(z), scaled(h), scaled(R))

    def gradient(outputs: Tensor, y: PyTree) -> tuple[Tensor, Tensor]:
        value, r = sample_gradient(loss, outputs, y)
        return scaled(value), scaled(r)

    def weight_at(outputs: Tensor) -> Tensor:
        return scalar_like(weight, outputs, torch.float64)

    def scores(outputs: Tensor, y: PyTree, count: int, uniform: Uniform) -> Tensor:
        assert loss.scores is not None
        return weight_at(outputs).sqrt() * loss.scores(outputs, y, count, uniform)

    def position_scores(outputs: Tensor, y: PyTree, count: int, uniform: Uniform) -> PositionScores:
        assert loss.position_scores is not None
        by_products = loss.position_scores(outputs, y, count, uniform)
        return scaled_scores(by_products, weight_at(outputs).sqrt())

    def weighted_root(root: Root, outputs: Tensor, y: PyTree) -> Root:
        return scaled_root(root, weight_at(outputs))

    def fisher(outputs: Tensor, y: PyTree) -> Expansion:
        assert loss.fisher is not None
        return of_expansion(loss.fisher(outputs, y))

    def joint(outputs: Tensor, y: PyTree) -> Callable[[Tensor], Tensor] | None:
        batch_loss = None if loss.joint is None else loss.joint(outputs, y)
        return None if batch_loss is None else lambda f: scaled(batch_loss(f))

    return loss._replace(
        expand=lambda outputs, y: of_expansion(loss.expand(outputs, y)),
        gradient=gradient,
        value=lambda outputs, y: scaled(sample_values(loss, outputs, y)),
        scores=scores if loss.scores else None,
        fisher=fisher if loss.fisher else None,
        joint=joint if loss.joint else None,
        root=changed_root(loss.root, weighted_root),
        fisher_root=changed_root(loss.fisher_root, weighted_root),
        position_scores=position_scores if loss.position_scores else None,
    )


def _check_positive(weight: object) -> None:
    """Require a finite number above zero, or a 0-d tensor of one."""
    rule, remedy = "weight must be a number > 0", "Leave a term out instead of weighting it by 0."
    if isinstance(weight, Tensor):
        # A tensor of a real dtype, with one entry, and a constant of the loss.
        if weight.ndim > 0:
            advice = "Give each output a weight by the weight= of the loss, or in y."
            raise BadValue(sentence(rule, f"a tensor of shape {list(weight.shape)}", advice))
        if weight.dtype == torch.bool or weight.is_complex():
            raise BadType(sentence(rule, f"a tensor of dtype {weight.dtype}", "Pass a real one."))
        if weight.requires_grad:
            advice = "It counts as a constant: pass weight.detach()."
            raise BadValue(sentence(rule, "one that requires a gradient", advice))
        # "Not > 0" is true of nan as well.
        if any_known(~((weight > 0) & weight.isfinite())):
            raise BadValue(sentence(rule, f"{unwrapped(weight).amin().item():.3g}", remedy))
        return
    if isinstance(weight, bool) or not isinstance(weight, Real):
        raise BadType(sentence(rule, repr(weight), "Pass a float or a 0-d tensor."))
    if not 0 < float(weight) < float("inf"):
        raise BadValue(sentence(rule, weight, remedy))
