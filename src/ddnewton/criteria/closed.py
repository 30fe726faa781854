"""The losses whose expansion is known in closed form."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor

from ddnewton.criteria.record import Expansion, Loss, Reduction, per_element, per_sample, spanned
from ddnewton.criteria.targets import check_classes, check_probabilities, check_real

SMALLEST = 1e-200
"""Floor of a sigmoid's or softmax's curvature: it is positive, however confident the net."""


def mse(reduction: Reduction = "mean") -> Loss:
    """Return the squared error ℓ = Σ_c (f_c − y_c)², as in `torch.nn.MSELoss`.

    Examples
    --------
    >>> import torch
    >>> expansion = mse().expand(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]]))
    >>> expansion.value.item(), expansion.slopes.tolist(), expansion.curvatures.tolist()
    (5.0, [[2.0, 4.0]], [[2.0, 2.0]])
    """

    def expand(f: Float[Tensor, "n ..."], y: Float[Tensor, "n ..."]) -> Expansion:
        residual = (f.double() - y.double()).reshape(f.shape[0], -1)
        return _separable(residual.square(), 2 * residual, torch.full_like(residual, 2))

    return Loss(expand, per_element(reduction), check_real)


def bce_with_logits(reduction: Reduction = "mean") -> Loss:
    """Return binary cross-entropy of logits, as in `torch.nn.BCEWithLogitsLoss`; y in [0, 1].

    Examples
    --------
    >>> import torch
    >>> expansion = bce_with_logits().expand(torch.zeros(1, 1), torch.ones(1, 1))
    >>> expansion.slopes.item(), expansion.curvatures.item()
    (-0.5, 0.25)
    """

    def expand(f: Float[Tensor, "n ..."], y: Float[Tensor, "n ..."]) -> Expansion:
        f, y = (x.double().reshape(x.shape[0], -1) for x in (f, y))
        on, off = f.sigmoid(), (-f).sigmoid()
        value = -(1 - y) * F.logsigmoid(-f) - y * F.logsigmoid(f)
        # σ(f) − y without cancellation: for y = 0 and y = 1 one of the terms is exactly zero.
        return _separable(value, (1 - y) * on - y * off, (on * off).clamp(min=SMALLEST))

    return Loss(expand, per_element(reduction), check_probabilities)


def cross_entropy(reduction: Reduction = "mean") -> Loss:
    r"""Return softmax cross-entropy, as in `torch.nn.CrossEntropyLoss`.

    y holds class indices [N] or probabilities [N, C].

    The Hessian diag(p) − ppᵀ has rank C − 1, and its LDLᵀ decomposition is known in closed form:
    with the classes in ascending order of probability and the tail sums q_j = Σ_{i≥j} p_i,

        h_j = p_j q_{j+1} / q_j,    L_jj = 1,    L_ij = −p_i / q_{j+1}  (i > j),    j = 1 … C−1.

    The gradient p Σy − y = L z is known as well, with the tail sums Y_j = Σ_{i≥j} y_i,

        z_j = (p_j Y_{j+1} − y_j q_{j+1}) / q_j.

    No formula subtracts numbers that nearly cancel, so h and z keep all their digits on saturated
    nets, where p_y − 1 and p_y (1 − p_y) lose them.

    Examples
    --------
    >>> import torch
    >>> expansion = cross_entropy().expand(torch.tensor([[0.0, 40.0]]), torch.tensor([1]))
    >>> f"{expansion.slopes.item():.6e} {expansion.curvatures.item():.6e}"
    '4.248354e-18 4.248354e-18'
    """

    def expand(f: Float[Tensor, "n c"], y: Num[Tensor, "n ..."]) -> Expansion:
        f = f.double()
        n, c = f.shape
        if c == 1:  # the loss is constant: one flat, level column keeps all shapes in order
            return _separable(*f.new_zeros(3, n, 1))
        targets = y.double() if y.is_floating_point() else F.one_hot(y, c).double()
        log_p, order = f.log_softmax(1), f.argsort(1)
        log_p_up, y_up = log_p.gather(1, order), targets.gather(1, order)
        log_q, y_tail = _tail(log_p_up, torch.logcumsumexp), _tail(y_up, torch.cumsum)
        # Quotients are differences of logarithms: p and q may underflow, their quotients need not.
        share, rest = (log_p_up - log_q)[:, :-1], log_q[:, 1:] - log_q[:, :-1]
        curvatures = y_tail[:, :1] * (log_p_up[:, :-1] + rest).exp().clamp(min=SMALLEST)
        slopes = share.exp() * y_tail[:, 1:] - y_up[:, :-1] * rest.exp()
        below = (log_p_up[:, :, None] - log_q[:, None, 1:]).exp().tril(-1)
        unit = torch.eye(c, c - 1, dtype=f.dtype, device=f.device) - below
        basis = unit.gather(1, order.argsort(1)[:, :, None].expand(unit.shape))
        return spanned(-(targets * log_p).sum(1), basis, slopes, curvatures)

    return Loss(expand, per_sample(reduction), check_classes)


def _separable(
    values: Float[Tensor, "n c"], slopes: Float[Tensor, "n c"], curvatures: Float[Tensor, "n c"]
) -> Expansion:
    """Return the expansion of a loss whose outputs do not interact: L = I."""
    n, c = slopes.shape
    identity = torch.eye(c, dtype=slopes.dtype, device=slopes.device)
    return spanned(values.sum(1), identity.expand(n, c, c), slopes, curvatures)


def _tail(
    x: Float[Tensor, "n c"], cumulate: Callable[[Tensor, int], Tensor]
) -> Float[Tensor, "n c"]:
    """Cumulate from the end: entry j holds Σ_{i≥j}."""
    return cumulate(x.flip(1), 1).flip(1)
