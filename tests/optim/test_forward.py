"""Batches of any size, dtype and structure, and modules that tie weights or cannot be traced."""

import copy
import warnings

import pytest
import torch
from torch import nn

import ddnewton.optim.modules
from ddnewton import Group, directional_newton, prepare
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
def test_a_module_that_cannot_be_traced(build):
    torch.manual_seed(0)
    module = build().double()
    X, y = batch() if build is Branching else (torch.randn(6, 4, 2).double(), torch.arange(6) % 2)
    twin = Twin(module, gram="dense")
    optimizer = DirectionalNewton(module, CROSS_ENTROPY)
    for t in range(3):
        info = twin.step(X, y)
        assert error(optimizer.step(X, y), info.loss) < 1e-9, t
    assert error(parameters(module), twin.params) < 1e-6


def test_a_module_that_goes_the_slow_way_says_so_once(monkeypatch):
    traced = []
    monkeypatch.setattr(
        ddnewton.optim.modules, "prepare", lambda *a: traced.append(1) or prepare(*a)
    )

    class Guarded(nn.Sequential):
        def forward(self, X):
            outputs = super().forward(X)
            return outputs if outputs[0, 0].detach().isfinite() else outputs.nan_to_num()

    module = Guarded(nn.Linear(3, 400), nn.Tanh(), nn.Linear(400, 3)).double()
    X, y = torch.randn(201, 3).double(), torch.arange(201) % 3  # 2 GFLOP: not tiny
    optimizer = DirectionalNewton(module, CROSS_ENTROPY)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for length in (200, 200, 201):
            module.note = length  # where it changes, the layers are looked for anew
            optimizer.step(X[:length], y[:length])
    assert len(caught) == 1
    assert "the slow way, by dense Jacobians: " in str(caught[0].message)
    assert len(traced) == 2
