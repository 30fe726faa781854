"""`as_function`: a module as a function, whatever it shares, holds or is wrapped in."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.distributed
from torch import nn
from torch.func import functional_call, vmap

from ddnewton import as_function, directional_newton, newton_step, prepare
from ddnewton.optim import DirectionalNewton
from tests.models import cast
from tests.reference import error, step_of_module

MSE = nn.MSELoss()


class Low(nn.Module):
    """A frozen layer and what is trained beside it, as LoRA does."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a = nn.Linear(layer.in_features, rank, bias=False)
        self.b = nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + self.b(self.a(x))


class Whole(nn.Module):
    """Tied weights, a module of two names, one parameter of two names, buffers and low ranks."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.also = nn.ModuleDict({"inside": self.inside})
        self.low = Low(nn.Linear(4, 4))
        self.last = nn.Linear(4, 4)
        self.last.weight = self.inside[0].weight
        self.scale = nn.Parameter(torch.ones(4))
        self.same_scale = self.scale
        self.norm = nn.BatchNorm1d(4, affine=False)
        self.register_buffer("shift", torch.randn(4))

    def forward(self, x):
        h = self.also["inside"](x) * self.scale + self.shift
        return self.last(self.norm(self.low(h))) + self.inside(x) * self.same_scale


TRAINED = ["scale", "inside.0.weight", "inside.0.bias", "low.a.weight", "low.b.weight", "last.bias"]


def made(build=Whole):
    torch.manual_seed(0)
    return build().double().eval(), torch.randn(6, 4).double(), torch.randn(6, 4).double()


def test_parameters_are_those_that_are_trained_once_each():
    module, X, _ = made()
    model_fn, params = as_function(module)
    assert list(params) == TRAINED
    tensors = dict(module.named_parameters())
    for name, p in params.items():
        assert p.data_ptr() == tensors[name].data_ptr()
        assert not p.requires_grad
    assert torch.equal(model_fn(params, X), module(X))


def test_the_function_is_the_module_with_other_parameters():
    """Against a copy whose parameters are written over."""
    module, X, _ = made()
    model_fn, params = as_function(module)
    params = {name: torch.randn_like(p) for name, p in params.items()}
    other = copy.deepcopy(module)
    with torch.no_grad():
        for name, p in params.items():
            other.get_parameter(name).copy_(p)
    before = {name: (p, p.clone()) for name, p in module.named_parameters()}
    assert error(model_fn(params, X), other(X)) < 1e-14
    for name, p in module.named_parameters():
        assert p is before[name][0]
        assert torch.equal(p, before[name][1])


def test_some_of_the_parameters_and_others_of_their_names():
    module, X, _ = made()
    model_fn, params = as_function(module)
    doubled = 2 * params["inside.0.weight"]
    assert torch.equal(model_fn({}, X), module(X))
    by_first, by_last = (
        model_fn({name: doubled}, X) for name in ("inside.0.weight", "last.weight")
    )
    assert torch.equal(by_first, by_last)
    assert not torch.equal(by_first, module(X))


def test_buffers_and_frozen_parameters_are_used_as_they_are_at_every_call():
    module, X, _ = made()
    model_fn, params = as_function(module)
    before = model_fn(params, X)
    module.shift.add_(1)
    with torch.no_grad():
        module.low.layer.weight.mul_(2)
    assert not torch.equal(model_fn(params, X), before)
    assert error(model_fn(params, X), module(X)) < 1e-14


def test_a_call_that_fails_leaves_the_module_as_it_was():
    module, _, _ = made()
    model_fn, params = as_function(module)
    before = dict(module.named_parameters(remove_duplicate=False))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model_fn({name: 2 * p for name, p in params.items()}, torch.ones(6, 5).double())
    after = dict(module.named_parameters(remove_duplicate=False))
    assert all(after[name] is p for name, p in before.items())


@pytest.mark.parametrize("gram", ["dense", "structured"])
def test_a_step_of_the_function_is_that_of_plain_autograd(gram):
    module, X, y = made()
    expected = step_of_module(copy.deepcopy(module), X, y, 0.1)
    step = newton_step(*as_function(module), X, y, MSE, 0.1, gram=gram)
    assert list(step) == TRAINED
    assert error(torch.cat([s.flatten() for s in step.values()]), expected) < 1e-10


def test_it_goes_wherever_a_model_function_goes():
    module, X, y = made()
    model_fn, params = as_function(module)
    prepared = prepare(model_fn, params, X)
    assert error(prepared(params, X), module(X)) < 1e-13
    stacked = {name: torch.stack([p, 2 * p]) for name, p in params.items()}
    together = vmap(model_fn, in_dims=(0, None))(stacked, X)
    assert error(together[0], module(X)) < 1e-13
    optimizer = directional_newton(model_fn, MSE, 0.1)
    updated, _, info = optimizer.update(params, optimizer.init(params), X, y)
    twin = DirectionalNewton(copy.deepcopy(module), MSE, 0.1)
    assert error(twin.step(X, y), info.loss) < 1e-12
    assert info.loss_after < info.loss
    assert list(updated) == TRAINED


class Outputs(dict):
    """What a model of Hugging Face returns."""

    __getattr__ = dict.__getitem__


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 3), nn.Linear(3, 7)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids, attention_mask=None):
        h = self.embedding(input_ids) * attention_mask[..., None]
        return Outputs(logits=self.head(h.mean(1)))


def logits(module, X):
    return module(**X).logits


def test_forward_says_how_the_module_is_called():
    torch.manual_seed(0)
    module = Language().double()
    mask = torch.ones(4, 5).double()
    X, y = {"input_ids": torch.randint(0, 7, (4, 5)), "attention_mask": mask}, torch.arange(4)
    model_fn, params = as_function(module, forward=logits)
    assert list(params) == ["embedding.weight", "head.bias"]
    assert torch.equal(model_fn(params, X), module(**X).logits)
    expected = newton_step(
        lambda p, X: functional_call(module, p, (), X).logits,
        *(params, X, y, nn.CrossEntropyLoss(), 0.1),
    )
    step = newton_step(model_fn, params, X, y, nn.CrossEntropyLoss(), 0.1)
    assert error(step, expected) < 1e-12


@pytest.mark.parametrize("forward", [None, logits, partial(logits)])
def test_it_can_be_pickled(forward):
    torch.manual_seed(0)
    module = nn.Linear(3, 2) if forward is None else Language()
    X = torch.ones(2, 3)
    if forward is not None:
        X = {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 3)}
    model_fn, params = as_function(module, forward)
    loaded = pickle.loads(pickle.dumps(model_fn))
    assert torch.equal(loaded(params, X), model_fn(params, X))
    assert copy.deepcopy(model_fn).module is not module


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "compiled": partial(torch.compile, backend="eager"),
    "compiled in parallel": lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
    "parallel and compiled": lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_taken_off_and_stay_in_step(wrapper):
    module, X, y = made()
    plain = copy.deepcopy(module)
    wrapped = WRAPPERS[wrapper](module)
    model_fn, params = as_function(wrapped)
    assert list(params) == TRAINED
    assert error(model_fn(params, X), plain(X)) < 1e-14
    step = newton_step(model_fn, params, X, y, MSE, 0.1, gram="structured")
    assert error(step, newton_step(*as_function(plain), X, y, MSE, 0.1)) < 1e-10
    # The optimizer moves the parameters that the wrapper has.
    names = list(wrapped.state_dict())
    optimizer, twin = DirectionalNewton(wrapped, MSE), DirectionalNewton(plain, MSE)
    for _ in range(2):
        assert error(optimizer.step(X, y), twin.step(X, y)) < 1e-9
    assert list(wrapped.state_dict()) == names
    assert error(list(wrapped.state_dict().values()), list(plain.state_dict().values())) < 1e-9
    assert error(wrapped(X), plain(X)) < 1e-9
    copied = DirectionalNewton(copy.deepcopy(plain), MSE)
    copied.load_state_dict(optimizer.state_dict())
    assert error(copied.step(X, y), optimizer.step(X, y)) < 1e-9


@pytest.fixture
def processes(request, tmp_path):
    """This process as the first of so many, of which the others do nothing."""
    if request.param == 1:
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    else:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield request.param
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("processes", [1, 2], indirect=True)
def test_distributed_data_parallel_is_taken_off_and_says_that_nothing_is_exchanged(processes):
    module, X, y = made()
    plain = copy.deepcopy(module)
    wrapped = nn.parallel.DistributedDataParallel(module)
    if processes == 1:
        optimizer, (_, params) = DirectionalNewton(wrapped, MSE), as_function(wrapped)
    else:
        with pytest.warns(UserWarning, match="nothing is exchanged with other processes"):
            optimizer = DirectionalNewton(wrapped, MSE)
        with pytest.warns(UserWarning, match="nothing is exchanged with other processes"):
            _, params = as_function(wrapped)
    assert list(params) == TRAINED
    assert error(optimizer.step(X, y), DirectionalNewton(plain, MSE).step(X, y)) < 1e-12
    assert error(list(module.parameters()), list(plain.parameters())) < 1e-9


def test_what_is_no_module_or_trains_nothing_is_refused():
    module, _, _ = made()
    refused = {
        "as_function: module must be an nn.Module; got function": (lambda p, x: x,),
        "as_function: forward must be a function of module and X; got str": (module, "logits"),
        "as_function: a parameter of the module must require a gradient; got none": (
            copy.deepcopy(module).requires_grad_(False),
        ),
        "as_function: parameters must have values; got none yet of weight, bias": (
            nn.LazyLinear(3),
        ),
    }
    for message, arguments in refused.items():
        with pytest.raises((TypeError, ValueError), match=message):
            as_function(*arguments)
    with pytest.raises(TypeError, match="DirectionalNewton: forward must be a function"):
        DirectionalNewton(module, MSE, forward="logits")


def test_names_that_the_module_does_not_have_are_refused():
    module, X, _ = made()
    model_fn, params = as_function(module)
    weight = params["inside.0.weight"]
    with pytest.raises(ValueError, match=r"names of parameters of the module; got \['other'\]"):
        model_fn({**params, "other": weight}, X)
    with pytest.raises(ValueError, match="one value for a parameter that is tied; got several"):
        model_fn({"inside.0.weight": weight, "last.weight": 2 * weight}, X)


def test_samples_may_have_any_dtype():
    module, X, y = made()
    model_fn, params = as_function(module.float())
    X, y = cast((X, y), torch.float32)
    assert newton_step(model_fn, params, X, y, MSE, 0.1).keys() == params.keys()
