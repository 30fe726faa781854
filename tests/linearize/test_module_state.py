"""Whatever a model does to the modules that it refers to, they are afterwards what they were."""

import collections
import contextlib
import copy
import types
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from ddnewton import ggn_eigvalsh, newton_step, prepare
from ddnewton.linearize.module_state import kept
from ddnewton.optim import DirectionalNewton
from tests.reference import error, step_of_module

MSE = nn.MSELoss()


class Filter(nn.Module):
    """As in SchNet: a net that belongs to a block and to the convolution in it."""

    def __init__(self, net):
        super().__init__()
        self.net, self.out = net, nn.Linear(5, 5)

    def forward(self, x):
        return self.out(self.net(x) * x[:, :1])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.BatchNorm1d(5))
        self.conv = Filter(self.net)

    def forward(self, x):
        return self.conv(x)


class Shared(nn.Module):
    """One module under two names and three, tied weights in two modules, buffers, a frozen bias."""

    def __init__(self):
        super().__init__()
        block = Block()
        self.blocks = nn.ModuleList([block, block])
        self.again = block.conv.net
        self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 5)
        self.last.weight = self.first.weight
        self.last.bias.requires_grad_(False)
        self.register_buffer("shift", torch.randn(5))

    def forward(self, x):
        h = self.blocks[0](x) + self.blocks[1](x) + self.again(x)
        return self.last(torch.tanh(self.first(h + self.shift)))


class Keeping(nn.Module):
    """As KAN does: activations as attributes, in lists, dicts and lists of them; and a counter."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.now, self.older, self.calls = None, [torch.zeros(2)], 0
        self.by_name = {"zero": torch.zeros(3), "deep": [[], {"x": torch.ones(1)}]}
        self.counter = collections.Counter(calls=1)
        self.recent = collections.deque([torch.zeros(1)], maxlen=2)
        self.inside = ({"h": None},)

    def forward(self, x):
        h = self.layer(x)
        self.now, self.new = h, h.sum(0)
        self.older.append(h)
        self.older[0] = h
        self.by_name["h"] = h
        self.by_name["deep"][0] += [h]
        self.by_name["deep"][1]["x"] = h
        del self.by_name["zero"]
        self.by_name["zero"] = h
        self.counter["calls"] += 1
        self.recent.append(h)
        self.inside[0]["h"] = h
        self.calls += 1
        self.layer.scale = h.std()
        return self.head(torch.tanh(h))


class Switching(nn.Module):
    """It changes its mode and what it consists of."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.hidden = [nn.Linear(2, 2)]  # not registered

    def forward(self, x):
        self.eval()
        self.hidden[0].last = h = torch.tanh(self.layer(x))
        self.late = nn.Identity()
        self.register_buffer("table", h.detach(), persistent=False)
        self.register_parameter("extra", nn.Parameter(torch.zeros(1)))
        return self.head(h)


class Reading(nn.Module):
    """What it kept of one call would be wrong in the next: a cache for one length and dtype."""

    def __init__(self):
        super().__init__()
        self.layer, self.cache = nn.Linear(3, 2), None

    def forward(self, x):
        if self.cache is None or self.cache.shape != x.shape:
            self.cache = torch.ones_like(x) * self.layer.weight.sum()
        return torch.tanh(self.layer(x)) * self.cache[:, :1]


class Recurrent(nn.Module):
    """A layer that holds its weights once more, in a list."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.cell(x[:, None] * torch.ones(1, 3, 1, dtype=x.dtype))[0][:, -1])


MODULES = [Shared, Keeping, Switching, Reading, Recurrent]


def snapshot(value, trained=(), seen=None):
    """Every object that a module holds, in order; of tensors not trained the values too."""
    seen = {} if seen is None else seen
    if id(value) in seen:
        return []
    seen[id(value)] = value
    held = [value]
    if isinstance(value, torch.Tensor):
        held += [value.requires_grad, value.is_leaf]
        if not any(value is p for p in trained):
            held += [value._version, value.tolist()]
    elif isinstance(value, (nn.Module, dict)):
        for name, part in (vars(value) if isinstance(value, nn.Module) else value).items():
            held += [name, *snapshot(part, trained, seen)]
    elif isinstance(value, (list, tuple, collections.deque, set)):
        for part in value:
            held += snapshot(part, trained, seen)
    return held


def assert_unchanged(module, before, trained=()):
    now = snapshot(module, trained)
    assert len(now) == len(before)
    for new, old in zip(now, before, strict=True):
        plain = isinstance(old, (int, float, str, list))
        assert new is old or (plain and type(new) is type(old) and repr(new) == repr(old))


def made(build):
    torch.manual_seed(0)
    return build().double().eval(), torch.randn(6, 3).double(), torch.randn(6, 5).double()


def parameters(module):
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def called(module):
    return lambda p, x: functional_call(module, p, (x,))


def targets(module, X):
    return torch.zeros_like(copy.deepcopy(module)(X).detach())


WAYS = {
    "dense": lambda module, *given: newton_step(*given, MSE, 0.1, gram="dense"),
    "structured": lambda module, *given: newton_step(*given, MSE, 0.1, gram="structured"),
    "prepare": lambda module, model_fn, params, X, y: prepare(model_fn, params, X),
    "curvature": lambda module, *given: ggn_eigvalsh(*given, MSE),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("build", MODULES)
def test_a_module_is_what_it_was(build, way):
    module, X, _ = made(build)
    module.train(build in {Keeping, Switching})
    y, params, before = targets(module, X), parameters(module), snapshot(module)
    WAYS[way](module, called(module), params, X, y)
    assert_unchanged(module, before)


@pytest.mark.parametrize("build", MODULES)
def test_a_module_in_training_is_what_it_was_but_for_its_weights(build):
    module, X, _ = made(build)
    y, trained = targets(module, X), [p for p in module.parameters() if p.requires_grad]
    before = snapshot(module, trained)
    optimizer = DirectionalNewton(module, MSE)
    first = float(optimizer.step(X, y))
    assert float(optimizer.step(X, y)) < first
    assert_unchanged(module, before, trained)
    MSE(module(X), y).backward()
    assert all(p.grad is not None for p in trained)


@pytest.mark.parametrize("build", MODULES)
def test_the_step_is_that_of_plain_autograd(build):
    """Whatever a module keeps, a step is −(JᵀHJ + δ)⁻¹ g of the weights that are there."""
    module, X, _ = made(build)
    y = targets(module, X)
    expected = step_of_module(copy.deepcopy(module), X, y, 0.1)
    for gram in ("dense", "structured"):
        step = newton_step(called(module), parameters(module), X, y, MSE, 0.1, gram=gram)
        assert error(torch.cat([s.flatten() for s in step.values()]), expected) < 1e-10


class Failing(nn.Module):
    """It fails in the middle of a forward pass, at the call that is asked for."""

    def __init__(self, at, what):
        super().__init__()
        self.shared, self.seen = Shared(), []
        self.at, self.what = at, what

    def forward(self, x):
        self.seen.append(x)
        self.shared.first.note = x
        TIMES[0] += 1
        if TIMES[0] == self.at:
            raise self.what
        return self.shared(x)


TIMES = [0]


@pytest.mark.parametrize("what", [ValueError("mine"), KeyboardInterrupt(), RuntimeError("mine")])
@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("gram", ["dense", "structured"])
def test_a_model_that_fails_leaves_the_module_as_it_was(gram, at, what):
    torch.manual_seed(0)
    module = Failing(at, what).double().eval()
    X, y = torch.randn(6, 3).double(), torch.randn(6, 5).double()
    params, before = parameters(module), snapshot(module)
    TIMES[0] = 0
    with contextlib.suppress(ValueError, RuntimeError, KeyboardInterrupt):
        newton_step(called(module), params, X, y, MSE, 0.1, gram=gram)
    assert TIMES[0] >= at
    assert_unchanged(module, before)


class Trainer:
    """A plain object that has a net, as in most scripts."""

    def __init__(self, net):
        self.nets, self.log, self.data = {"net": net}, [], list(range(10**5))
        self.space = types.SimpleNamespace(net=net)

    def method(self, p, x):
        return functional_call(self.nets["net"], p, (x,))

    def closure(self):
        return lambda p, x: functional_call(self.space.net, p, (x,))


def ways_to_refer(module):
    def with_default(p, x, *, net=module):
        return functional_call(net, p, (x,))

    def mapped(p, x):
        return torch.cat([functional_call(NETS.net, p, (part,)) for part in (x[:2], x[2:])])

    NETS.net = module
    trainer = Trainer(module)
    return {
        "closure": called(module),
        "method": trainer.method,
        "object": trainer.closure(),
        "keyword": with_default,
        "partial": partial(lambda net, p, x: functional_call(net, p, (x,)), module),
        "in another file": mapped,
        "compiled": torch.compile(called(module), backend="eager"),
    }


NETS = types.ModuleType("nets")


@pytest.mark.parametrize("way", ways_to_refer(nn.Linear(1, 1)))
def test_modules_are_found_wherever_a_function_has_them(way):
    module, X, y = made(Shared)
    params, before = parameters(module), snapshot(module)
    newton_step(ways_to_refer(module)[way], params, X, y, MSE, 0.1, gram="dense")
    assert_unchanged(module, before)


def test_an_ensemble_leaves_its_modules_as_they_were():
    modules = [made(Keeping)[0] for _ in range(2)]
    X, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    before = [snapshot(module) for module in modules]
    params, _ = stack_module_state(modules)
    vmap(lambda p: newton_step(called(modules[0]), p, X, y, MSE, 0.1))(params)
    for module, old in zip(modules, before, strict=True):
        assert_unchanged(module, old)


def test_flags_of_parameters_are_put_back():
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)

    def function(p, x):
        module.requires_grad_(bool(module.bias.requires_grad is False))
        raise ZeroDivisionError

    for call in kept(function):
        with pytest.raises(ZeroDivisionError):
            call(None, None)
        assert [p.requires_grad for p in module.parameters()] == [True, False]


def test_what_refers_to_no_module_is_called_as_it_is():
    def function(p, x):
        return x @ p

    assert kept(function) == (function, function)


@pytest.mark.parametrize("gram", ["dense", "structured"])
@pytest.mark.parametrize("how", ["whole", "part", "in place", "part in place"])
def test_compiled_modules_are_differentiated_as_they_were_written(how, gram):
    def compiled(module):
        if how == "whole":
            return torch.compile(module, backend=refuse)
        if how == "part":
            module[2] = torch.compile(module[2], backend=refuse)
        elif how == "in place":
            module.compile(backend=refuse)
        else:
            module[2].compile(backend=refuse)
        return module

    def refuse(graph, inputs):
        raise AssertionError

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 5))).double()
    X, y = torch.randn(6, 3).double(), torch.randn(6, 5).double()
    expected = newton_step(called(module), parameters(module), X, y, MSE, 0.1)
    module = compiled(module)
    params, before = parameters(module), {id(m): dict(vars(m)) for m in module.modules()}
    step = newton_step(called(module), params, X, y, MSE, 0.1, gram=gram)
    assert error(list(step.values()), list(expected.values())) < 1e-12
    for part in module.modules():
        assert vars(part).keys() == before[id(part)].keys()
        assert all(value is before[id(part)][name] for name, value in vars(part).items())


class Logging(nn.Module):
    """A criterion that keeps what it is called with."""

    def __init__(self):
        super().__init__()
        self.last, self.log, self.calls = None, [], 0

    def forward(self, f, y):
        self.last, self.calls = f, self.calls + 1
        self.log.append(f)
        return torch.cosh(f - y).log().mean()


def test_a_criterion_is_what_it_was():
    criterion, X, y = made(Logging)
    W, before = torch.randn(3, 5).double(), snapshot(criterion)
    for function in (criterion, lambda f, y: 2 * criterion(f, y)):
        step = newton_step(lambda W, X: torch.tanh(X @ W), W, X, y, function, 0.1)
        assert_unchanged(criterion, before)
        assert step.isfinite().all()
    copy.deepcopy(criterion)
