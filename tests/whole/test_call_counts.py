"""How many calls of torch a prepared step or update makes, and how many values the host reads.

On a GPU every read waits for all that was asked for before; values are read here as they are there.
Calls are bounded some percent above what they were when the table was last written, since versions
of torch differ by a few; reads are exact. Where a change needs fewer, write the smaller number
down; where it needs more, say why.
"""

from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.func import functional_call

from benchmarks import nets
from benchmarks.gradient_steps import counted
from ddnewton import (
    Group,
    directional_newton,
    held_out,
    host_reads,
    levenberg_marquardt,
    monte_carlo,
    newton_step,
    prepare,
    top_k,
    trust_region,
)
from ddnewton.damping import signal_to_noise
from ddnewton.quadratic.matrix_free import ways

N = 12


class Path(NamedTuple):
    """What a step or an update is asked for with, and its calls and reads."""

    calls: int  # at most
    reads: int
    options: dict
    draws: bool = False


STEPS = {
    "one δ": Path(380, 1, {"damping": 0.1}),
    "top_k": Path(460, 1, {"damping": 0.1, "select": top_k(5)}),
    "a rule": Path(485, 2, {"damping": signal_to_noise()}),
    "Monte-Carlo": Path(510, 2, {"damping": 0.1, "complement": 0.1}, draws=True),
    "groups": Path(490, 1, {"damping": 0.1, "groups": [Group("0"), Group("2")]}),
    "dense": Path(625, 1, {"damping": 0.1, "gram": "dense"}),
    "free": Path(850, 24, {"damping": 0.1, "gram": "free"}),
}
UPDATES = {
    "levenberg_marquardt": Path(670, 13, {"damping": levenberg_marquardt(0.1, down=2.0)}),
    "trust_region": Path(835, 13, {"damping": trust_region()}),
    "held_out": Path(825, 3, {"damping": held_out(every=3), "complement": "damping"}, draws=True),
    "held_out, with a choice": Path(
        1620, 3, {"damping": held_out(every=1), "complement": "damping"}, draws=True
    ),
}


class Batch(NamedTuple):
    """A prepared net, and a batch of it."""

    model_fn: object
    params: dict
    X: torch.Tensor
    y: torch.Tensor


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(0)
    net = nets.mlp(20, 16, 5)
    params = {name: p.detach() for name, p in net.named_parameters()}
    X, y = torch.randn(N, 20), torch.randint(5, (N,))

    def model_fn(params, X):
        return functional_call(net, params, (X,))

    return Batch(prepare(model_fn, params, X), params, X, y)


def criterion_of(path):
    """Return cross-entropy, with curvature from one draw a sample where the path asks for that."""
    loss = nn.CrossEntropyLoss()
    return monte_carlo(loss, 1, torch.Generator().manual_seed(0)) if path.draws else loss


@pytest.fixture(autouse=True)
def read_as_on_a_device(monkeypatch):
    monkeypatch.setattr(ways, "read_once", lambda call, device: host_reads.with_one_read(call))


def check(counts, path):
    """Require as many reads as a path has, and no more calls; by products it iterates."""
    assert counts.calls <= path.calls
    assert counts.reads == path.reads or path.options.get("gram") == "free"
    assert counts.reads <= path.reads + path.reads // 10


@pytest.mark.parametrize("name", STEPS)
def test_calls_of_a_step(name, batch):
    path = STEPS[name]
    criterion = criterion_of(path)

    def step():
        return newton_step(*batch, criterion, **path.options)

    step()  # the first one may find out what the next ones know
    check(counted(step), path)


@pytest.mark.parametrize("name", UPDATES)
def test_calls_of_an_update(name, batch):
    path = UPDATES[name]
    model_fn, params, X, y = batch
    optimizer = directional_newton(model_fn, criterion_of(path), **path.options)
    state = optimizer.init(params)
    params, state, _ = optimizer.update(params, state, X, y)
    infos = []

    def update():
        infos.append(optimizer.update(params, state, X, y)[2])

    check(counted(update), path)
    # One trial, so that the counts are those of an update as most are.
    assert int(infos[0].attempts) == 1
    assert bool(infos[0].accepted)
