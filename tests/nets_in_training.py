"""Nets that learn a batch by heart, and their exact steps: what accuracy is measured on.

Each is an MLP 64-32-10 on N = 32 samples with cross-entropy, new or after some updates of Adam.
"""

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.problem import Problem
from tests.models import cast
from tests.reference import Dense, Directions, dense, directions, softmax_derivatives

FLOAT32, FLOAT64 = torch.float32, torch.float64
DELTAS = [1.0, 1e-2, 1e-4, 1e-6, 1e-8]
UPDATES = [("tanh", 0), ("tanh", 100), ("tanh", 1000), ("relu", 0), ("relu", 100), ("relu", 1000)]


def mlp(activation: str, params, X):
    hidden = getattr(torch, activation)(X @ params["W1"] + params["b1"])
    return hidden @ params["W2"] + params["b2"]


@cache
def trained(activation: str, seed: int) -> dict[int, Problem]:
    """MLP 64-32-10, N = 32, cross-entropy; after 0, 100 and 1000 updates of Adam, in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(64, 32), nn.Linear(32, 10)]
        X, y = torch.randn(32, 64), torch.randint(10, (32,))
    names = ["W1", "b1", "W2", "b2"]
    tensors = [p for layer in layers for p in (layer.weight.T, layer.bias)]
    params = {k: p.detach().clone().requires_grad_() for k, p in zip(names, tensors, strict=True)}
    model_fn = partial(mlp, activation)
    adam = torch.optim.Adam(params.values(), lr=1e-2)
    snapshots = {}
    for update in range(1001):
        if update in {0, 100, 1000}:
            frozen = {k: p.detach().clone() for k, p in params.items()}
            snapshots[update] = Problem(model_fn, frozen, X, y, nn.CrossEntropyLoss())
        adam.zero_grad()
        F.cross_entropy(model_fn(params, X), y).backward()
        adam.step()
    return snapshots


def in_float32(seed: int, net) -> Problem:
    activation, updates = net
    return trained(activation, seed)[updates]


def in_float64(seed: int, net) -> Problem:
    problem = in_float32(seed, net)
    return problem._replace(params=cast(problem.params, FLOAT64), X=problem.X.double())


@cache
def truth(seed: int, net) -> Dense:
    return dense(*in_float64(seed, net), derivatives=softmax_derivatives)


def leading(evals):
    return range(len(evals) - 10, len(evals))


@cache
def eigenpairs(seed: int, net, select=None) -> Directions:
    return directions(truth(seed, net), select)


def exact(seed: int, net, delta: float, select=None, complement=None):
    """The terms of the sum, and what they leave of the gradient.

    With all directions this is −(G + δI)⁻¹g, to 1e-10 for δ = 1e-8, where an LU solve has 2e-9
    (found with a solve in extended precision).
    """
    evals, E, _, _ = eigenpairs(seed, net, select)
    g = truth(seed, net).gradient
    inside = E.T @ g
    result = -E @ (inside / (evals + delta))
    return result if complement is None else result - (g - E @ inside) / complement
