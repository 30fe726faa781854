"""Steps from singular values, where samples have next to no curvature and all of the slope."""

import pytest
import torch
from torch import nn

from ddnewton import as_function, directional_newton, fit, trust_region


def saturated():
    """Return a softmax regression with inputs so large that most labels have a probability of 0."""
    torch.manual_seed(0)
    model_fn, params = as_function(nn.Linear(4, 3).double())
    X = 100 * torch.randn(64, 4).double()
    return model_fn, params, X, X[:, :3].argmax(1)


@pytest.mark.parametrize("share", [1e-1, 1e-3, 1e-5])
def test_a_saturated_softmax_has_the_step_of_a_dense_solve(share):
    model_fn, params, X, y = saturated()
    optimizer = directional_newton(
        model_fn, nn.CrossEntropyLoss(), damping=trust_region(start=share), scale=None
    )
    moved, _, info = optimizer.update(params, optimizer.init(params), X, y)
    assert info.attempts == 1
    # G and g of the weights [3, 4] and biases [3], written out.
    inputs = torch.cat([X, torch.ones(64, 1).double()], 1)
    p = (X @ params["weight"].T + params["bias"]).softmax(1)
    hessians = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    G = torch.einsum("nij,na,nb->iajb", hessians, inputs, inputs).reshape(15, 15) / 64
    residual = p - nn.functional.one_hot(y, 3)
    g = torch.einsum("ni,na->ia", residual, inputs).reshape(15) / 64
    step = -torch.linalg.solve(G + info.damping * torch.eye(15).double(), g).reshape(3, 5)
    assert (moved["weight"] - params["weight"] - step[:, :4]).norm() <= 1e-6 * step.norm()
    assert (moved["bias"] - params["bias"] - step[:, 4]).norm() <= 1e-6 * step.norm()


def test_a_fit_leaves_where_all_softmaxes_are_saturated():
    result = fit(*saturated(), nn.CrossEntropyLoss(), max_updates=40)
    assert result.loss < 1e-6
