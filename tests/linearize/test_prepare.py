"""What `prepare` returns: a model_fn that knows its layers, and where it holds."""

import re
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_leaves, tree_map

from ddnewton import newton_step, newton_step_and_info, prepare, top_k
from tests.methods import DTYPES, FLOAT32, FLOAT64
from tests.models import PROBLEMS, cast, normal, problem
from tests.reference import dense, error, flat, solve

ROUNDING = {FLOAT32: 1e-5, FLOAT64: 1e-13}


def repeated(tree, times: int):
    """A batch of other samples: the same ones several times, none as it was."""

    def more(x):
        copies = torch.cat([x] * times)
        scale = torch.linspace(0.9, 1.1, len(copies), dtype=FLOAT64).to(x.dtype)
        scale = scale.reshape(-1, *(1 for _ in x.shape[1:]))
        return copies * scale if x.is_floating_point() else copies

    return tree_map(more, tree)


def moved(params):
    """Other values of the parameters."""
    return tree_map(lambda p: 1.5 * p + 0.1, params)


# --- a model_fn -----------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("name", PROBLEMS)
def test_it_is_the_function_for_any_batch_and_any_parameters(name, dtype):
    model_fn, params, X, *_ = problem(name, dtype)
    prepared = prepare(model_fn, params, X)
    assert len(repr(prepared).splitlines()) == 2 + len(tree_leaves(params))
    for p in (params, moved(params)):
        for x in (X, repeated(X, 3), tree_map(lambda x: x[:1], X)):
            outputs = prepared(p, x)
            assert outputs.dtype == dtype
            assert outputs.shape == model_fn(p, x).shape
            assert error(outputs, model_fn(p, x)) < ROUNDING[dtype]


@pytest.mark.parametrize("name", PROBLEMS)
def test_steps_with_other_samples_and_parameters_than_prepared_with(name):
    given = problem(name)
    prepared = prepare(given.model_fn, given.params, tree_map(lambda x: x[:1], given.X))
    other = given._replace(params=moved(given.params), X=repeated(given.X, 2))
    other = other._replace(y=torch.cat([given.y] * 2))
    assert error(newton_step(prepared, *other[1:], 0.1), solve(dense(*other), 0.1)) < 1e-9


def test_it_goes_wherever_model_fn_goes():
    """Derivatives, other transforms and other modules' losses included."""
    model_fn, params, X, y, criterion = problem("relu_mlp")
    prepared = prepare(model_fn, params, X)

    def gradient(function):
        return torch.func.grad(lambda p: criterion(function(p, X), y))(params)

    assert error(gradient(prepared), gradient(model_fn)) < 1e-14
    by_sample = vmap(lambda x: prepared(params, x[None])[0])(X)
    assert error(by_sample, model_fn(params, X)) < 1e-14
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    criterion(prepared(leaves, X), y).backward()
    assert error({name: p.grad for name, p in leaves.items()}, gradient(model_fn)) < 1e-14


@pytest.mark.parametrize("name", ["relu_mlp", "convolution", "attention", "many_points"])
@pytest.mark.parametrize("gram", ["auto", "structured", "dense"])
def test_it_works_with_every_gram(name, gram):
    given = problem(name)
    prepared = prepare(*given[:3])
    result = newton_step(prepared, *given[1:], 0.1, gram=gram)
    assert error(result, solve(dense(*given), 0.1)) < 1e-11


def test_it_may_be_prepared_again():
    given = problem("relu_mlp")
    prepared = prepare(*given[:3])
    result = newton_step(prepare(prepared, *given[1:3]), *given[1:], 0.1)
    assert error(result, newton_step(prepared, *given[1:], 0.1)) < 1e-13


def test_it_is_deterministic():
    given = problem("convolution", FLOAT32)
    first, second = (prepare(*given[:3]) for _ in range(2))
    assert repr(first) == repr(second)
    steps = [newton_step(model_fn, *given[1:], 0.1) for model_fn in (first, first, second)]
    assert all(torch.equal(flat(steps[0]), flat(step)) for step in steps)


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["relu_mlp", "lstm", "poisson", "encoder_layer"])
def test_with_and_without_gradients(name, context):
    given = problem(name)
    expected = newton_step(*given, 0.1, gram="dense")
    outside = prepare(*given[:3])
    with context():
        before = torch.is_grad_enabled()
        inside = prepare(*given[:3])
        for prepared in (inside, outside):
            assert error(newton_step(prepared, *given[1:], 0.1), expected) < 1e-12
        assert torch.is_grad_enabled() == before
        params, X, y = (tree_map(torch.clone, tree) for tree in given[1:4])
    assert error(newton_step(inside, *given[1:], 0.1), expected) < 1e-12
    # Tensors made in inference mode are of use outside it as well.
    assert error(newton_step(outside, params, X, y, given.criterion, 0.1), expected) < 1e-12


def test_parameters_of_two_dtypes():
    given = problem("list_of_layers")
    params = [(weight, bias.float()) for weight, bias in given.params]
    mixed = given._replace(params=params)
    result = newton_step(prepare(*mixed[:3]), *mixed[1:], 0.1)
    assert [leaf.dtype for leaf in tree_leaves(result)] == [FLOAT64, FLOAT32] * 3
    assert error(result, newton_step(*mixed, 0.1, gram="dense")) < 1e-6


@pytest.mark.parametrize("inside", [FLOAT32, FLOAT64])
@pytest.mark.parametrize("outside", [FLOAT32, FLOAT64])
def test_outputs_of_another_dtype_than_the_parameters(inside, outside):
    given = problem("one_tensor", inside)
    given = given._replace(model_fn=lambda W, X: torch.sin(X @ W).to(outside))
    prepared = prepare(*given[:3])
    assert prepared(*given[1:3]).dtype == outside
    result = newton_step(prepared, *given[1:], 0.1)
    assert result.dtype == inside
    assert error(result, newton_step(*given, 0.1, gram="dense")) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["relu_mlp", "tanh_mlp", "many_points"])
def test_half_precision(name, dtype):
    """Evaluated in float64, from parameters that are what they are."""
    given = problem(name, dtype)
    expected = newton_step(*given, 0.1, gram="dense")
    result = newton_step(prepare(*given[:3]), *given[1:], 0.1)
    assert {leaf.dtype for leaf in tree_leaves(result)} == {dtype}
    assert error(result, expected) < 2 * torch.finfo(dtype).eps


# --- what it tells --------------------------------------------------------------------------


def test_printed_it_lists_every_parameter():
    net = nn.Sequential(
        nn.Conv1d(2, 4, 3, bias=False),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    params = {name: p.detach() for name, p in net.named_parameters()} | {"unused": normal(2)}

    def model_fn(p, x):
        p = {name: value for name, value in p.items() if name != "unused"}
        return functional_call(net, p, (x,)) * p["3.bias"].exp()

    text = repr(prepare(model_fn, params, normal(2, 2, 5)))
    rows = text.splitlines()
    assert rows[0] == "Prepared("
    assert rows[-1] == ")"
    assert [re.findall(r"\['(.*)'\]", row)[0] for row in rows[1:-1]] == list(params)
    told = dict(zip(params, rows[1:-1], strict=True))
    assert told["0.weight"].endswith(": convolution")
    assert told["3.weight"].endswith(": addmm")
    assert re.search(r"directly \(.*exp.*\)", told["3.bias"])
    assert told["unused"].endswith(": unused")


# --- where it does not hold -----------------------------------------------------------------


def linear(p, x):
    return x["value"] @ p["W"] + p["b"]


PARAMS = {"W": torch.ones(3, 2), "b": torch.zeros(2)}
X = {"value": torch.ones(4, 3)}
Y = torch.zeros(4, 2)


class Refused(NamedTuple):
    params: object
    X: object
    error: type
    match: str


REFUSED = {
    "another shape of a parameter": Refused(
        PARAMS | {"b": torch.zeros(1)},
        X,
        ValueError,
        r"params\['b'\] must be torch.float32\[2\] on cpu, as prepared; got torch.float32\[1\]",
    ),
    "another dtype of the parameters": Refused(
        cast(PARAMS, FLOAT64),
        X,
        ValueError,
        r"params\['W'\] must be torch.float32.*got torch.fl.*64",
    ),
    "one parameter more": Refused(
        PARAMS | {"c": torch.zeros(1)}, X, TypeError, "params must have the structure .* prepared"
    ),
    "parameters in a list": Refused(
        list(PARAMS.values()), X, TypeError, "params must have the structure"
    ),
    "a parameter that is a number": Refused(
        PARAMS | {"b": 0.0}, X, TypeError, r"params must hold .*tensors.* params\['b'\]: float"
    ),
    "another shape of a sample": Refused(
        PARAMS,
        {"value": torch.ones(4, 5, 3)},
        ValueError,
        r"X\['value'\] must be torch.float32\[3\] a sample on cpu, as prepared; got .*\[5, 3\]",
    ),
    "another dtype of the samples": Refused(
        PARAMS,
        cast(X, FLOAT64),
        ValueError,
        r"X\['value'\] must be torch.float32.*got torch.fl.*64",
    ),
    "no dict of samples": Refused(PARAMS, X["value"], TypeError, "X must have the structure"),
    "a sample without its batch": Refused(
        PARAMS, {"value": torch.ones(4)}, ValueError, r"X\['value'\] must be"
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_arguments_are_refused(name):
    params, x, kind, match = REFUSED[name]
    prepared = prepare(linear, PARAMS, X)
    with pytest.raises(kind, match=match):
        newton_step(prepared, params, x, Y, F.mse_loss, 0.1)
    with pytest.raises(kind, match=match):
        prepared(params, x)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_function_and_the_remedy(name):
    params, x, kind, _ = REFUSED[name]
    with pytest.raises(kind, match=r"(?s)^newton_step: .*; got .*\. [A-Z].*\.$"):
        newton_step(prepare(linear, PARAMS, X), params, x, Y, F.mse_loss, 0.1)


def train_mode(*layers: nn.Module):
    net = nn.Sequential(nn.Linear(3, 4), *layers).train()
    return {
        "model_fn": lambda p, x: functional_call(net, p, (x,)),
        "params": dict(net.named_parameters()),
    }


BAD_INPUT = {
    "no function": ({"model_fn": 3}, TypeError, "prepare: model_fn must be a function; got 3"),
    "no parameters": ({"params": {}}, ValueError, "prepare: params must hold at least one tensor"),
    "no numbers": (
        {"params": {"W": torch.zeros(0)}},
        ValueError,
        "prepare: params must hold at least one number",
    ),
    "integers": (
        {"params": {"W": torch.ones(3, 2).long()}},
        TypeError,
        r"prepare: params must hold floating-point .* params\['W'\]: torch.int64",
    ),
    "an empty batch": ({"X": torch.ones(0, 3)}, ValueError, "X must hold at least one sample"),
    "no tensor": ({"X": {}}, ValueError, "X must hold at least one tensor"),
    "a scalar": ({"X": torch.ones(())}, ValueError, "samples on axis 0; got X: a tensor"),
    "different counts": ({"X": [torch.ones(3, 3), torch.ones(2, 3)]}, ValueError, "same number"),
    "two outputs": ({"model_fn": lambda p, x: (x, x)}, TypeError, "must return one tensor"),
    "integer outputs": ({"model_fn": lambda p, x: x.long()}, TypeError, "floating-point outputs"),
    "an average": (
        {"model_fn": lambda p, x: (x @ p["W"]).mean()},
        ValueError,
        "outputs of model_fn must have the samples on axis 0",
    ),
    "nan": ({"model_fn": lambda p, x: x @ p["W"] / 0}, ValueError, "outputs .* must be finite"),
    "batch normalisation": (
        train_mode(nn.BatchNorm1d(4)),
        ValueError,
        r"prepare: .*batch_norm\) in train mode.* in BatchNorm1d '1'\. Call \.eval\(\)",
    ),
    "dropout": (
        train_mode(nn.Dropout(0.5)),
        ValueError,
        r"prepare: .*dropout in train mode, which is random, in Dropout '1'",
    ),
    "a random function": (
        {"model_fn": lambda p, x: x @ p["W"] + torch.randn(2)},
        ValueError,
        "the random function randn",
    ),
    "samples that mix": (
        {"model_fn": lambda p, x: torch.tanh((x - x.mean(0)) @ p["W"])},
        ValueError,
        "output must not depend on another's.*mixes the samples",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused(name):
    changes, kind, match = BAD_INPUT[name]
    arguments = {"model_fn": lambda p, x: x @ p["W"], "params": {"W": normal(3, 2)}}
    arguments |= {"X": normal(5, 3)}
    with pytest.raises(kind, match=match):
        prepare(**arguments | changes)


# --- what it leaves alone -------------------------------------------------------------------


class Closure:
    """A model that refers to a number, a tensor and a module."""

    def __init__(self):
        self.power, self.scale, self.norm = 2, torch.tensor([2.0, 3.0]), nn.BatchNorm1d(2).eval()

    def __call__(self, p, x):
        return self.norm((x @ p["W"]) ** self.power) * self.scale

    def with_another_number(self):
        self.power = 3

    def with_another_tensor(self):
        self.scale = -self.scale

    def with_the_tensor_changed(self):
        self.scale.mul_(2)

    def with_a_buffer_changed(self):
        self.norm.running_mean.add_(1)

    def with_a_module_in_train_mode(self):
        self.norm.train()


CHANGES = [name for name in vars(Closure) if name.startswith("with_")]


@DTYPES
@pytest.mark.parametrize("change", CHANGES)
def test_what_the_model_refers_to_is_frozen(change, dtype):
    """As under `jax.jit`, and as documented."""
    model_fn = Closure()
    model_fn.norm.to(dtype)
    model_fn.scale = model_fn.scale.to(dtype)
    params, x = {"W": normal(3, 2).to(dtype)}, normal(4, 3).to(dtype)
    prepared = prepare(model_fn, params, x)
    outputs = prepared(params, x)
    y = outputs + 1
    step = newton_step(prepared, params, x, y, F.mse_loss, 0.1)

    getattr(model_fn, change)()

    assert error(model_fn(params, x), outputs) > 0.01
    assert torch.equal(prepared(params, x), outputs)
    assert torch.equal(flat(newton_step(prepared, params, x, y, F.mse_loss, 0.1)), flat(step))


def test_nothing_outside_changes():
    net = nn.Sequential(
        nn.BatchNorm1d(4), nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)
    ).eval()
    net.register_buffer("counter", torch.zeros(1))
    params, X = dict(net.named_parameters()), normal(6, 4).requires_grad_()
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    state = {name: value.clone() for name, value in net.state_dict().items()}
    versions = {name: value._version for name, value in net.state_dict().items()}
    random_state, x_before = torch.get_rng_state(), X.detach().clone()
    backends = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled

    prepared = prepare(lambda p, x: functional_call(net, p, (x,)), params, X)
    newton_step(prepared, params, X, y, nn.CrossEntropyLoss(), 0.1)

    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert versions == {name: value._version for name, value in net.state_dict().items()}
    assert all(p.requires_grad and p.grad is None for p in params.values())
    assert torch.equal(X.detach(), x_before)
    assert X.requires_grad
    assert X.grad is None
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()
    assert backends == (torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled)
    assert not prepared(tree_map(torch.Tensor.detach, params), X.detach()).requires_grad


@pytest.mark.parametrize("target", ["params", "X"])
def test_a_model_that_writes_to_its_inputs_does_not_reach_them(target):
    def model_fn(W, X):
        return (X.mul_(2) if target == "X" else X) @ (W.mul_(2) if target == "params" else W)

    W, X = normal(3, 2), normal(5, 3)
    before = W.clone(), X.clone()
    prepared = prepare(model_fn, W, X)
    outputs = prepared(W, X)
    newton_step(prepared, W, X, outputs + 1, F.mse_loss, 0.1)
    assert torch.equal(W, before[0])
    assert torch.equal(X, before[1])
    assert error(outputs, 2 * before[1] @ before[0]) < 1e-6


# --- ensembles ------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("name", ["relu_mlp", "convolution", "tanh_mlp", "many_points", "poisson"])
def test_an_ensemble_is_a_loop(name, dtype):
    first = problem(name, dtype)
    apart = [problem(name, dtype, seed).params for seed in range(3)]
    stacked = tree_map(lambda *leaves: torch.stack(leaves), *apart)
    prepared = prepare(*first[:3])

    def one(params):
        rest = (params, *first[2:], 0.1)
        step, info = newton_step_and_info(prepared, *rest, select=top_k(1), complement=0.5)
        return step, info.evals

    steps, evals = vmap(one)(stacked)
    for i, params in enumerate(apart):
        step, alone = one(params)
        assert error(tree_map(lambda leaf, i=i: leaf[i], steps), step) < 10 * ROUNDING[dtype]
        assert error(evals[i], alone) < 10 * ROUNDING[dtype]


@pytest.mark.parametrize("name", ["relu_mlp", "tied_autoencoder", "attention"])
def test_an_ensemble_may_be_prepared_inside(name):
    first = problem(name)
    apart = [problem(name, FLOAT64, seed).params for seed in range(2)]
    stacked = tree_map(lambda *leaves: torch.stack(leaves), *apart)

    def one(params, gram):
        return newton_step(*first._replace(params=params), 0.1, gram=gram)

    together = vmap(partial(one, gram="structured"))(stacked)
    for i, params in enumerate(apart):
        alone = one(params, "dense")
        assert error(tree_map(lambda leaf, i=i: leaf[i], together), alone) < 1e-11
