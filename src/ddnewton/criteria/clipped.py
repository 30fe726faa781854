"""Losses that are convex here and not there: what is negative of their curvature counts as zero."""

from __future__ import annotations

import torch
from torch import Tensor

from ddnewton.criteria.eigenvectors import hessians_of, in_eigenvectors
from ddnewton.criteria.loss import Expansion, Loss, slopes_of
from ddnewton.criteria.monte_carlo import AnyCriterion, undrawn
from ddnewton.criteria.root import Root, changed_root
from ddnewton.errors import public
from ddnewton.linearize.basis import Basis, PositionBlocks
from ddnewton.records import pickled_as_call
from ddnewton.transforms import any_known
from ddnewton.types import PyTree

ORTHONORMAL = 1e-8
"""How far LᵀL may lie from I for the columns of L to count as eigenvectors."""


@pickled_as_call
@public
def clipped(criterion: AnyCriterion) -> Loss:
    r"""Return a criterion without negative curvature: its value and gradient are the loss's own.

    .. math:: \nabla^2\ell_n = Q \operatorname{diag}(h) Q^\top
              \;\to\; Q \operatorname{diag}(\max(h, 0)) Q^\top

    with eigenvectors Q in the outputs of each sample. Among positive semi-definite matrices this
    one is nearest to the Hessian in the Frobenius norm; where the loss is convex it is the Hessian.
    The gradient along what is left out is kept: all of it is in z.

    Parameters
    ----------
    criterion
        Any twice differentiable loss that a step takes, convex or not, such as the focal loss or
        the likelihood of a mixture.

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
    Source: Higham, "Computing a nearest symmetric positive semidefinite matrix", Linear Algebra and
    its Applications 103, 1988, on the Frobenius norm. An eigenvalue within the rounding error of
    its Hessian counts as zero.

    Examples
    --------
    >>> import torch
    >>> def waves(outputs, y):
    ...     return (1 - torch.cos(outputs - y)).sum()
    >>> angles = torch.tensor([[0.0, torch.pi]], dtype=torch.float64)
    >>> clipped(waves).expand(angles, torch.zeros(1, 2)).h.tolist()
    [[0.0, 1.0]]
    """
    loss = undrawn(criterion, "Pass the loss itself: what is drawn is never negative.")

    def expand(outputs: Tensor, y: PyTree) -> Expansion:
        expansion = loss.expand(outputs, y)
        if any_known(expansion.h < 0) and not _orthonormal(expansion.basis):
            H = hessians_of(expansion)
            expansion = in_eigenvectors(expansion.value, slopes_of(expansion), H)
        return expansion._replace(h=expansion.h.clamp(min=0))

    return loss._replace(expand=expand, root=changed_root(loss.root, _if_never_negative))


def _if_never_negative(root: Root, outputs: Tensor, y: PyTree) -> Root | None:
    """Return a root; None for products with a Hessian of which nothing can be left out."""
    return root if root.times is not None else None


def _orthonormal(basis: Basis) -> bool:
    """Return whether the columns of every L are orthonormal, and as many as its rows."""
    # The columns of a block of a softmax are not.
    if isinstance(basis, PositionBlocks):
        return False
    c, m = basis.shape[1:]
    identity = torch.eye(m, dtype=basis.dtype, device=basis.device)
    return c == m and not any_known((basis.mT @ basis - identity).abs() > ORTHONORMAL)
