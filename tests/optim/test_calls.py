"""Every way to hand over a batch, the modes and hooks around a step, and plain loops."""

import copy
import re
from itertools import pairwise

import pytest
import torch
from torch.optim import lr_scheduler

from ddnewton import held_out
from ddnewton.optim import DirectionalNewton
from tests.methods import DTYPES, FLOAT32
from tests.models import Block
from tests.optim.twins import (
    CROSS_ENTROPY,
    batch,
    everything,
    identical,
    net,
    normed,
    parameters,
    saved,
    split,
)
from tests.reference import error

pytestmark = pytest.mark.usefixtures("layers_found_once")


# --- calls ------------------------------------------------------------------------------------


def calls(optimizer, X, y):
    """Every way to hand over a batch."""
    return {
        "step(X, y)": lambda: optimizer.step(X, y),
        "step(X=, y=)": lambda: optimizer.step(X=X, y=y),
        "step(X, y=)": lambda: optimizer.step(X, y=y),
        "step(closure)": lambda: optimizer.step(lambda: (X, y)),
        "step(closure=)": lambda: optimizer.step(closure=lambda: (X, y)),
        "a list": lambda: optimizer.step(closure=lambda: [X, y]),
        "all three": lambda: optimizer.step(X=X, y=y, closure=lambda: None),
    }


@pytest.mark.parametrize("way", calls(None, None, None))
def test_ways_to_hand_over_a_batch(way):
    module, expected = net(), net()
    X, y = batch()
    loss = DirectionalNewton(expected, CROSS_ENTROPY).step(X, y)
    assert torch.equal(calls(DirectionalNewton(module, CROSS_ENTROPY), X, y)[way](), loss)
    assert identical(everything(module), everything(expected))


def test_a_closure_beside_a_batch_is_called_once_before_the_step():
    module, seen = net(), []
    before = module[0].weight.detach().clone()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY)
    closure = lambda: seen.append(torch.equal(module[0].weight, before))  # noqa: E731
    optimizer.step(X=batch()[0], y=batch()[1], closure=closure)
    assert seen == [True]


@DTYPES
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_of_autograd_around_a_step(mode, dtype):
    def build():
        module = normed(dtype)
        module[0].requires_grad_(False)
        return module

    module, expected = build(), build()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, held_out())
    other = DirectionalNewton(expected, CROSS_ENTROPY, held_out())
    for t in range(3):
        X, y = batch(dtype=dtype, seed=t)
        with mode() if t != 1 else torch.enable_grad():
            optimizer.step(X.clone(), y.clone())
        other.step(X, y)
        assert error(parameters(module), parameters(expected)) < 1e-6
    assert not any(p.is_inference() for p in module.parameters())
    CROSS_ENTROPY(module(batch(dtype=dtype)[0]), batch()[1]).backward()
    saved(optimizer.state_dict())
    copy.deepcopy(optimizer)


def test_batches_made_in_inference_mode():
    module, expected = net(), net()
    with torch.inference_mode():
        X, y = batch()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY)
    assert torch.equal(
        optimizer.step(X, y), DirectionalNewton(expected, CROSS_ENTROPY).step(*batch())
    )


def test_beside_an_optimizer_of_gradients():
    """One trains the body by gradients, the other the head."""
    module = net()
    head = DirectionalNewton(module, CROSS_ENTROPY, params=module[4].parameters())
    body = torch.optim.SGD(module[0].parameters(), lr=0.1)
    for t in range(3):
        X, y = batch(seed=t)
        body.zero_grad()
        loss = CROSS_ENTROPY(module(X), y)
        loss.backward()
        body.step()
        now = CROSS_ENTROPY(module(X), y)
        gradient = module[4].weight.grad.clone()
        assert error(head.step(X, y), now) < 1e-12
        assert torch.equal(module[4].weight.grad, gradient)


def test_hooks_are_called():
    module, seen = net(), []
    optimizer = DirectionalNewton(module, CROSS_ENTROPY)
    optimizer.register_step_pre_hook(lambda *given: seen.append(("pre", *given)))
    handle = optimizer.register_step_post_hook(lambda *given: seen.append(("post", *given)))
    X, y = batch()
    optimizer.step(X, y=y)
    assert [(when, who) for when, who, *_ in seen] == [("pre", optimizer), ("post", optimizer)]
    assert seen[0][2][1] is X
    assert seen[0][3]["y"] is y
    handle.remove()
    optimizer.step(X, y)
    assert [when for when, *_ in seen] == ["pre", "post", "pre"]


def test_repr_shows_the_groups():
    module = net()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, params=split(module, [{"lr": 0.5}, {}]))
    groups = [
        rf"Parameter Group {number}\s+lr: {lr}\s+weight_decay: 0.0\s*"
        for number, lr in enumerate((0.5, 1.0))
    ]
    assert re.fullmatch(rf"DirectionalNewton \(\s*{''.join(groups)}\)", repr(optimizer))


def test_named_parameters_are_parameters():
    module, expected = net(), net()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, params=module.named_parameters())
    assert torch.equal(
        optimizer.step(*batch()), DirectionalNewton(expected, CROSS_ENTROPY).step(*batch())
    )
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == list(parameters(module))


# --- the plain loop ---------------------------------------------------------------------------


def test_a_loop_over_a_loader():
    torch.manual_seed(0)
    X, y = batch(96, FLOAT32)
    data = torch.utils.data.TensorDataset(X, y)
    loader = torch.utils.data.DataLoader(data, batch_size=40, shuffle=True)
    module = net(FLOAT32)
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, held_out())
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.99)
    for _ in range(6):
        for inputs, targets in loader:
            optimizer.zero_grad()
            optimizer.step(inputs, targets)
            schedule.step()
        batches = iter(loader)
        optimizer.step(closure=lambda batches=batches: next(batches))
    assert (module(X).argmax(1) == y).double().mean() > 0.9


def test_a_batch_of_dicts_and_a_mask():
    """A transformer block on dicts of token ids and masks, its embedding tied to its output."""
    torch.manual_seed(0)
    module = Block()
    tokens = torch.randint(1, 7, (12, 5))
    tokens[::3, 3:] = 0
    X, y = {"tokens": tokens, "mask": tokens > 0}, tokens[:, 0]
    optimizer = DirectionalNewton(module, CROSS_ENTROPY)
    losses = [optimizer.step(X, y) for _ in range(16)]
    assert losses[-1] < 0.5 * losses[0]
    assert all(after <= before for before, after in pairwise(losses))
