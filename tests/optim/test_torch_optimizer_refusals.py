"""What the optimizer in place refuses, and that a refusal changes nothing."""

import copy

import pytest
import torch
from torch import nn

from ddnewton import held_out
from ddnewton.optim import DirectionalNewton
from tests.methods import FLOAT64
from tests.optim.twins import CRITERIA, CROSS_ENTROPY, batch, everything, identical, net, split

pytestmark = pytest.mark.usefixtures("layers_found_once")


class NoLoss:
    """What a closure of gradients returns."""

    def __call__(self):
        return torch.tensor(1.0, requires_grad=True)


STEPS = {
    "no batch": (lambda o: o.step(), TypeError, "a step needs a batch; got none"),
    "no targets": (lambda o: o.step(batch()[0]), TypeError, "got X without y"),
    "no inputs": (lambda o: o.step(y=batch()[1]), TypeError, "a step needs a batch; got none"),
    "a loss": (lambda o: o.step(NoLoss()), TypeError, r"return the batch, \(X, y\); got Tensor"),
    "a loss, named": (
        lambda o: o.step(closure=NoLoss()),
        TypeError,
        r"return the batch, \(X, y\); got Tensor.*There is no backward",
    ),
    "nothing": (lambda o: o.step(lambda: None), TypeError, "got NoneType"),
    "three things": (lambda o: o.step(lambda: (1, 2, 3)), TypeError, "got tuple"),
    "half a batch": (lambda o: o.step(lambda: (batch()[0], None)), TypeError, "X without y"),
    "strings": (lambda o: o.step(["a"], batch()[1]), TypeError, "must be tensors.*got X.*str"),
    "empty": (lambda o: o.step(*batch(0)), ValueError, "at least one sample"),
    "unequal": (
        lambda o: o.step(batch()[0], batch(5)[1]),
        ValueError,
        "same number of samples; got X: 12, y: 5",
    ),
    "other classes": (lambda o: o.step(batch()[0], batch()[1] + 3), ValueError, "class indices"),
    "other width": (lambda o: o.step(batch()[0][:, :2], batch()[1]), RuntimeError, "shape"),
    "not finite": (
        lambda o: o.step(batch()[0] / 0, batch()[1]),
        ValueError,
        "must be finite; got nan or inf",
    ),
}


@pytest.mark.parametrize("case", STEPS)
def test_a_step_that_is_refused_changes_nothing(case):
    call, kind, message = STEPS[case]
    module = net()
    optimizer = DirectionalNewton(module, CRITERIA["monte_carlo"](0), held_out())
    optimizer.step(*batch())
    before, state = everything(module), copy.deepcopy(optimizer.state_dict())
    info = optimizer.info
    with pytest.raises(kind, match=message):
        call(optimizer)
    assert identical(everything(module), before)
    assert str(optimizer.state_dict()) == str(state)
    assert torch.equal(optimizer.state_dict()["generator"], state["generator"])
    assert optimizer.info is info


def test_an_error_in_a_closure_passes_through():
    module = net()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY)

    def closure():
        raise StopIteration("no more batches")

    before = everything(module)
    with pytest.raises(StopIteration, match="no more batches"):
        optimizer.step(closure)
    assert identical(everything(module), before)
    assert optimizer.state_dict()["state"][0]["step"] == 0


def test_parameters_in_place_of_others_are_refused():
    """An optimizer of gradients would move what the module no longer has."""
    module = net()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY)
    optimizer.step(*batch())
    module.load_state_dict(everything(module), assign=True)
    with pytest.raises(ValueError, match="must still be those of the module"):
        optimizer.step(*batch())
    module = net()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, params=split(module, [{}, {}]))
    module[2].bias = nn.Parameter(torch.zeros(4, dtype=FLOAT64))
    with pytest.raises(ValueError, match="must still be those of the module"):
        optimizer.step(*batch())


ARGUMENTS = {
    "a function": (
        lambda m: ((lambda params, X: X), CROSS_ENTROPY),
        {},
        TypeError,
        "module must be an nn.Module; got function",
    ),
    "a class": (lambda m: (nn.Linear, CROSS_ENTROPY), {}, TypeError, "nn.Module; got type"),
    "parameters": (
        lambda m: (m.parameters(), CROSS_ENTROPY),
        {},
        TypeError,
        "nn.Module; got generator",
    ),
    "lr < 0": (None, {"lr": -0.1}, ValueError, "lr must be a number ≥ 0; got -0.1"),
    "lr nan": (None, {"lr": float("nan")}, ValueError, "lr must be a number ≥ 0; got nan"),
    "lr string": (None, {"lr": "exact"}, TypeError, "lr must be a number ≥ 0; got 'exact'"),
    "damping < 0": (None, {"damping": -1.0}, ValueError, "damping must be a number ≥ 0"),
    "momentum 1": (None, {"momentum": 1.0}, ValueError, "momentum must be below 1"),
    "momentum string": (None, {"momentum": "none"}, ValueError, "momentum must be"),
    "weight decay": (None, {"weight_decay": -1.0}, ValueError, "weight_decay must be"),
    "trust radius": (None, {"trust_radius": 0.0}, ValueError, "trust_radius must be"),
    "select": (None, {"select": 3}, TypeError, "select must be a function or None"),
    "complement": (None, {"complement": "none"}, ValueError, "complement must be"),
    "gram": (None, {"gram": "sparse"}, ValueError, "gram must be one of"),
    "chunk_size": (None, {"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
    "no params": (None, {"params": []}, ValueError, "empty parameter list"),
    "a tensor": (None, {"params": torch.ones(1)}, TypeError, "iterable of Tensors"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_that_break_a_rule(case):
    arguments, options, kind, message = ARGUMENTS[case]
    module = net()
    given = (module, CROSS_ENTROPY) if arguments is None else arguments(module)
    with pytest.raises(kind, match=message):
        DirectionalNewton(*given, **options)


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="empty parameter list"):
        DirectionalNewton(net().requires_grad_(False), CROSS_ENTROPY)
    with pytest.raises(ValueError, match="empty parameter list"):
        DirectionalNewton(nn.Tanh(), CROSS_ENTROPY)
    module = net()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY)
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="params must hold at least one tensor"):
        optimizer.step(*batch())


GROUP = {
    "foreign": (
        lambda m: {"params": net()[0].parameters()},
        ValueError,
        "parameters of the module",
    ),
    "half foreign": (
        lambda m: {"params": [m[0].weight, nn.Parameter(torch.ones(1))]},
        ValueError,
        "params must be parameters of the module",
    ),
    "a buffer": (lambda m: {"params": [torch.ones(3)]}, ValueError, "parameters of the module"),
    "twice": (lambda m: {"params": m[4].parameters()}, ValueError, "more than one parameter group"),
    "unknown key": (
        lambda m: {"params": m[0].parameters(), "momentum": 0.1, "betas": 1},
        ValueError,
        "a group has params, lr, weight_decay, damping and select of its own; got betas, momentum",
    ),
    "weight decay": (
        lambda m: {"params": m[0].parameters(), "weight_decay": -1.0},
        ValueError,
        "weight_decay of a group must be a number ≥ 0; got -1.0",
    ),
    "lr": (
        lambda m: {"params": m[0].parameters(), "lr": -1.0},
        ValueError,
        "lr of a group must be a number ≥ 0; got -1.0",
    ),
    "lr string": (lambda m: {"params": m[0].parameters(), "lr": "a"}, TypeError, "lr of a group"),
    "damping": (
        lambda m: {"params": m[0].parameters(), "damping": -1.0},
        ValueError,
        "damping must be a number ≥ 0",
    ),
    "adaptation": (
        lambda m: {"params": m[0].parameters(), "damping": held_out()},
        TypeError,
        "damping must be a number",
    ),
    "select": (
        lambda m: {"params": m[0].parameters(), "select": 4},
        TypeError,
        "select must be a function",
    ),
    "a set": (lambda m: {"params": set(m[0].parameters())}, TypeError, "ordered collections"),
}


@pytest.mark.parametrize("case", GROUP)
def test_groups_that_break_a_rule_leave_the_optimizer_as_it_was(case):
    build, kind, message = GROUP[case]
    module, expected = net(), net()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, params=module[4].parameters())
    other = DirectionalNewton(expected, CROSS_ENTROPY, params=expected[4].parameters())
    group = build(module)
    keys = set(group)
    with pytest.raises(kind, match=message):
        optimizer.add_param_group(group)
    assert set(group) == keys
    assert len(optimizer.param_groups) == 1
    for each, m in ((optimizer, module), (other, expected)):
        each.add_param_group({"params": m[2].parameters(), "damping": 0.2})
    assert torch.equal(optimizer.step(*batch()), other.step(*batch()))
    assert identical(everything(module), everything(expected))
