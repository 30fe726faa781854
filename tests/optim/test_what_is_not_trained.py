"""Frozen parameters, buffers, flags and modes of a module are left as they are."""

import copy

import pytest
import torch
from torch import nn

from ddnewton import held_out, levenberg_marquardt, monte_carlo
from ddnewton.optim import DirectionalNewton
from tests.methods import DTYPES
from tests.optim.twins import CROSS_ENTROPY, Twin, batch, everything, identical, net, normed, split
from tests.reference import error

pytestmark = pytest.mark.usefixtures("layers_found_once")


# --- what is not trained ----------------------------------------------------------------------


def test_frozen_parameters_stay_also_where_a_group_has_them():
    module, alone = net(), net()
    for each in (module, alone):
        each[0].requires_grad_(False)
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, held_out(), params=module.parameters())
    other = DirectionalNewton(alone, CROSS_ENTROPY, held_out())
    for t in range(3):
        optimizer.step(*batch(seed=t))
        other.step(*batch(seed=t))
    assert identical(everything(module), everything(alone))
    assert torch.equal(module[0].weight, net()[0].weight)
    assert not module[0].weight.requires_grad


def test_freezing_and_thawing_between_steps():
    module = net()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, momentum=0.5)
    optimizer.step(*batch())
    module[0].requires_grad_(False)
    before = everything(module)
    twin = Twin(module, damping=levenberg_marquardt(optimizer.state[module[0].weight]["control"]))
    assert set(twin.params) == {"2.weight", "2.bias", "4.weight", "4.bias"}
    optimizer.step(*batch(seed=1))
    after = everything(module)
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert not torch.equal(after["2.weight"], before["2.weight"])
    assert "previous" not in optimizer.state[module[0].weight]
    module[0].requires_grad_(True)
    optimizer.step(*batch(seed=2))
    assert not torch.equal(module[0].weight, before["0.weight"])


def test_a_whole_group_may_be_frozen():
    module = net()
    module[0].requires_grad_(False)
    module[2].requires_grad_(False)
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, params=split(module, [{}, {}]))
    first, last = optimizer.step(*batch()), optimizer.step(*batch())
    assert last < first
    assert torch.equal(module[0].weight, net()[0].weight)


@DTYPES
def test_buffers_and_parameters_in_no_group_are_untouched(dtype):
    module = normed(dtype)
    before = everything(module)
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, params=module[3].parameters())
    losses = [optimizer.step(*batch(dtype=dtype)) for _ in range(4)]
    assert losses[-1] < losses[0]
    for name, value in everything(module).items():
        assert torch.equal(value, before[name]) == (not name.startswith("3."))


def test_parameters_keep_identity_flags_and_gradients():
    module = net()
    module[2].bias.grad = torch.full_like(module[2].bias, 7.0)
    before = {name: (id(p), p.data_ptr(), p.stride()) for name, p in module.named_parameters()}
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, held_out())
    for t in range(2):
        optimizer.step(*batch(seed=t))
    after = {name: (id(p), p.data_ptr(), p.stride()) for name, p in module.named_parameters()}
    assert after == before
    assert all(p.requires_grad and p.is_leaf for p in module.parameters())
    assert (module[2].bias.grad == 7).all()
    assert all(p.grad is None for p in module.parameters() if p is not module[2].bias)
    optimizer.zero_grad()
    assert module[2].bias.grad is None


def test_the_random_state_is_untouched():
    optimizer = DirectionalNewton(net(), CROSS_ENTROPY)
    before = torch.get_rng_state()
    optimizer.step(*batch())
    assert torch.equal(torch.get_rng_state(), before)


# --- modes ------------------------------------------------------------------------------------


class Dropping(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 3))
        self.double()


MIXING = {
    "BatchNorm1d '1'": normed,
    "Dropout '1'": Dropping,
}


@pytest.mark.parametrize("gram", ["auto", "dense"])
@pytest.mark.parametrize("culprit", MIXING)
def test_train_mode_is_refused_by_name_and_nothing_changes(culprit, gram):
    module = MIXING[culprit]().eval()
    generator = torch.Generator().manual_seed(0)
    criterion = monte_carlo(CROSS_ENTROPY, 1, generator)
    optimizer = DirectionalNewton(module, criterion, held_out(), gram=gram)
    optimizer.step(*batch())
    before, state = everything(module), copy.deepcopy(optimizer.state_dict())
    info, random = optimizer.info, torch.get_rng_state()
    module.train()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"in {culprit}.*Call .eval\\(\\)"):
            optimizer.step(*batch(seed=1))
    assert identical(everything(module), before)
    assert str(optimizer.state_dict()) == str(state)
    assert torch.equal(generator.get_state(), state["generator"])
    assert torch.equal(torch.get_rng_state(), random)
    assert optimizer.info is info
    module.eval()
    fresh = copy.deepcopy(module)
    again = monte_carlo(CROSS_ENTROPY, 1, torch.Generator())
    other = DirectionalNewton(fresh, again, held_out(), gram=gram)
    other.load_state_dict(state)
    optimizer.step(*batch(seed=1))
    other.step(*batch(seed=1))
    assert identical(everything(module), everything(fresh))


def test_train_mode_without_layers_that_mix_is_fine():
    module = net().train()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY)
    first = optimizer.step(*batch())
    module.eval()
    assert optimizer.step(*batch()) < first


def test_statistics_of_batch_norm_may_be_updated_between_steps():
    module = normed()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY)
    for t in range(3):
        X, y = batch(seed=t)
        module.train()
        with torch.no_grad():
            module(X + t)
        module.eval()
        expected = CROSS_ENTROPY(module(X), y)
        assert error(optimizer.step(X, y), expected) < 1e-12
