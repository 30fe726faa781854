"""The layers of a module are searched for where that takes less time than it saves."""

import pytest
import torch
from torch import nn

import ddnewton.optim.modules
from ddnewton import prepare
from ddnewton.optim import DirectionalNewton

UPDATES = 3


@pytest.fixture
def traces(monkeypatch):
    """The shapes of a sample that layers were searched for."""
    shapes = []

    def counted(model_fn, params, X):
        shapes.append(tuple(X.shape[1:]))
        return prepare(model_fn, params, X)

    monkeypatch.setattr(ddnewton.optim.modules, "prepare", counted)
    monkeypatch.setattr(ddnewton.optim.modules, "UPDATES_TO_TRACE", UPDATES)
    return shapes


def recurrence():
    """A model of any number of steps, each with the same few parameters."""

    class Recurrence(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, X):
            state = torch.zeros_like(X[:, 0])
            for t in range(X.shape[1]):
                state = torch.tanh(self.layer(state) + X[:, t])
            return state

    torch.manual_seed(0)
    return Recurrence().double()


def data(steps, n=4):
    generator = torch.Generator().manual_seed(steps)
    X = torch.randn(n, steps, 2, generator=generator, dtype=torch.float64)
    return X, X.mean(1)


def test_a_tiny_problem_goes_without_until_a_trace_would_have_paid(traces):
    waiting = DirectionalNewton(recurrence(), nn.MSELoss())
    before = []
    for t in range(UPDATES + 2):
        before.append(waiting.step(*data(5)))
        assert traces == ([] if t < UPDATES else [(5, 2)])
    structured = DirectionalNewton(recurrence(), nn.MSELoss(), gram="structured")
    after = [structured.step(*data(5)) for _ in range(UPDATES + 2)]
    torch.testing.assert_close(before, after, rtol=1e-9, atol=0)
    assert len(traces) == 2


def test_every_length_waits_for_itself(traces):
    optimizer = DirectionalNewton(recurrence(), nn.MSELoss())
    for _ in range(UPDATES + 1):
        for steps in (3, 4):
            optimizer.step(*data(steps))
    assert traces == [(3, 2), (4, 2)]
    optimizer.step(*data(3))
    optimizer.step(*data(4))
    assert len(traces) == 2


def test_a_length_that_comes_once_is_not_traced(traces):
    optimizer = DirectionalNewton(recurrence(), nn.MSELoss())
    for steps in range(2, 8):
        optimizer.step(*data(steps))
    assert not traces


def test_larger_problems_are_traced_in_the_first_update(traces, monkeypatch):
    monkeypatch.setattr("ddnewton.linearize.structured.costs.TINY_FLOPS", 0)
    optimizer = DirectionalNewton(recurrence(), nn.MSELoss())
    optimizer.step(*data(3))
    assert traces == [(3, 2)]
    # For another length a trace takes longer than many of these dense steps.
    optimizer.step(*data(4))
    assert traces == [(3, 2)]
    # Unless dense steps take as long as it does.
    monkeypatch.setattr(ddnewton.optim.modules, "FLOPS_OF_NODE", 0)
    optimizer.step(*data(5))
    assert traces == [(3, 2), (5, 2)]


def test_traces_of_a_few_lengths_are_kept_and_none_of_a_module_that_has_changed(traces):
    module = recurrence()
    module.register_buffer("shift", torch.zeros(2, dtype=torch.float64))
    optimizer = DirectionalNewton(module, nn.MSELoss())
    for steps in range(1, 8):
        optimizer.step(*data(steps))
    assert len(optimizer._traced[None]) == ddnewton.optim.modules.TRACES_KEPT
    module.shift += 1
    optimizer.step(*data(7))
    assert len(optimizer._traced[None]) == 1
