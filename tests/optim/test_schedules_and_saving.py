"""Schedulers of torch, and runs that are saved, loaded and copied."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from ddnewton import held_out, top_k
from ddnewton.optim import DirectionalNewton
from tests.methods import FLOAT32, FLOAT64
from tests.optim.twins import (
    CRITERIA,
    CROSS_ENTROPY,
    DAMPINGS,
    OPTIONS,
    Twin,
    batch,
    everything,
    identical,
    net,
    parameters,
    same,
    saved,
    split,
)
from tests.reference import error

pytestmark = pytest.mark.usefixtures("layers_found_once")


# --- schedulers -------------------------------------------------------------------------------


SCHEDULERS = {
    "ExponentialLR": partial(lr_scheduler.ExponentialLR, gamma=0.7),
    "LambdaLR": partial(lr_scheduler.LambdaLR, lr_lambda=lambda t: t / 3),
    "CosineAnnealingLR": partial(lr_scheduler.CosineAnnealingLR, T_max=5),
    "LinearLR": partial(lr_scheduler.LinearLR, start_factor=0.1, total_iters=4),
    "OneCycleLR": partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=8, cycle_momentum=False),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.ConstantLR(optimizer, 0.2, total_iters=2),
            lr_scheduler.ExponentialLR(optimizer, 0.8),
        ],
        milestones=[2],
    ),
}


@pytest.mark.parametrize(
    ("name", "damping", "lr"),
    [(name, "number", 0.6) for name in SCHEDULERS]
    + [(name, "held_out", None) for name in ("ExponentialLR", "LambdaLR")],
)
def test_schedulers(name, damping, lr):
    """The rates are those that torch's own optimizer would have."""
    other = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0 if lr is None else lr)
    schedule, rates = SCHEDULERS[name](other), []
    for _ in range(4):
        rates.append(other.param_groups[0]["lr"])
        other.step()
        schedule.step()
    assert len(set(rates)) > 2 or name == "SequentialLR"
    module = net()
    adaptation = DAMPINGS[damping]()
    base = adaptation.learning_rate if lr is None and damping == "held_out" else lambda t: 1.0
    twin = Twin(module, damping=adaptation, learning_rate=lambda t: base(t) * rates[int(t)])
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, adaptation, lr=lr)
    schedule = SCHEDULERS[name](optimizer)
    for t in range(4):
        twin.step(*batch(seed=t))
        optimizer.step(*batch(seed=t))
        schedule.step()
        assert error(parameters(module), twin.params) < 1e-8


def test_reduce_on_plateau():
    module = net()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, 0.1, lr=0.8)
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    schedule.step(optimizer.step(*batch()))
    assert optimizer.param_groups[0]["lr"] == 0.8
    schedule.step(optimizer.info.loss + 1)
    assert optimizer.param_groups[0]["lr"] == 0.4
    optimizer.step(*batch())
    assert optimizer.info.learning_rate == 0.4


def test_one_cycle_wants_to_be_told_that_momentum_stays():
    """As of every optimizer of torch without momentum in its groups."""
    optimizer = DirectionalNewton(net(), CROSS_ENTROPY, 0.1)
    with pytest.raises(ValueError, match="cycle_momentum"):
        lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=8)


def test_schedulers_scale_the_lr_of_every_group():
    module = net()
    optimizer = DirectionalNewton(
        module, CROSS_ENTROPY, 0.1, params=split(module, [{"lr": 0.5}, {"lr": 0.1}])
    )
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step(*batch())
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.05]
    heads, others = module[4], net()
    before, whole = everything(module), net()
    whole.load_state_dict(before)
    others = split(whole, [{}, {}])
    DirectionalNewton(whole, CROSS_ENTROPY, 0.1, params=others).step(*batch())
    optimizer.step(*batch())
    expected = 0.25 * (whole[4].weight - before["4.weight"])
    assert error(heads.weight - before["4.weight"], expected) < 1e-9


# --- saving and loading -----------------------------------------------------------------------

RESUMED = [
    *(("exact", damping, "plain", False, FLOAT32) for damping in DAMPINGS),
    *(("exact", "held_out", option, False, FLOAT64) for option in list(OPTIONS)[:4]),
    *(
        ("monte_carlo", damping, "momentum and weight decay", True, dtype)
        for damping in ("levenberg_marquardt", "trust_region", "held_out")
        for dtype in (FLOAT32, FLOAT64)
    ),
]


@pytest.mark.parametrize(("criterion", "damping", "option", "groups", "dtype"), RESUMED)
def test_what_was_saved_goes_on_bit_for_bit(criterion, damping, option, groups, dtype):
    def optimizer_of(module, seed):
        rules = [{"lr": 0.5, "select": top_k(5)}, {"damping": 0.01}]
        return DirectionalNewton(
            module,
            CRITERIA[criterion](seed),
            DAMPINGS[damping](),
            params=split(module, rules) if groups else None,
            **OPTIONS.get(option, {}),
        )

    module = net(dtype)
    optimizer = optimizer_of(module, 1)
    for t in range(2):
        optimizer.step(*batch(dtype=dtype, seed=t))
    file = saved({"module": module.state_dict(), "optimizer": optimizer.state_dict()})
    module_2 = net(dtype)
    with torch.no_grad():
        module_2[0].weight.zero_()
    optimizer_2 = optimizer_of(module_2, 2)
    optimizer_2.step(*batch(dtype=dtype, seed=9))  # what it did before does not count
    module_2.load_state_dict(file["module"])
    optimizer_2.load_state_dict(file["optimizer"])
    for t in range(2, 4):
        loss = optimizer.step(*batch(dtype=dtype, seed=t))
        assert torch.equal(optimizer_2.step(*batch(dtype=dtype, seed=t)), loss)
        assert same(optimizer_2.info, optimizer.info)
        assert identical(everything(module_2), everything(module))


def test_schedules_go_on_as_well():
    module, twin = net(), net()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, held_out(), lr=0.5)
    schedule = SCHEDULERS["OneCycleLR"](optimizer)
    for t in range(3):
        optimizer.step(*batch(seed=t))
        schedule.step()
    file = saved([module.state_dict(), optimizer.state_dict(), schedule.state_dict()])
    other = DirectionalNewton(twin, CROSS_ENTROPY, held_out())
    schedule_2 = SCHEDULERS["OneCycleLR"](other)
    for each, state in zip((twin, other, schedule_2), file, strict=True):
        each.load_state_dict(state)
    # Without an lr of its own the second is multiplied by what goes with the damping.
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    other = DirectionalNewton(twin, CROSS_ENTROPY, held_out(), lr=1.0)
    schedule_2 = SCHEDULERS["OneCycleLR"](other)
    other.load_state_dict(file[1])
    schedule_2.load_state_dict(file[2])
    for t in range(3, 6):
        for each, times in ((optimizer, schedule), (other, schedule_2)):
            each.step(*batch(seed=t))
            times.step()
        assert identical(everything(twin), everything(module))


def test_the_state_of_a_fresh_optimizer_is_that_of_a_start():
    module = net()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, held_out())
    fresh, start = saved(optimizer.state_dict()), everything(module)
    assert fresh["state"][0]["step"] == 0
    first = [optimizer.step(*batch(seed=t)) for t in range(3)]
    optimizer.load_state_dict(fresh)
    module.load_state_dict(start)
    assert [optimizer.step(*batch(seed=t)) for t in range(3)] == first


def test_parameters_without_values_have_no_state_yet():
    for module in (nn.Linear(3, 4, device="meta"), nn.LazyLinear(4)):
        assert DirectionalNewton(module, CROSS_ENTROPY, held_out()).state_dict()["state"] == {}


def test_a_module_that_is_cast_after_the_optimizer_is_made_starts_anew():
    module = net().float()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, held_out())
    module.double()
    optimizer.step(*batch())
    previous = [optimizer.state[p]["previous"].dtype for p in module.parameters()]
    assert previous == [FLOAT64] * len(previous)


def test_going_back_is_exact():
    """A state that was kept in memory is not written to by later steps."""
    module = net()
    criterion = CRITERIA["monte_carlo"](0)
    optimizer = DirectionalNewton(module, criterion, held_out())
    optimizer.step(*batch())
    state, kept = optimizer.state_dict(), everything(module)
    losses = [optimizer.step(*batch(seed=t)) for t in (1, 2)]
    optimizer.load_state_dict(state)
    module.load_state_dict(kept)
    assert [optimizer.step(*batch(seed=t)) for t in (1, 2)] == losses


def test_a_state_of_other_groups_is_refused():
    module = net()
    one = DirectionalNewton(module, CROSS_ENTROPY)
    two = DirectionalNewton(module, CROSS_ENTROPY, params=split(module, [{}, {}]))
    with pytest.raises(ValueError, match="different number of parameter groups"):
        two.load_state_dict(one.state_dict())


def test_a_state_with_other_momentum_goes_on_without():
    module = net()
    one = DirectionalNewton(module, CROSS_ENTROPY, 0.1)
    one.step(*batch())
    two = DirectionalNewton(module, CROSS_ENTROPY, 0.1, momentum=0.9)
    two.load_state_dict(one.state_dict())
    two.step(*batch())
    assert two.state[module[0].weight]["step"] == 2
    one.load_state_dict(two.state_dict())
    one.step(*batch())
    assert one.state[module[0].weight]["step"] == 3


def test_copies_go_on_by_themselves():
    module = net()
    module[0].requires_grad_(False)
    criterion = CRITERIA["monte_carlo"](0)
    optimizer = DirectionalNewton(module, criterion, held_out())
    optimizer.step(*batch())
    module_2, optimizer_2 = copy.deepcopy((module, optimizer))
    alone = copy.deepcopy(optimizer)
    before = everything(module)
    loss = optimizer_2.step(*batch(seed=1))
    assert identical(everything(module), before)
    assert torch.equal(alone.step(*batch(seed=1)), loss)
    assert torch.equal(optimizer.step(*batch(seed=1)), loss)
    assert identical(everything(module_2), everything(module))
    with torch.no_grad():
        module_2[0].weight.mul_(2)  # the copy's own
    X, y = batch()
    assert error(optimizer_2.step(X, y), CROSS_ENTROPY(module(X), y)) > 1e-3


def test_torch_itself_does_not_copy_an_optimizer_of_closures():
    """A copy of L-BFGS fails when it is used."""
    module = net()
    lbfgs = torch.optim.LBFGS(module.parameters())
    with pytest.raises(AttributeError, match="_params"):
        copy.deepcopy(lbfgs).step(lambda: CROSS_ENTROPY(module(batch()[0]), batch()[1]))
