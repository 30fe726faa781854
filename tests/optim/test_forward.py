"""Batches of any size, dtype and structure, and modules that tie weights or cannot be traced."""

import copy
import logging

import pytest
import torch
from torch import nn

from ddnewton import Group, directional_newton
from ddnewton.optim import DirectionalNewton
from tests.methods import FLOAT64
from tests.models import LastState, cast
from tests.optim.twins import CROSS_ENTROPY, Twin, batch, parameters
from tests.reference import error

pytestmark = pytest.mark.usefixtures("layers_found_once")


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, tokens):
        return self.head(torch.tanh(self.embedding(tokens)).mean(1))


def test_batches_may_change_their_size_and_length():
    module = Pooled()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, 0.1)
    for t, (count, length) in enumerate([(5, 3), (9, 3), (1, 3), (4, 6), (4, 1), (5, 3)]):
        torch.manual_seed(t)
        tokens, y = torch.randint(0, 9, (count, length)), torch.randint(0, 3, (count,))
        twin = Twin(module, damping=0.1)
        info = twin.step(tokens, y)
        assert error(optimizer.step(tokens, y), info.loss) < 1e-12
        assert error(parameters(module), twin.params) < 1e-9


def test_batches_may_change_their_dtype():
    module = Pooled()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY)
    tokens, y = torch.randint(0, 9, (6, 4)), torch.arange(6) % 3
    first = optimizer.step(tokens, y)
    assert optimizer.step(tokens.int(), y) < first


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(3, 3), nn.Linear(2, 3, bias=False)
        self.double()

    def forward(self, a, b, *, scale=1.0):
        return torch.tanh(self.left(a)) * self.right(b) * scale


WAYS = {
    "dict": (lambda m, X: m(**X), {"a": torch.ones(6, 3), "b": torch.ones(6, 2)}),
    "tuple": (lambda m, X: m(*X), (torch.ones(6, 3), torch.ones(6, 2))),
    "list": (lambda m, X: m(X[1], X[0]), [torch.ones(6, 2), torch.ones(6, 3)]),
    "scaled": (lambda m, X: m(X[..., :3], X[..., 3:], scale=2.0), torch.ones(6, 5)),
    "a part": (lambda m, X: m.left(X), torch.ones(6, 3)),
}


@pytest.mark.parametrize("way", WAYS)
def test_forward_says_how_a_module_is_called(way):
    forward, X = WAYS[way]
    X = cast(torch.utils._pytree.tree_map(lambda x: x * torch.randn_like(x), X), FLOAT64)
    y = torch.arange(6) % 3
    module = Two()
    fresh = copy.deepcopy(module)
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, 0.3, forward=forward)

    def model_fn(params, X):
        with torch.nn.utils.stateless._reparametrize_module(fresh, params):
            return forward(fresh, X)

    params = parameters(module)
    twin = directional_newton(model_fn, CROSS_ENTROPY, 0.3, gram="dense")
    params, _, info = twin.update(params, twin.init(params), X, y)
    assert error(optimizer.step(X, y), info.loss) < 1e-12
    assert error(parameters(module), params) < 1e-9
    if way == "a part":
        assert torch.equal(module.right.weight, fresh.right.weight)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
        self.last.weight = self.first.weight
        self.double()

    def forward(self, X):
        return self.last(torch.tanh(self.first(X)))


@pytest.mark.parametrize("split_up", [False, True])
def test_tied_weights_move_once_and_stay_tied(split_up):
    module = Tied()
    groups = None
    if split_up:
        groups = [
            {"params": [module.last.weight]},
            {"params": [module.first.bias, module.last.bias]},
        ]
    named = [Group("first.weight"), Group(["first.bias", "last.bias"])]
    twin = Twin(module, damping=0.1, groups=named if split_up else None)
    assert len(twin.params) == 3
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, 0.1, params=groups)
    for t in range(3):
        twin.step(*batch(seed=t))
        optimizer.step(*batch(seed=t))
    assert module.last.weight is module.first.weight
    assert error(parameters(module), twin.params) < 1e-9


class Branching(nn.Module):
    """What it computes depends on its numbers, so that no trace holds."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 30)
        self.head = nn.Linear(30, 3)
        self.double()

    def forward(self, X):
        rows = [
            torch.tanh(self.layer(x)) if float(x.detach().sum()) > 0 else -self.layer(x) for x in X
        ]
        return self.head(torch.stack(rows))


@pytest.mark.parametrize("build", [Branching, LastState])
def test_a_module_that_cannot_be_traced(build, caplog):
    torch.manual_seed(0)
    module = build().double()
    X, y = batch() if build is Branching else (torch.randn(6, 4, 2).double(), torch.arange(6) % 2)
    twin = Twin(module, gram="dense")
    optimizer = DirectionalNewton(module, CROSS_ENTROPY)
    with caplog.at_level(logging.INFO, "ddnewton"):
        for t in range(3):
            info = twin.step(X, y)
            assert error(optimizer.step(X, y), info.loss) < 1e-9, t
    assert error(parameters(module), twin.params) < 1e-6
    assert build is LastState or "layers of the module are not found" in caplog.text
