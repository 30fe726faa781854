"""Criteria that have no second derivatives, or none that are numbers, are refused by name."""

import pytest
import torch
from torch import nn

from ddnewton import empirical_fisher
from ddnewton.criteria import as_loss, expand_batch

N, C = 6, 3


def numbers():
    """Numbers of both signs in no order, the same in every test."""
    return torch.randn(N, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_nan_is_no_interaction():
    f, y = numbers(), numbers()
    y[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the loss must be finite; got nan or inf"):
        expand_batch(as_loss(lambda f, y: (f - y).square().nanmean()), f, f, y)


def test_a_norm_at_zero_is_refused_by_the_library():
    f = torch.zeros(N, C, dtype=torch.float64)
    with pytest.raises(ValueError, match="the loss must be finite; got nan or inf"):
        expand_batch(as_loss(lambda f, y: (f - y).norm(dim=1).mean()), f, f, f)


class Squares(torch.autograd.Function):
    """Squares in the form that torch.func refuses."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, cotangent):
        return 2 * cotangent * ctx.saved_tensors[0]


@pytest.mark.parametrize(
    ("criterion", "reason"),
    [
        (nn.MultiMarginLoss(), "multi_margin_loss_backward is not implemented"),
        (lambda f, y: Squares.apply(f).mean(), "must override the setup_context"),
    ],
)
def test_what_is_not_differentiated_twice_is_refused_with_the_ways_out(criterion, reason):
    f = numbers()
    match = f"differentiates twice; got .*{reason}.*empirical_fisher.*with_curvature"
    with pytest.raises(ValueError, match=match):
        expand_batch(as_loss(criterion), f, f, torch.arange(N) % C)


def test_the_gradient_alone_does_for_the_empirical_fisher():
    f = numbers()
    expansion = expand_batch(
        as_loss(empirical_fisher(nn.MultiMarginLoss())), f, f, torch.arange(N) % C
    )
    assert expansion.h.shape == (N, 1)
