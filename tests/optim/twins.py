"""A module in training beside the functional optimizer on a copy of its parameters."""

import copy
import io
from functools import cache, partial

import torch
from torch import nn
from torch.func import functional_call

from ddnewton import (
    directional_newton,
    prepare,
    top_k,
)
from tests.methods import ADAPTATIONS, CURVATURES, FLOAT32, FLOAT64, SPELLINGS
from tests.models import problem

CROSS_ENTROPY = nn.CrossEntropyLoss()


def net(dtype=FLOAT64) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)
    ).to(dtype)


@cache
def layers(dtype):
    """What `prepare` finds in this net, whatever its parameters are."""
    module, X = net(dtype), batch(dtype=dtype)[0]
    return prepare(lambda params, X: functional_call(module, params, (X,)), parameters(module), X)


def batch(count=12, dtype=FLOAT64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(count, 3, generator=generator).to(dtype)
    return X, (X.double() @ torch.tensor([[1.0, 0, -1]] * 3).double().triu()).argmax(1)


def parameters(module) -> dict:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def everything(module) -> dict:
    return {name: value.clone() for name, value in module.state_dict().items()}


def identical(one, other) -> bool:
    """Dicts of the same tensors, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def same(one, other) -> bool:
    """Records of tensors, bit for bit; nan is nan."""
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, other, strict=True))


class Twin:
    """The functional optimizer, on a copy of the parameters of a module."""

    def __init__(self, module, criterion=CROSS_ENTROPY, damping=None, *, layers=None, **options):
        module = copy.deepcopy(module)
        self.params = parameters(module)

        def model_fn(params, X):
            return functional_call(module, params, (X,))

        self.optimizer = directional_newton(layers or model_fn, criterion, damping, **options)
        self.state = self.optimizer.init(self.params)

    def step(self, X, y):
        self.params, self.state, info = self.optimizer.update(self.params, self.state, X, y)
        return info


DAMPINGS = {name: one.make for name, one in ADAPTATIONS.items()} | SPELLINGS
OPTIONS = {
    "momentum": {"momentum": 0.7},
    "exact momentum": {"momentum": "exact"},
    "weight decay": {"weight_decay": 0.05},
    "momentum and weight decay": {"momentum": 0.5, "weight_decay": 0.01},
    "trust radius": {"trust_radius": 0.05},
    "select": {"select": top_k(4)},
    "complement": {"select": top_k(2), "complement": "damping"},
    "complement number": {"select": top_k(2), "complement": 0.5},
    "chunks": {"chunk_size": 7},
    "dense": {"gram": "dense"},
    "structured": {"gram": "structured"},
}
KINDS = [(name, "plain") for name in DAMPINGS] + [("held_out", option) for option in OPTIONS]
KINDS += [("levenberg_marquardt", option) for option in ("momentum", "trust radius")]
IN_BOTH = [(*kind, FLOAT64) for kind in KINDS] + [(name, "plain", FLOAT32) for name in DAMPINGS]


def split(module, rules):
    """The last layer, and the others: not in the module's order."""
    layers = [list(module[4].parameters()), [*module[0].parameters(), *module[2].parameters()]]
    return [{"params": params} | rule for params, rule in zip(layers, rules, strict=True)]


def normed(dtype=FLOAT64) -> nn.Sequential:
    torch.manual_seed(2)
    norm = nn.BatchNorm1d(4)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, 3)).to(dtype).eval()


def module_of(name: str) -> nn.Module:
    return problem(name).model_fn.__closure__[0].cell_contents


def saved(tree):
    """What a file gives back."""
    file = io.BytesIO()
    torch.save(tree, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


CRITERIA = {name: partial(one.make, CROSS_ENTROPY) for name, one in CURVATURES.items()}
"""What makes each criterion from a seed."""
