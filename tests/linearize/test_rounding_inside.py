"""Models that cast to fewer digits inside: by hand, as transformers do, or under autocast.

Such a model is judged by the digits that it keeps, its layers are seen through the casts, and what
a float32 model casts to bfloat16 is evaluated in float64, both ways alike.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call

from ddnewton import newton_step, newton_step_and_info, prepare
from ddnewton.linearize.independence import Watch
from ddnewton.linearize.structured.visit import visit
from ddnewton.optim import DirectionalNewton
from tests.linearize.layer_cases import FLOAT32, FLOAT64, Readout, without_a_rule
from tests.linearize.transformers_zoo import MODELS, Exact, language_problem
from tests.models import Problem, normal
from tests.reference import dense, error, solve

BFLOAT16 = torch.bfloat16
WAYS = pytest.mark.parametrize("gram", ["dense", "structured", "auto"])


def attention(p, x):
    """A softmax in float32, as in the eager attention of transformers."""
    scores = (x @ p["W"]) @ x.mT
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(x.dtype)
    return (weights @ x).sum(1) @ p["V"] + p["b"]


def rms_norm(p, x):
    """A norm in float32, as in Llama."""
    h = torch.tanh(x @ p["W"])
    wide = h.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (p["b"][:3] * wide.to(h.dtype)).sum(1) @ p["V"]


def written(p, x):
    """A float32 tensor that is written to."""
    h = torch.zeros(x.shape, dtype=torch.float32)
    h[:, :, :3] = torch.sin(x @ p["W"]).float()
    return (h.to(x.dtype) @ p["V"]).sum(1) + p["b"]


def cast_weights(p, x):
    """Weights in float32 inside a model in float64."""
    h = torch.tanh(x.float() @ p["W"].float())
    return (h @ p["V"].float()).double().sum(1) + p["b"]


ROUNDING = [attention, rms_norm, written, cast_weights]


def rounding_problem(model_fn, n: int = 5, dtype=FLOAT64) -> Problem:
    params = {
        "W": normal(3, 3),
        "V": normal(3, 2),
        "b": normal(3)[: 3 if model_fn is rms_norm else 2],
    }
    X, y = normal(n, 4, 3), normal(n, 2)
    params = {name: p.to(dtype) for name, p in params.items()}
    return Problem(model_fn, params, X.to(dtype), y.to(dtype), nn.MSELoss())


def exact_step(given: Problem, delta: float = 0.1) -> torch.Tensor:
    with Exact():
        return solve(dense(*given), delta)


@WAYS
@pytest.mark.parametrize("model_fn", ROUNDING)
def test_a_float64_model_is_judged_by_its_casts(model_fn, gram):
    for seed in range(3):
        torch.manual_seed(seed)
        given = rounding_problem(model_fn)
        assert error(newton_step(*given, 0.1, gram=gram), exact_step(given)) < 1e-6


@WAYS
@pytest.mark.parametrize("model_fn", ROUNDING)
def test_rounding_inside_is_no_rank(model_fn, gram):
    """Two samples twice: what tells their columns apart is rounding, in float32."""
    given = rounding_problem(model_fn, 2)
    twice = given._replace(X=given.X.repeat(2, 1, 1), y=normal(4, 2).double())
    twice = twice._replace(X=twice.X * torch.tensor([1, 1, 1 + 1e-9, 1 - 1e-9])[:, None, None])
    _, info = newton_step_and_info(*twice, 1e-9, gram=gram)
    assert info.rank <= 4


@WAYS
@pytest.mark.parametrize("model_fn", ROUNDING)
def test_samples_that_mix_are_refused_all_the_same(model_fn, gram):
    given = rounding_problem(lambda p, x: model_fn(p, x - x.mean(0)))
    given = given._replace(params=rounding_problem(model_fn).params)
    with pytest.raises(ValueError, match="output must not depend on another's"):
        newton_step(*given, 0.1, gram=gram)


def test_the_watch_notes_casts_and_nothing_else():
    x = torch.ones(2, 3, dtype=FLOAT64)
    with Watch() as watch:
        (x * torch.ones(3)).to(FLOAT64)
        torch.arange(3).float()
        (x > 0).float()
        assert watch.rounding == 0
        x.float()
        assert watch.rounding == torch.finfo(FLOAT32).eps
        h = torch.zeros(2, 3, dtype=BFLOAT16)
        h[0] = x[0]
        assert watch.rounding == torch.finfo(BFLOAT16).eps


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["ViT", "Gemma", "Llama", "T5"])
def test_float64_models_of_transformers(name, attention):
    net = MODELS[name](attn_implementation=attention)
    given = language_problem(net, name, FLOAT64)
    with Exact():
        expected = solve(dense(*given), 0.1)
    for gram in ("dense", "structured"):
        assert error(newton_step(*given, 0.1, gram=gram), expected) < 1e-5


def test_a_float64_model_that_rounds_inside_is_trained():
    given = rounding_problem(attention)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.ParameterDict({k: nn.Parameter(v) for k, v in given.params.items()})

        def forward(self, x):
            return attention(self.p, x)

    net = Net()
    optimizer = DirectionalNewton(net, given.criterion)
    losses = [float(optimizer.step(given.X, given.y)) for _ in range(4)]
    assert losses == sorted(losses, reverse=True)


# --- autocast ---------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(3, 4), nn.Linear(4, 2)

    def forward(self, X):
        return self.head(self.cell(X[:, 1], self.cell(X[:, 0])))


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, X):
        return self.head(self.attend(X, X, X)[0]).sum(1)


NETS = {
    "linear": lambda: (nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), normal(4, 3)),
    "convolution": lambda: (Readout(nn.Conv2d(2, 3, 2)), normal(3, 2, 4, 4)),
    "transposed": lambda: (Readout(nn.ConvTranspose1d(2, 3, 2)), normal(3, 2, 4)),
    "attention": lambda: (Attentive(), normal(3, 3, 4)),
    "recurrent": lambda: (Recurrent(), normal(4, 2, 3)),
    "tied": lambda: (
        nn.Sequential(layer := nn.Linear(3, 3, bias=False), nn.Tanh(), layer),
        normal(4, 3),
    ),
    "embedding": lambda: (
        nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)),
        torch.randint(0, 5, (4, 2)),
    ),
}


def autocast(net: nn.Module, X, dtype=BFLOAT16) -> tuple[Problem, Problem]:
    """A regression by a net under autocast, and the same without it."""
    net = copy.deepcopy(net).eval()
    params = {name: p.detach() for name, p in net.named_parameters()}

    def plain(p, x):
        return functional_call(net, p, (x,))

    def cast(p, x):
        with torch.autocast("cpu", dtype=dtype):
            return plain(p, x)

    with torch.no_grad():
        y = plain(params, X)
    y = y + torch.arange(y.numel()).sin().reshape(y.shape)
    problems = [Problem(model_fn, params, X, y, nn.MSELoss()) for model_fn in (cast, plain)]
    return problems[0], problems[1]


@pytest.mark.parametrize("name", NETS)
def test_layers_are_found_under_autocast(name):
    given, plain = autocast(*NETS[name]())
    prepared = prepare(*given[:3])
    assert not without_a_rule(prepared), repr(prepared)
    assert error(prepared(*given[1:3]), given.model_fn(*given[1:3])) < 1e-2
    expected = solve(dense(*plain), 0.1)
    for model_fn, gram in ((prepared, "structured"), (given.model_fn, "dense")):
        result = newton_step(model_fn, *given[1:], 0.1, gram=gram)
        assert error(result, expected) < 1e-6


@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float16])
def test_a_large_net_under_autocast_is_evaluated_in_float64(dtype):
    net = nn.Sequential(nn.Linear(200, 64), nn.ReLU(), nn.Linear(64, 10))
    given, plain = autocast(net, normal(40, 200), dtype)
    assert not without_a_rule(prepare(*given[:3]))
    result, info = newton_step_and_info(*given, 0.1)
    expected, plain_info = newton_step_and_info(*plain, 0.1, gram="dense")
    assert error(result, torch.cat([leaf.flatten() for leaf in expected.values()])) < 1e-6
    assert error(info.evals, plain_info.evals) < 1e-6


@pytest.mark.parametrize("name", NETS)
def test_what_cannot_be_widened_multiplies_in_the_dtype_of_its_parameters(name):
    given, plain = autocast(*NETS[name]())
    prepared = replace(prepare(*given[:3]), wide=None)
    leaves, samples = prepared.leaves(*given[1:3])
    visited = visit(prepared.narrow, leaves, samples)
    basis = torch.eye(visited.outputs[0].numel()).expand(len(samples[0]), -1, -1)
    for factor in visited.pullback(basis):
        parts = [factor] if isinstance(factor, torch.Tensor) else [factor.a, factor.b]
        assert all(part.dtype == FLOAT32 for part in parts if part.is_floating_point())
    result = newton_step(prepared, *given[1:], 0.1)
    assert error(result, solve(dense(*plain), 0.1)) < 0.1


@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float16])
def test_casts_by_hand_are_looked_through(dtype):
    def model_fn(p, x):
        h = torch.tanh((x.to(dtype) @ p["W"].T.to(dtype)).float() + p["b"])
        return (h.to(dtype) @ p["V"].to(dtype)[:, :2]).float()

    params = {"W": normal(4, 3), "b": normal(4), "V": normal(4, 3)}
    X, y = normal(5, 3), normal(5, 2)
    prepared = prepare(model_fn, params, X)
    assert not without_a_rule(prepared)

    def plain(p, x):
        return torch.tanh(x @ p["W"].T + p["b"]) @ p["V"][:, :2]

    expected = solve(dense(plain, params, X, y, nn.MSELoss()), 0.1)
    for gram in ("structured", "dense"):
        result = newton_step(model_fn, params, X, y, nn.MSELoss(), 0.1, gram=gram)
        assert error(result, expected) < 1e-6


def test_a_cast_to_integers_is_no_view():
    """It has no derivative: the only use of the weight is the product."""

    def model_fn(p, x):
        return x @ p["W"] + p["W"][0].long()

    params, X, y = {"W": 3 * normal(3, 2)}, normal(4, 3), normal(4, 2)
    prepared = prepare(model_fn, params, X)
    assert "['W']: mm" in repr(prepared)
    expected = solve(dense(model_fn, params, X, y, nn.MSELoss()), 0.1)
    assert error(newton_step(prepared, params, X, y, nn.MSELoss(), 0.1), expected) < 1e-6


def test_a_step_inside_autocast_computes_its_own_products_without():
    net = nn.Sequential(nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    _, plain = autocast(net, normal(100, 300))  # so large that it is evaluated in float32
    prepared = prepare(*plain[:3])
    expected = newton_step(prepared, *plain[1:], 1.0)
    with torch.autocast("cpu", dtype=BFLOAT16):
        result = newton_step(prepared, *plain[1:], 1.0)
    assert error(result, torch.cat([leaf.flatten() for leaf in expected.values()])) < 1e-6
