"""Models of transformers as they are: with attention masks, and the attention they come with.

They look at the values of a mask for a shortcut, unless they are traced without values.
"""

import re

import pytest
import torch
from torch import nn

from ddnewton import newton_step, prepare
from tests.linearize.layer_cases import TOLERANCE
from tests.linearize.transformers_zoo import MODELS, Exact, language_problem
from tests.methods import DTYPES, FLOAT32, FLOAT64
from tests.models import Problem
from tests.reference import dense, error, solve

ROUND_INSIDE = {"Llama", "Qwen2", "Mistral", "Gemma", "T5"}
"""Their norms are in float32 whatever the model is in; with eager attention its softmax too."""


def directly(prepared) -> set[str]:
    """The operations for whose sake parameters are differentiated directly."""
    return set(re.findall(r"directly \(no rule for (.*?)\)", repr(prepared)))


def exact_step(net: nn.Module, name: str, given: Problem) -> torch.Tensor:
    """The dense step on the same batch, in float64, without roundings inside."""
    model_fn, params, *_ = language_problem(net, name, FLOAT64)
    with Exact():
        return solve(dense(model_fn, params, *given[2:]), 0.1)


@DTYPES
@pytest.mark.parametrize("name", sorted(set(MODELS) - ROUND_INSIDE))
def test_a_model_with_a_mask_is_traced(name, dtype):
    net = MODELS[name]()
    given = language_problem(net, name, dtype)
    prepared = prepare(*given[:3])
    assert directly(prepared) <= {"native_layer_norm", "cat"}
    expected = exact_step(net, name, given)
    assert error(newton_step(prepared, *given[1:], 0.1), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", sorted(ROUND_INSIDE))
def test_a_model_with_norms_in_float32_is_traced(name):
    net = MODELS[name]()
    given = language_problem(net, name, FLOAT32)
    prepared = prepare(*given[:3])
    assert directly(prepared) <= {"mul"}
    expected = exact_step(net, name, given)
    assert error(newton_step(prepared, *given[1:], 0.1), expected) < TOLERANCE[FLOAT32]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["BERT", "Llama"])
def test_a_trace_holds_for_masks_that_it_has_not_seen(name, attention):
    given = language_problem(MODELS[name](attn_implementation=attention), name, FLOAT32)
    prepared = prepare(*given[:3])
    for masked in (0, 1, 3):
        mask = torch.ones(3, 4, dtype=torch.long)
        mask[:2, 4 - masked :] = 0
        X = given.X | {"attention_mask": mask}
        expected = given.model_fn(given.params, X)
        assert error(prepared(given.params, X), expected) < 1e-6


class Adapted(nn.Module):
    """A layer that is frozen, and the low-rank change of it that is trained."""

    def __init__(self, layer: nn.Linear, rank: int = 2):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + 0.5 * self.up(self.down(x))


@DTYPES
@pytest.mark.parametrize(("name", "layers"), [("BERT", "query|value"), ("T5", r"\.q|\.v")])
def test_low_rank_adapters_are_layers(name, layers, dtype):
    net = MODELS[name]().requires_grad_(False)
    for path, layer in list(net.named_modules()):
        if isinstance(layer, nn.Linear) and re.search(f"({layers})$", path):
            parent, _, last = path.rpartition(".")
            setattr(net.get_submodule(parent), last, Adapted(layer))
    given = language_problem(net, name, dtype)
    prepared = prepare(*given[:3])
    assert len(given.params) in {4, 12}
    assert not directly(prepared)
    expected = exact_step(net, name, given)
    rounds = name in ROUND_INSIDE
    tolerance = TOLERANCE[FLOAT32 if rounds else dtype]
    assert error(newton_step(prepared, *given[1:], 0.1), expected) < tolerance


def test_what_looks_at_values_to_the_end_is_still_refused():
    def branch(p, x):
        y = x @ p["W"]
        return y.sin() if y[0, 0] > -1e9 else y

    with pytest.raises(ValueError, match=r"must be traceable; got .*torch.where"):
        prepare(branch, {"W": torch.ones(3, 2)}, torch.ones(4, 3))


def test_a_shortcut_that_is_wrong_without_values_is_noticed():
    """A model that computes something else when it is traced is not the model."""

    def model_fn(p, x):
        plain = type(x) is torch.Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        values = not isinstance(x, torch._subclasses.FakeTensor)
        if plain and values and x[0, 0] > -1e9:
            return x @ p["W"]
        return 2 * x @ p["W"]

    with pytest.raises(ValueError, match="the trace of model_fn must agree with it"):
        prepare(model_fn, {"W": torch.ones(3, 2)}, torch.ones(4, 3))
