"""Models that cannot be traced, that mix samples, or that are too small to be traced."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from ddnewton import as_function, newton_step, prepare
from tests.methods import FLOAT32
from tests.models import PROBLEMS, Problem, normal, problem
from tests.reference import Dense, error, flat, solve


class StraightThrough(torch.autograd.Function):
    """Rounds, and says that it does not."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad


def branch(p, x):
    y = x @ p["W"]
    return y.sin() if y[0, 0] > -1e9 else y


def item(p, x):
    return (x @ p["W"]).sin() * (1 + (x.abs().max() > -1).item())


def straight_through(p, x):
    return StraightThrough.apply(3 * x @ p["W"])


UNTRACEABLE = {
    branch: "model_fn must be traceable; got .*torch.where",
    item: "model_fn must be traceable; got .*leave tensors tensors",
    straight_through: "the trace of model_fn must agree with it; got .*autograd.Function",
}


SAID = {branch: "torch.where", item: "leave tensors tensors", straight_through: "autograd.Function"}

SCRIPT = """
import torch
from ddnewton import newton_step

def model_fn(p, x):
    y = x @ p
    return y.sin() if y[0, 0] > -1e9 else y

W, X, y = torch.randn(600, 4), torch.randn(200, 600), torch.randn(200, 4)
for _ in range(3):
    newton_step(model_fn, W, X, y, torch.nn.MSELoss(), 0.1)
"""


def untraceable(model_fn, n: int = 4, d: int = 3) -> Problem:
    params = {"W": normal(d, 4, scale=d**-0.5).double()}
    X, y = normal(n, d).double(), normal(n, 4).double()
    return Problem(model_fn, params, X, y, nn.MSELoss())


@pytest.mark.parametrize("model_fn", UNTRACEABLE)
def test_what_cannot_be_traced_is_refused(model_fn):
    given = untraceable(model_fn)
    with pytest.raises(ValueError, match=f"newton_step: {UNTRACEABLE[model_fn]}"):
        newton_step(*given, 0.1, gram="structured")
    with pytest.raises(ValueError, match=f"prepare: {UNTRACEABLE[model_fn]}"):
        prepare(*given[:3])


@pytest.mark.parametrize("model_fn", UNTRACEABLE)
def test_what_cannot_be_traced_goes_dense_and_says_so(model_fn):
    given = untraceable(model_fn, n=100, d=1200)  # 1.5 GFLOP: not tiny
    expected = newton_step(*given, 0.1, gram="dense")
    with pytest.warns(UserWarning, match=f"the slow way, by dense Jacobians: .*{SAID[model_fn]}"):
        result = newton_step(*given, 0.1)
    assert torch.equal(flat(result), flat(expected))


def test_the_warning_points_at_the_call_and_comes_once_a_line(tmp_path):
    """By a script of its own: the wrappers that check shapes in the tests are calls too."""
    script = tmp_path / "slow.py"
    script.write_text(SCRIPT)
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True
    )
    warned = [line for line in result.stderr.splitlines() if "the slow way" in line]
    assert [line.split(": UserWarning")[0] for line in warned] == [f"{script}:11"]


def test_a_straight_through_estimate_is_what_it_says():
    """The dense path believes a backward of the model's own; so does who falls back to it."""
    given = untraceable(straight_through)
    J = 3 * given.X[:, :, None, None] * torch.eye(4).double()  # [N, D / 4, 4, 4]
    J = J.flatten(1, 2).mT
    outputs = given.model_fn(given.params, given.X)
    truth = Dense(
        loss=(outputs - given.y).square().mean(),
        jacobians=J,
        slopes=2 * (outputs - given.y) / 4,
        hessians=torch.eye(4).double().expand(4, 4, 4) / 2,
    )
    assert error(newton_step(*given, 0.1), solve(truth, 0.1)) < 1e-12


def centred(p, x):
    return torch.tanh((x - x.mean(0)) @ p["W"])


def neighbours(p, x):
    """Sees the sample before it, which one sample alone does not have."""
    return torch.tanh(x @ p["W"]) * (1 + x.roll(1, 0)[:, :1])


@pytest.mark.parametrize("gram", ["structured", "dense", "auto"])
@pytest.mark.parametrize("n", [4, 100])
@pytest.mark.parametrize("model_fn", [centred, neighbours])
def test_samples_that_mix_are_refused(model_fn, n, gram):
    given = untraceable(model_fn, n=n, d=3 if n == 4 else 1200)
    with pytest.raises(ValueError, match="output must not depend on another's"):
        newton_step(*given, 0.1, gram=gram)


@pytest.mark.parametrize("gram", ["structured", "dense", "auto"])
def test_batch_normalisation_in_train_mode_is_refused_by_name(gram):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).train()
    given = untraceable(lambda p, x: functional_call(net, p, (x.float(),)))
    given = given._replace(params=dict(net.named_parameters()), y=given.y.float())
    with pytest.raises(ValueError, match=r"batch_norm\) in train mode.* in BatchNorm1d '1'"):
        newton_step(*given, 0.1, gram=gram)


def count_traces(monkeypatch) -> list:
    """A list that grows with every model that is traced."""
    from ddnewton.linearize.structured import prepare

    traced, trace = [], prepare.trace
    monkeypatch.setattr(prepare, "trace", lambda *args: traced.append(1) or trace(*args))
    return traced


def test_tiny_problems_are_not_traced(monkeypatch):
    traced = count_traces(monkeypatch)
    for name in PROBLEMS:
        newton_step(*problem(name, FLOAT32), 0.1)
    assert not traced


def test_larger_problems_are_traced(monkeypatch):
    traced = count_traces(monkeypatch)
    given = untraceable(lambda p, x: x @ p["W"], n=100, d=1200)
    expected = newton_step(*given, 0.1, gram="dense")
    assert not traced
    assert error(newton_step(*given, 0.1), expected) < 1e-11
    assert len(traced) == 1


def test_torch_does_not_warn_of_loops_over_samples():
    """An embedding bag has no batching rule: `vmap` loops over the samples, and says so."""
    net = nn.Sequential(nn.EmbeddingBag(7, 3), nn.Linear(3, 1))
    model_fn, params = as_function(net)
    X, y = torch.arange(12).reshape(4, 3) % 7, torch.ones(4, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        newton_step(model_fn, params, X, y, nn.MSELoss(), 0.1)
    assert not caught
    # What the caller maps, torch still warns of.
    with pytest.warns(UserWarning, match="performance drop"):
        vmap(lambda x: net(x[None]))(X)
