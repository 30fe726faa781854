"""Softmax cross-entropy, its gradient and Hessian factored without cancellation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from ddnewton.criteria.elementwise import separable
from ddnewton.criteria.loss import (
    SMALLEST_CURVATURE,
    Expansion,
    Loss,
    Reduction,
    Uniform,
    check_reduction,
    spanned,
)
from ddnewton.criteria.option_checks import (
    check_denominator,
    check_number,
    check_weight,
    check_weight_shape,
)
from ddnewton.criteria.root import PositionScores
from ddnewton.criteria.softmax_products import (
    leave_one_out_sums,
    outputs_of,
    score_columns,
    softmax_root,
    softmax_scores,
)
from ddnewton.criteria.target_checks import check_classes
from ddnewton.linearize.basis import PositionBlocks, of_positions, written_out
from ddnewton.records import pickled_as_call
from ddnewton.types import PyTree


@pickled_as_call
def cross_entropy(
    reduction: Reduction = "mean",
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Loss:
    r"""Return softmax cross-entropy, as in `torch.nn.CrossEntropyLoss`.

    The outputs are [N, C], or [N, C, …] with further positions (tokens, pixels), and y holds class
    indices [N, …] or probabilities of the outputs' shape. With class weights w and smoothing ε,

        ℓ = −Σ_c t_c log p_c,    t_c = w_c ((1 − ε) y_c + ε / C),    t = 0 where y is ignored,

    summed over positions. The mean divides by Σ w_y over what is not ignored, or, for
    probabilities, by the number of positions.

    The Hessian (Σt) (diag(p) − ppᵀ) has rank C − 1, and its LDLᵀ decomposition is known in closed
    form: with the classes in ascending order of probability and the tail sums q_j = Σ_{i≥j} p_i,

        h_j = (Σt) p_j q_{j+1} / q_j,   L_jj = 1,   L_ij = −p_i / q_{j+1}  (i > j),   j = 1 … C−1.

    The gradient p Σt − t = L z is known as well, with the tail sums T_j = Σ_{i≥j} t_i,

        z_j = (p_j T_{j+1} − t_j q_{j+1}) / q_j.

    No formula subtracts numbers that nearly cancel, so h and z keep all their digits on saturated
    nets, where p_y − 1 and p_y (1 − p_y) lose them. Each position has C − 1 columns of L, with
    zeros at the outputs of all other positions, which are not stored.

    Examples
    --------
    >>> import torch
    >>> expansion = cross_entropy().expand(torch.tensor([[0.0, 40.0]]), torch.tensor([1]))
    >>> f"{expansion.z.item():.6e} {expansion.h.item():.6e}"
    '4.248354e-18 4.248354e-18'
    """
    check_reduction(reduction)
    check_weight("weight", weight)
    rule = "label_smoothing must be a number in 0 to 1"
    check_number(rule, label_smoothing, lambda x: 0 <= x <= 1, usual=0.0)

    def targets(f: Float[Tensor, "n ..."], y: Num[Tensor, "n ..."]) -> Float[Tensor, "n t c"]:
        # t_c = w_c ((1 − ε) y_c + ε / C), and 0 at ignored positions.
        labels, counted = class_labels(f, y, ignore_index)
        smooth = (1 - label_smoothing) * labels + label_smoothing / f.shape[1]
        return torch.where(counted, class_weighted(smooth, weight), 0)

    def expand(f: Float[Tensor, "n ..."], y: Num[Tensor, "n ..."]) -> Expansion:
        n, c = f.shape[:2]
        # With one class the loss is constant, and C − 1 = 0 columns would be an empty matrix: one
        # column an output, with z = h = 0, keeps all shapes in order.
        if c == 1:
            return separable(*(0 * f.double()).reshape(n, -1).expand(3, n, -1))
        # Every position is a softmax of its own, as if it were a sample.
        logits, t = classes_last(f), targets(f, y)
        parts = _position_expansions(logits.reshape(-1, c), t.reshape(-1, c))
        value, basis, z, h = (x.reshape(*t.shape[:2], *x.shape[1:]) for x in parts)
        # The sample's loss is the sum over its positions, and L is block-diagonal in them.
        return spanned(value.sum(1), of_positions(basis), z.flatten(1), h.flatten(1))

    def gradient(
        f: Float[Tensor, "n ..."], y: Num[Tensor, "n ..."]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n c"]]:
        log_p, t = classes_last(f).log_softmax(2), targets(f, y)
        # p_c Σt − t_c = p_c Σ_{i≠c} t_i − t_c Σ_{i≠c} p_i, as Σp = 1: p_c t_c, which would cancel
        # on a net that is certain, is left out of both products.
        gradients = log_p.exp() * leave_one_out_sums(t) - t * leave_one_out_sums(log_p.exp())
        return -(t * log_p).sum((1, 2)), outputs_of(gradients)

    def position_scores(
        f: Float[Tensor, "n ..."], y: Num[Tensor, "n ..."], count: int, uniform: Uniform
    ) -> PositionScores:
        # E[(p − e)(p − e)ᵀ] = diag(p) − ppᵀ over drawn classes, which the Hessian has Σt times.
        return softmax_scores(classes_last(f), targets(f, y).sum(2), count, uniform)

    def denominator(outputs: Float[Tensor, "n ..."], y: PyTree) -> float | Tensor:
        if reduction == "sum":
            return 1.0
        # For probabilities the number of positions, whatever the weights, as in torch.
        if y.is_floating_point():
            return outputs.numel() / outputs.shape[1]
        labels, counted = class_labels(outputs, y, ignore_index)
        return torch.where(counted, class_weighted(labels, weight), 0).sum()

    def check(outputs: Tensor, y: PyTree) -> None:
        check_classes(outputs, y, ignore_index)
        check_weight_shape(weight, outputs.shape[1:2], "one entry a class")
        check_denominator(denominator(outputs, y))

    return Loss(
        expand,
        denominator,
        check,
        scores=lambda *drawn: written_out(
            PositionBlocks(score_columns(*position_scores(*drawn).parts))
        ),
        gradient=gradient,
        positions=lambda outputs: 1 if outputs.shape[1] == 1 else outputs.shape[2:].numel(),
        root=lambda f, y: softmax_root(*gradient(f, y), classes_last(f), targets(f, y).sum(2)),
        position_scores=position_scores,
        value=lambda f, y: -(targets(f, y) * classes_last(f).log_softmax(2)).sum((1, 2)),
    )


def classes_last(f: Float[Tensor, "n ..."]) -> Float[Tensor, "n t c"]:
    """Return [N, C, …] as [N, T, C] in float64: all positions on one axis, the classes last."""
    return f.double().reshape(*f.shape[:2], -1).mT


def class_labels(
    f: Float[Tensor, "n ..."], y: Num[Tensor, "n ..."], ignore_index: int
) -> tuple[Float[Tensor, "n t c"], Bool[Tensor, "n t 1"]]:
    """Return the probabilities that y gives the classes, and a mask of positions not ignored."""
    if y.is_floating_point():
        labels = classes_last(y)
        return labels, torch.ones_like(labels[..., :1], dtype=torch.bool)
    y = y.reshape(y.shape[0], -1, 1)
    return (y == torch.arange(f.shape[1], device=y.device)).double(), y != ignore_index


def class_weighted(x: Float[Tensor, "n t c"], weight: Tensor | None) -> Float[Tensor, "n t c"]:
    """Multiply every class by its weight, if there are weights."""
    return x if weight is None else x * weight.to(x)


def _position_expansions(
    f: Float[Tensor, "n c"], t: Float[Tensor, "n c"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n c m"], Float[Tensor, "n m"], Float[Tensor, "n m"]]:
    """Return the loss of every position, a row each, and its L, z and h."""
    c = f.shape[1]
    # The classes in ascending order of probability, and their tail sums, q in logarithms and T.
    log_p, order = f.log_softmax(1), f.argsort(1)
    log_p_up, t_up = log_p.gather(1, order), t.gather(1, order)
    log_q, t_tail = _tail_sums(log_p_up, torch.logcumsumexp), _tail_sums(t_up, torch.cumsum)
    # p_j / q_j and q_{j+1} / q_j as differences of logarithms: p and q may underflow where their
    # quotients do not.
    log_p_over_q, log_q_ratio = (log_p_up - log_q)[:, :-1], log_q[:, 1:] - log_q[:, :-1]
    h = t_tail[:, :1] * (log_p_up[:, :-1] + log_q_ratio).exp().clamp(min=SMALLEST_CURVATURE)
    z = log_p_over_q.exp() * t_tail[:, 1:] - t_up[:, :-1] * log_q_ratio.exp()
    # L is unit lower triangular, with entries −p_i / q_{j+1} below the diagonal: at most 1 in
    # size, as p_i is one of the terms of q_{j+1}. Its rows go back to the order of the classes.
    lower = (log_p_up[:, :, None] - log_q[:, None, 1:]).exp().tril(-1)
    unit = torch.eye(c, c - 1, dtype=f.dtype, device=f.device) - lower
    basis = unit.gather(1, order.argsort(1)[:, :, None].expand(unit.shape))
    return -(t * log_p).sum(1), basis, z, h


def _tail_sums(
    x: Float[Tensor, "n c"], cumulate: Callable[[Tensor, int], Tensor]
) -> Float[Tensor, "n c"]:
    """Return the tail sums Σ_{i≥j} x_i, by a function that cumulates from the front."""
    return cumulate(x.flip(1), 1).flip(1)
