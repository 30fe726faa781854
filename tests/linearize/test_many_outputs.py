"""Samples of many more outputs than there are parameters: one tangent a parameter."""

import pytest
import torch
from torch.func import jacrev

from ddnewton import ggn_eigvalsh, newton_step, prepare
from ddnewton.linearize import jacobians, sample_columns

GENERATOR = torch.Generator().manual_seed(0)
START = {
    "height": torch.rand(3, generator=GENERATOR, dtype=torch.float64) + 1,
    "place": torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64),
}
POINTS = torch.linspace(-5, 5, 400, dtype=torch.float64)


def curve(params, X):
    distances = X[..., None] - params["place"]
    return (params["height"] * torch.exp(-(distances**2))).sum(-1)


def dense_step(X, y, criterion, delta):
    """From the Jacobian of all outputs along all parameters, in float64."""
    leaves = torch.cat(list(START.values()))

    def outputs(vector):
        return curve({"height": vector[:3], "place": vector[3:]}, X).flatten()

    J, r = jacrev(outputs)(leaves), outputs(leaves) - y.flatten()
    scale = 2 / r.numel() if criterion.reduction == "mean" else 2
    G = scale * J.T @ J
    return torch.linalg.solve(G + delta * torch.eye(6, dtype=torch.float64), -scale * J.T @ r)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_step_is_the_dense_one_and_goes_along_the_parameters(n, reduction, prepared, monkeypatch):
    ways = []
    way_by_tangents = sample_columns._by_tangents
    monkeypatch.setattr(
        sample_columns,
        "_by_tangents",
        lambda *args: ways.append(args) or way_by_tangents(*args),
    )
    X = POINTS + torch.arange(n, dtype=torch.float64)[:, None] / 10
    y = torch.sin(X)
    criterion = torch.nn.MSELoss(reduction=reduction)
    model_fn = prepare(curve, START, X) if prepared else curve
    step = newton_step(model_fn, START, X, y, criterion, 1e-3)
    truth = dense_step(X, y, criterion, 1e-3)
    torch.testing.assert_close(torch.cat(list(step.values())), truth, rtol=1e-10, atol=0)
    assert ways


def test_one_sample_of_many_outputs_is_many_samples_of_one():
    y = torch.sin(POINTS)
    as_one = newton_step(curve, START, POINTS[None], y[None], torch.nn.MSELoss(), 1e-3)
    as_many = newton_step(curve, START, POINTS, y, torch.nn.MSELoss(), 1e-3)
    torch.testing.assert_close(as_one, as_many, rtol=1e-11, atol=0)


def test_what_forward_mode_does_not_know_goes_backwards():
    class Backwards(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x.exp()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(output)

        @staticmethod
        def backward(ctx, gradient):
            return gradient * ctx.saved_tensors[0]

    def model_fn(params, X):
        distances = X[..., None] - params["place"]
        return (params["height"] * Backwards.apply(-(distances**2))).sum(-1)

    X, y = POINTS[None], torch.sin(POINTS)[None]
    step = newton_step(model_fn, START, X, y, torch.nn.MSELoss(), 1e-3)
    truth = dense_step(X, y, torch.nn.MSELoss(), 1e-3)
    torch.testing.assert_close(torch.cat(list(step.values())), truth, rtol=1e-10, atol=0)


def test_the_spectrum_is_the_same_both_ways(monkeypatch):
    problem = (curve, START, POINTS[None], torch.sin(POINTS)[None], torch.nn.MSELoss())
    along_parameters = ggn_eigvalsh(*problem)
    monkeypatch.setattr(sample_columns, "MANY_COTANGENTS", float("inf"))
    assert next(jacobians.ways(1, 400, 6))[0] is not sample_columns._by_tangents
    torch.testing.assert_close(along_parameters, ggn_eigvalsh(*problem), rtol=1e-10, atol=1e-14)
