"""Kernels that round another way at every call, as atomic sums on a GPU do, are not refused.

The noise is a few roundings of every output, another at every call, and in the derivatives too.
"""

import itertools

import pytest
import torch
from torch import nn

from ddnewton import (
    Batches,
    directional_newton,
    fit,
    ggn_eigh,
    held_out,
    levenberg_marquardt,
    newton_step,
    prepare,
    top_k,
)
from ddnewton.optim import DirectionalNewton
from tests.methods import DTYPES, FLOAT32
from tests.reference import dense, error, solve

ROUNDINGS = 4
GRAMS = pytest.mark.parametrize("gram", ["auto", "dense", "structured", "free"])
MSE = nn.MSELoss()


def net(p, x):
    return torch.tanh(x @ p["W"] + p["b"]) @ p["V"]


def noisy(roundings=ROUNDINGS):
    """The net with noise of some roundings, in float64 those of float64."""
    calls = itertools.count(1)

    def model_fn(p, x):
        outputs = net(p, x)
        eps = torch.finfo(outputs.dtype).eps
        places = torch.arange(1, outputs[0].numel() + 1, dtype=outputs.dtype)
        noise = (1e4 * next(calls) * places).sin().reshape(outputs.shape[1:])
        return outputs * (1 + roundings * eps * noise)

    return model_fn


def given(dtype):
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    params = {"W": drawn(3, 5), "b": drawn(5), "V": drawn(5, 2)}
    return params, drawn(8, 3), drawn(8, 2), MSE


BOUND = {FLOAT32: 1e-4, torch.float64: 1e-9}


@DTYPES
@GRAMS
@pytest.mark.parametrize("precision", ["auto", "model"])
@pytest.mark.parametrize("prepared", [False, True], ids=["function", "prepared"])
def test_a_step(prepared, precision, gram, dtype):
    problem = given(dtype)
    model_fn = prepare(noisy(), *problem[:2]) if prepared else noisy()
    options = {"gram": gram, "precision": precision, "tol": 1e-10}
    step = newton_step(model_fn, *problem, 0.1, **options)
    bound = 1e-4 if gram == "free" else BOUND[dtype]
    assert error(step, solve(dense(net, *problem), 0.1)) < bound


@DTYPES
@pytest.mark.parametrize("gram", ["auto", "free"])
def test_batches_are_visited_twice(gram, dtype):
    params, X, y, criterion = given(dtype)
    loader = Batches([(X[:3], y[:3]), (X[3:], y[3:])])
    options = {"gram": gram, "select": top_k(3)}
    step = newton_step(noisy(), params, loader, None, criterion, 0.1, **options)
    whole = newton_step(net, params, X, y, criterion, 0.1, **options)
    assert error(step, torch.cat([leaf.reshape(-1) for leaf in whole.values()])) < BOUND[dtype]


@DTYPES
@GRAMS
def test_training(gram, dtype):
    params, X, y, criterion = given(dtype)
    for rule in (None, levenberg_marquardt(), held_out()):
        optimizer = directional_newton(noisy(), criterion, rule, gram=gram)
        current, state = params, optimizer.init(params)
        for _ in range(4):
            current, state, info = optimizer.update(current, state, X, y)
        assert info.loss_after < criterion(net(params, X), y)
    evals, _ = ggn_eigh(noisy(), params, X, y, criterion, select=top_k(2), gram=gram)
    assert evals.isfinite().all()
    assert fit(noisy(), params, X, y, max_updates=3, gram=gram).loss.isfinite()


def test_a_module():
    class Noisy(nn.Linear):
        calls = itertools.count(1)

        def forward(self, x):
            return super().forward(x) * (1 + 4e-7 * torch.tensor(1e4 * next(self.calls)).sin())

    _, X, y, criterion = given(FLOAT32)
    optimizer = DirectionalNewton(Noisy(3, 2), criterion)
    losses = [optimizer.step(X, y) for _ in range(3)]
    assert losses[-1] < losses[0]


@DTYPES
@pytest.mark.parametrize("gram", ["auto", "structured"])
def test_noise_above_the_roundings_is_refused(gram, dtype):
    """As of dropout: the checks tell it from rounding."""
    with pytest.raises(ValueError, match=r"must not depend on another's|must agree with it"):
        newton_step(noisy(1e-2 / torch.finfo(dtype).eps), *given(dtype), 0.1, gram=gram)
