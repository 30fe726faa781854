"""Which criteria say how uncertain a fit is: sums of squares, and likelihoods."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ddnewton.criteria.expand import CONVEXITY_RULE, NotConvex
from ddnewton.criteria.monte_carlo import AnyCriterion, kind_of, undrawn
from ddnewton.errors import BadValue, sentence
from ddnewton.transforms import any_known

SQUARES_AGREEMENT = 1e-6
"""Relative tolerance to which a function must be half its gradient's square over its curvature."""

NOISE_RULE = "criterion must be a sum of squares, or a likelihood whose Fisher information is known"
NOISE_REMEDY = (
    "MSELoss, GaussianNLLLoss, CrossEntropyLoss, NLLLoss, BCEWithLogitsLoss, BCELoss, "
    "PoissonNLLLoss and heteroscedastic_nll() are, and functions that are sums of squared "
    "residuals; of others, see how much refits to resampled data differ."
)


def of_likelihood(criterion: AnyCriterion) -> AnyCriterion:
    """Return a criterion with the curvature that the covariance of a fit follows from.

    That is ∇²ℓ of a sum of squares, and the Fisher information of any other likelihood.
    """
    loss = undrawn(criterion, "Pass the loss itself: nothing is drawn here.")
    if loss.squares is not False:
        return criterion
    if loss.fisher is not None:
        return loss._replace(expand=loss.fisher, root=loss.fisher_root)
    if loss.scores is not None:  # its Hessian is what the scores have as their mean square
        return loss
    raise BadValue(sentence(NOISE_RULE, kind_of(criterion), NOISE_REMEDY))


@contextmanager
def about_noise() -> Iterator[None]:
    """Say of a criterion that is not convex what it is to the noise: no other curvature helps."""
    try:
        yield
    except NotConvex as error:
        term, _, _ = str(error).partition(CONVEXITY_RULE)
        got = "one that is not convex"
        error.args = (f"{term}{sentence(NOISE_RULE, got, NOISE_REMEDY)}",)
        raise


def check_squares(
    name: str,
    losses: Float[Tensor, " n"],
    z: Float[Tensor, "m n"],
    h: Float[Tensor, "m n"],
) -> None:
    """Require the losses of a batch to be sums of squares, as only their values can tell.

    A positive quadratic form whose minimum is zero is ½ zᵀ diag(1/h) z at every point.
    """
    curved = is_curved(h)
    squares = torch.where(curved, z.square() / torch.where(curved, h, 1), 0)
    flat = ~curved & (z.abs() > SQUARES_AGREEMENT * z.abs().amax())
    value, expected = losses.mean(), squares.sum(0).mean() / 2
    if any_known(flat) or any_known((value - expected).abs() > SQUARES_AGREEMENT * value.abs()):
        got = f"{name}, a function of another kind"
        raise BadValue(sentence(NOISE_RULE, got, NOISE_REMEDY))


def is_curved(h: Float[Tensor, "m n"]) -> Bool[Tensor, "m n"]:
    """Return a mask of the residuals that count: the others have no weight."""
    return h > torch.finfo(h.dtype).eps * h.amax()
