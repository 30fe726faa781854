"""ViViT's example, re-created: its numbers, its two user functions, its tolerances."""

from typing import List  # noqa: UP035, as in the example

import torch
from torch import Tensor, allclose, einsum, manual_seed, nn, ones_like, rand, zeros_like
from torch.autograd import grad
from torch.func import functional_call, hessian

from ddnewton import newton_step, newton_step_and_info
from tests.models import cast
from tests.reference import dense, directions, flat

DAMPING = 1.0


def select_top_k(evals: Tensor, k=4) -> List[int]:  # noqa: UP006, as in the example
    return [evals.numel() - k + idx for idx in range(k)]


def constant_damping(evals: Tensor, evecs: Tensor, gammas: Tensor, lambdas: Tensor) -> Tensor:
    return DAMPING * ones_like(evals)


def example():
    """Data, model and loss, drawn in the example's order from seed 0."""
    with torch.random.fork_rng(devices=[]):
        manual_seed(0)
        X, y = rand(4, 7), rand(4, 3)
        model = nn.Sequential(
            nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)
        )
    return model, X, y, nn.MSELoss(reduction="mean")


def autograd_ggn(model, X, y, loss_function) -> Tensor:
    """The dense GGN [88, 88] of the batch in float32, from gradients of outputs."""
    params = list(model.parameters())
    outputs = model(X)
    rows = [
        torch.cat([g.flatten() for g in grad(f, params, retain_graph=True)])
        for f in outputs.flatten()
    ]
    J = torch.stack(rows)
    H = hessian(loss_function)(outputs.detach(), y).reshape(len(J), len(J))
    return J.T @ H @ J


def test_the_example():
    model, X, y, loss_function = example()
    step = newton_step(
        lambda params, X: functional_call(model, params, (X,)),
        dict(model.named_parameters()),
        X,
        y,
        loss_function,
        constant_damping,
        select=select_top_k,
    )
    for name, param in model.named_parameters():
        assert step[name].shape == param.shape

    gradient = torch.cat(
        [g.flatten() for g in grad(loss_function(model(X), y), list(model.parameters()))]
    )
    evals, evecs = torch.linalg.eigh(autograd_ggn(model, X, y, loss_function))
    assert evecs.shape == (88, 88)
    keep = select_top_k(evals)
    evals, evecs = evals[keep], evecs[:, keep]
    newton_step_torch = zeros_like(gradient)
    for k in range(evals.numel()):
        gamma = einsum("i,i", gradient, evecs[:, k])
        newton_step_torch += -gamma / (evals[k] + DAMPING) * evecs[:, k]

    newton_step_flat = torch.cat([s.flatten() for s in step.values()])
    assert allclose(newton_step_flat, newton_step_torch, rtol=1e-5, atol=1e-7)


def test_the_examples_derivatives():
    """Four directions of twelve, and their slopes and curvatures in float64."""
    model, X, y, loss_function = example()
    model.double()
    params = {name: p.detach() for name, p in model.named_parameters()}
    X, y = cast((X, y), torch.float64)

    def model_fn(params, X):
        return functional_call(model, params, (X,))

    _, info = newton_step_and_info(
        model_fn, params, X, y, loss_function, constant_damping, select=select_top_k
    )
    truth = directions(dense(model_fn, params, X, y, loss_function), select_top_k)
    torch.testing.assert_close(info.evals, truth.evals)
    torch.testing.assert_close(info.gammas.abs(), truth.gammas.abs())
    torch.testing.assert_close(info.lambdas, truth.lambdas)
    assert info.dampings.tolist() == [1.0] * 4
    assert flat(info.coefficients).shape == (4,)
