"""The empirical Fisher matrix: curvature from outer products of the samples' gradients."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.criteria.loss import Expansion, Loss, spanned, value_and_gradient
from ddnewton.criteria.monte_carlo import AnyCriterion, undrawn
from ddnewton.criteria.root import Root, column_root
from ddnewton.errors import public
from ddnewton.records import pickled_as_call
from ddnewton.types import PyTree


@pickled_as_call
@public
def empirical_fisher(criterion: AnyCriterion) -> Loss:
    r"""Return a criterion whose curvature is the empirical Fisher matrix; its gradient is exact.

    .. math:: G = \frac{1}{d} \sum_n J_n^\top r_n r_n^\top J_n, \qquad r_n = \nabla_f \ell_n

    with d what the reduction divides by. For "mean" it is N for cross-entropy of plain classes, the
    sum of the weights where there are any, and N C where torch averages over outputs as well; for
    "sum" it is 1. Every sample has one column, whatever the loss. G is not an estimate of the
    Hessian: it shrinks where the model fits, and grows where it does not.

    Parameters
    ----------
    criterion
        Any loss that a step takes.

    Returns
    -------
    Loss
        The criterion.

    Raises
    ------
    ValueError, TypeError
        Where the criterion is not a loss, or already drawn by `monte_carlo`.

    Notes
    -----
    Source: Kunstner, Hennig, Balles, "Limitations of the empirical Fisher approximation for natural
    gradient descent", NeurIPS 2019, arXiv 1905.12558.

    Examples
    --------
    >>> import torch
    >>> fisher = empirical_fisher(torch.nn.MSELoss())
    >>> expansion = fisher.expand(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2))
    >>> expansion.basis.tolist(), expansion.z.tolist(), expansion.h.tolist()
    ([[[2.0], [6.0]]], [[1.0]], [[1.0]])
    """
    loss = undrawn(criterion, "Pass the loss itself: nothing is drawn here.")

    def expand(outputs: Float[Tensor, "n ..."], y: PyTree) -> Expansion:
        # L = r with z = h = 1: the gradient is L z = r, the curvature L h Lᵀ = r rᵀ.
        value, r = value_and_gradient(loss, outputs, y)
        ones = torch.ones_like(r[:, :1])
        return spanned(value, r[:, :, None], ones, ones)

    def root(outputs: Float[Tensor, "n ..."], y: PyTree) -> Root:
        return column_root(*value_and_gradient(loss, outputs, y))

    return loss._replace(
        expand=expand,
        scores=None,
        fisher=None,
        columns=lambda outputs: 1,
        positions=None,
        squares=False,
        root=root,
        fisher_root=None,
        position_scores=None,
    )
