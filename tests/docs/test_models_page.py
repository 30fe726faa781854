"""The zoo on the page of models: each of its models, prepared, and a step taken."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import jvp, vmap
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils._pytree import tree_map

from benchmarks.nets import Residual
from ddnewton import as_function, newton_step, prepare
from tests.linearize import autograd_cases, test_derived_weights, test_untraceable
from tests.models import normal, problem

FLOAT64 = torch.float64
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
TABLE = PAGE.read_text().split("## The zoo\n")[1].split("\n## ")[0]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TABLE.splitlines()
    if line.startswith("|")
][2:]
VERDICTS = {model.strip("`"): verdict for _, model, verdict in ROWS}

Arguments = tuple[Callable[..., Any], Any, Any]
"""A function, its parameters, and samples."""


# --- modules of torch ---------------------------------------------------------------------------


def of(net: nn.Module, X, forward=None) -> Arguments:
    """A module in eval mode, in float64."""
    return (*as_function(net.double().eval(), forward), X)


def flat(*layers: nn.Module, of_last: int) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(of_last, 2))


IMAGES, POINTS = normal(3, 2, 4, 4).double(), normal(3, 4).double()
SENTENCES, IDS = normal(3, 3, 4).double(), torch.tensor([[1, 2], [3, 4], [0, 1]])


class Skip(nn.Module):
    """Down, up again, and beside it what was there before."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(2, 3, 2, stride=2)
        self.up = nn.ConvTranspose2d(3, 2, 2, stride=2)
        self.out = nn.Conv2d(4, 1, 1)

    def forward(self, X):
        up = self.up(torch.relu(self.down(X)))
        return self.out(torch.cat([X, torch.tanh(up)], 1)).flatten(1)


class Experts(nn.Module):
    """The mean of three experts by a softmax of their gates."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

    def forward(self, X):
        shares = self.gate(X).softmax(1)
        return sum(shares[:, i : i + 1] * expert(X) for i, expert in enumerate(self.experts))


class Adapted(nn.Module):
    """A layer that is frozen, and the low-rank change of it that is trained."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3).requires_grad_(False)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)

    def forward(self, X):
        return torch.tanh(self.layer(X) + self.up(self.down(X)))


def recurrent(kind: type[nn.RNNBase]) -> Arguments:
    net = kind(4, 3, batch_first=True)
    return of(net, SENTENCES, lambda net, X: net(X)[0][:, -1])


def attention() -> Arguments:
    net = nn.MultiheadAttention(4, 2, batch_first=True)
    return of(net, SENTENCES, lambda net, X: net(X, X, X)[0].sum(1))


def decoder() -> Arguments:
    net = nn.TransformerDecoderLayer(4, 2, 3, batch_first=True)
    return of(net, SENTENCES, lambda net, X: net(X, X.flip(1)).sum(1))


def train_mode(*layers: nn.Module) -> Arguments:
    return (*as_function(nn.Sequential(nn.Linear(4, 3), *layers).double()), POINTS)


# --- functions ----------------------------------------------------------------------------------


def curved() -> Arguments:
    """Second derivatives of a net along its samples, forwards."""
    net, params = as_function(nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double())

    def equation(p, x):
        def slope(x):
            return jvp(lambda x: net(p, x), (x,), (torch.ones_like(x),))[1]

        return jvp(slope, (x,), (torch.ones_like(x),))[1] + torch.sin(x)

    return equation, params, POINTS[:, :1]


def written_in_place(p, X):
    outputs = X.new_zeros(len(X), 2)
    outputs[:, 0] = torch.sin(X @ p["a"])
    outputs[:, 1] += X @ p["b"]
    return outputs


def function(model_fn: Callable[..., Any], *shapes: int | tuple[int, ...]) -> Arguments:
    """A function of parameters W, a or b of given shapes."""
    names = ("W",) if len(shapes) == 1 else ("a", "b")
    params = {name: normal(*shape).double() for name, shape in zip(names, shapes, strict=True)}
    return model_fn, params, POINTS


def derived(name: str) -> Arguments:
    case = test_derived_weights.CASES[name]()
    return case.model, {key: p.double() for key, p in case.params.items()}, case.X.double()


def autograd_case(name: str) -> Arguments:
    return autograd_cases.CASES[name](FLOAT64)[:3]


def hugging_face(name: str) -> Arguments:
    zoo = pytest.importorskip("tests.linearize.transformers_zoo")
    return zoo.language_problem(zoo.MODELS[name](), name, FLOAT64)[:3]


ZOO: dict[str, Callable[[], Arguments]] = {
    "MLP": lambda: problem("relu_mlp")[:3],
    "CNN": lambda: problem("convolution")[:3],
    "ResNet": lambda: of(flat(Residual(2, 3, 2), of_last=12), IMAGES),
    "U-Net": lambda: of(Skip(), IMAGES),
    "GroupNorm": lambda: of(
        flat(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), of_last=16), IMAGES
    ),
    "RMSNorm": lambda: of(nn.Sequential(nn.Linear(4, 3), nn.RMSNorm(3), nn.Linear(3, 2)), POINTS),
    "MultiheadAttention": attention,
    "TransformerEncoderLayer": lambda: problem("encoder_layer")[:3],
    "TransformerDecoderLayer": decoder,
    "language model": lambda: problem("attention")[:3],
    "BERT": lambda: hugging_face("BERT"),
    "Llama": lambda: hugging_face("Llama"),
    "Gemma": lambda: hugging_face("Gemma"),
    "ViT": lambda: hugging_face("ViT"),
    "LoRA": lambda: of(Adapted(), POINTS),
    "experts": lambda: of(Experts(), POINTS),
    "RNN": lambda: recurrent(nn.RNN),
    "LSTM": lambda: recurrent(nn.LSTM),
    "GRU": lambda: recurrent(nn.GRU),
    "packed LSTM": lambda: autograd_case("packed LSTM"),
    "weight_norm": lambda: of(nn.Sequential(weight_norm(nn.Linear(4, 3)), nn.Tanh()), POINTS),
    "spectral_norm": lambda: of(nn.Sequential(spectral_norm(nn.Linear(4, 3)), nn.Tanh()), POINTS),
    "Fourier layer": lambda: derived("a complex weight a mode"),
    "PINN by jvp": curved,
    "PINN by autograd.grad": lambda: autograd_case("physics-informed"),
    "force field": lambda: autograd_case("force field"),
    "inner steps": lambda: autograd_case("inner steps"),
    "checkpoint": lambda: autograd_case("checkpoint"),
    "autograd.Function": lambda: autograd_case("autograd.Function"),
    "straight-through": lambda: function(test_untraceable.straight_through, (4, 2)),
    "custom operator": lambda: autograd_case("torch.library"),
    "TorchScript": lambda: autograd_case("TorchScript"),
    "in place": lambda: function(written_in_place, (4,), (4,)),
    "sparse embedding": lambda: autograd_case("sparse embedding"),
    "sparse samples": lambda: autograd_case("sparse samples"),
    "branching": lambda: function(test_untraceable.branch, (4, 2)),
    "train mode": lambda: train_mode(nn.BatchNorm1d(3)),
    "dropout": lambda: train_mode(nn.Dropout()),
    "mixing": lambda: function(test_untraceable.centred, (4, 2)),
}


def step(model_fn, params, X):
    with torch.no_grad():
        outputs = model_fn(params, X)
    return newton_step(model_fn, params, X, torch.zeros_like(outputs), nn.MSELoss(), 0.1)


def test_the_page_has_the_zoo():
    assert list(VERDICTS) == list(ZOO)


@pytest.mark.parametrize("name", VERDICTS)
def test_a_model_goes_the_way_that_the_page_says(name):
    verdict, arguments = VERDICTS[name], ZOO[name]()
    if reason := re.fullmatch('refused: "(.*)"', verdict):
        with pytest.raises(ValueError, match=re.escape(reason[1])):
            step(*arguments)
        return
    if verdict.startswith("dense"):
        with pytest.raises(ValueError, match=r"traceable|the trace of model_fn must agree"):
            prepare(*arguments)
        assert maps_over_samples(*arguments) == (verdict == "dense")
        step(*arguments)
        return
    # A line for each parameter: the operations that it is seen through, or that have no rule.
    prepared = prepare(*arguments)
    paths = re.findall(r"^  .*?: (.*)$", repr(prepared), re.MULTILINE)
    direct = [re.findall(r"directly \(no rule for (.*)\)", path) for path in paths]
    assert {op for ops in direct for op in ops} == set(re.findall("`(.*?)`", verdict))
    assert (verdict.split(" (")[0], all(direct)) in {
        ("all", False),
        ("all but", False),
        ("none", True),
    }
    step(prepared, *arguments[1:])


def maps_over_samples(model_fn, params, X) -> bool:
    """Whether torch.func takes the model sample by sample."""
    try:
        vmap(lambda x: model_fn(params, tree_map(lambda x: x[None], x)))(X)
    except (RuntimeError, ValueError, AttributeError):
        return False
    return True
