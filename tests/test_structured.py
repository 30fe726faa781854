"""Steps by the layers of a model: every rule and option, against Jacobians and the textbook."""

import copy
import logging
import os
import re
import subprocess
import sys
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.nn.utils.parametrizations import weight_norm

from ddnewton import above, newton_step, newton_step_and_info, prepare, top_k
from ddnewton.columns.contraction import inner
from ddnewton.columns.factors import Outer, dense_columns, inner_products, weighted_sums
from models import PROBLEMS, Problem, cast, normal, problem
from reference import Dense, clusters, dense, directions, error, flat, solve, step

FLOAT32, FLOAT64 = torch.float32, torch.float64
DTYPES = pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=["float32", "float64"])
TOLERANCE = {FLOAT32: 1e-6, FLOAT64: 1e-10}
"""Small problems are evaluated in float64 and rounded once, whatever their dtype."""


class Case(NamedTuple):
    """A module, or a function with a dict of parameters; and which of them may have no rule."""

    model: Any
    X: Any
    params: Any = None
    direct: tuple[str, ...] = ()


def with_targets(case: Case, dtype: torch.dtype) -> Problem:
    """A regression of targets near a case's outputs; the same numbers in any dtype."""
    if isinstance(case.model, nn.Module):
        module = copy.deepcopy(case.model).to(dtype).eval()
        params = {name: p.detach() for name, p in module.named_parameters()}

        def model_fn(params, X):
            return functional_call(module, params, (X,))
    else:
        model_fn, params = case.model, cast(case.params, dtype)
    X = cast(case.X, dtype)
    with torch.no_grad():
        outputs = model_fn(params, X)
    shift = torch.arange(outputs.numel()).sin().reshape(outputs.shape)
    return Problem(model_fn, params, X, outputs + shift.to(dtype), nn.MSELoss())


def without_a_rule(prepared) -> set[str]:
    """The parameters that a prepared model differentiates directly."""
    return set(re.findall(r"\['(.*?)'\]: directly", repr(prepared)))


def check(case: Case, dtype: torch.dtype) -> None:
    """See that the rules are used, and that they are right."""
    problem = with_targets(case, dtype)
    prepared = prepare(*problem[:3])
    assert without_a_rule(prepared) <= set(case.direct), repr(prepared)
    exact = with_targets(case, FLOAT64)._replace(y=problem.y)
    compare(prepared, problem, dense(*exact), TOLERANCE[dtype])


def compare(prepared, problem: Problem, truth: Dense, tolerance: float) -> None:
    """Compare steps and what they were made of: by layers, by Jacobians, by the textbook."""
    every = directions(truth)
    top = before_the_widest_gap(every.evals)
    some = directions(truth, lambda evals: range(len(evals) - top, len(evals)))
    choices = [
        ({}, every, solve(truth, 0.1)),
        (
            {"select": top_k(top), "complement": 0.3},
            some,
            step(truth, 0.1, lambda evals: range(len(evals) - top, len(evals)), 0.3),
        ),
    ]
    for options, kept, expected in choices:
        rest = (*problem[1:], 0.1)
        by_layers, info = newton_step_and_info(prepared, *rest, **options)
        by_jacobians, other = newton_step_and_info(problem.model_fn, *rest, gram="dense", **options)
        pairs = [
            (by_layers, expected),
            (by_jacobians, expected),
            (by_layers, by_jacobians),
            (info.loss, truth.loss),
            (info.gradient_norm, truth.gradient.norm()),
            (info.gradient_share, other.gradient_share),
            *zip(basis_free(info, kept.evals), basis_free(kept, kept.evals), strict=True),
            *zip(basis_free(info, kept.evals), basis_free(other, kept.evals), strict=True),
        ]
        for found, true in pairs:
            assert error(found, true) < tolerance
        assert int(info.rank) == int(other.rank) == len(every.evals)


def before_the_widest_gap(evals) -> int:
    """How many of the largest eigenvalues stand apart from the others."""
    gaps = torch.cat([evals[:1], evals.diff()])
    return len(evals) - int(gaps.argmax())


def basis_free(record, evals):
    """Eigenvalues, Σ γγᵀ and Σ λ of those that are equal: signs and rotations do not show."""
    runs = clusters(evals)
    gammas = [record.gammas[:, run] for run in runs]
    lambdas = torch.stack([record.lambdas[:, run].sum(1) for run in runs])
    return record.evals, torch.stack([slopes @ slopes.T for slopes in gammas]), lambdas


# --- products with a matrix -----------------------------------------------------------------


def by_vmap(params, X):
    """W x + b, written for one sample."""
    return vmap(lambda x: torch.tanh(params["W"] @ x + params["b"]))(X)


def matrix(i, o):
    return {"W": normal(i, o), "b": normal(o)}


SIZES = st.integers(1, 4)


@st.composite
def products(draw):
    """A matrix product in any of the forms it is written in, on any number of positions."""
    torch.manual_seed(draw(st.integers(0, 99)))
    n, i, o, h = (draw(SIZES) for _ in range(4))
    x = normal(n, *draw(st.sampled_from([(), (3,), (2, 2)])), i)
    W, tall = {"W": normal(i, o)}, {"W": normal(o, i), "b": normal(o)}
    forms = {
        "Linear": Case(nn.Linear(i, o), x),
        "Linear without bias": Case(nn.Linear(i, o, bias=False), x),
        "F.linear": Case(lambda p, x: F.linear(x, **p), x, {"weight": normal(o, i)}),
        "x @ W + b": Case(lambda p, x: x @ p["W"] + p["b"], x, matrix(i, o)),
        "b + x @ W": Case(lambda p, x: p["b"] + x @ p["W"], x, matrix(i, o)),
        "x @ W.T": Case(lambda p, x: x @ p["W"].T + p["b"], x, tall),
        "W @ x by vmap": Case(by_vmap, normal(n, i), tall),
        "F.linear by vmap": Case(
            lambda p, x: vmap(lambda x: F.linear(x, **p))(x),
            normal(n, i),
            {"weight": normal(o, i), "bias": normal(o)},
        ),
        "Linear by vmap": Case(
            lambda p, x: vmap(lambda x: F.linear(x[None], **p)[0])(x),
            normal(n, i),
            {"weight": normal(o, i), "bias": normal(o)},
            direct=("bias",),
        ),
        "W @ X": Case(lambda p, x: p["W"] @ x + p["b"][:, None], normal(n, i, 3), tall),
        "einsum": Case(lambda p, x: torch.einsum("n...i,ij->nj...", x, p["W"]), x, W),
        "a weight a head": Case(
            lambda p, x: torch.einsum("nti,hij->nthj", x, p["W"]),
            normal(n, 3, i),
            {"W": normal(h, i, o)},
        ),
        "heads to heads": Case(
            lambda p, x: torch.einsum("nthi,hij->nthj", x, p["W"]) + p["b"],
            normal(n, 3, h, i),
            {"W": normal(h, i, o), "b": normal(h, 1)},
        ),
        "heads to one": Case(
            lambda p, x: torch.einsum("nthi,hio->nto", x, p["W"]),
            normal(n, 2, h, i),
            {"W": normal(h, i, o)},
        ),
        "bilinear": Case(
            lambda p, x: torch.einsum("ni,nj,kij->nk", *x, p["W"]),
            (normal(n, i), normal(n, h)),
            {"W": normal(o, i, h)},
        ),
        "a vector": Case(lambda p, x: x @ p["w"], normal(n, 2, i), {"w": normal(i)}),
        "a dot product": Case(
            vmap(lambda p, x: p["w"] @ x, (None, 0)), normal(n, i), {"w": normal(i)}
        ),
        "a square": Case(lambda p, x: x @ p["W"] @ p["W"], normal(n, i), {"W": normal(i, i)}),
    }
    case = forms[draw(st.sampled_from(list(forms)))]
    if isinstance(case.model, nn.Module):
        return case._replace(model=nn.Sequential(case.model, nn.Tanh()))
    if 1 in {i, o, h}:  # then torch takes some products entry by entry
        case = case._replace(direct=tuple(case.params))
    return case._replace(model=lambda p, x: torch.tanh(case.model(p, x)))


@settings(max_examples=40)
@given(products(), st.sampled_from([FLOAT32, FLOAT64]))
def test_a_matrix_product_in_every_form(case, dtype):
    check(case, dtype)


# --- convolutions ---------------------------------------------------------------------------


class Readout(nn.Module):
    """A layer between others: what it puts out at any place counts, nonlinearly, by itself."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, X):
        values = torch.tanh(self.layer(X)).flatten(2)
        ramp = torch.arange(1, values.shape[2] + 1, dtype=X.dtype)
        return values @ torch.stack([ramp.cos(), ramp.sin()], 1)


CONVOLUTIONS = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
TRANSPOSED = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]


@st.composite
def convolutions(draw):
    """A convolution of any dimension, with any of its options, another one along each axis."""
    torch.manual_seed(draw(st.integers(0, 99)))
    axes = draw(st.integers(1, 3))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    kernel, groups = each(1, 3), draw(st.integers(1, 3))
    mode = draw(st.sampled_from(["zeros", "zeros", "circular", "reflect", "replicate"]))
    options = {"padding": draw(st.sampled_from(["same", "valid"])), "padding_mode": mode}
    if draw(st.booleans()):
        options |= {"padding": each(0, 2), "stride": each(1, 2)}
    layer = CONVOLUTIONS[axes - 1](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        dilation=each(1, 2),
        groups=groups,
        bias=draw(st.booleans()),
        **options,
    )
    space = (5, 6, 5)[:axes]
    return Case(Readout(layer), normal(draw(st.integers(1, 3)), layer.in_channels, *space))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@settings(max_examples=30)
@given(convolutions(), st.sampled_from([FLOAT32, FLOAT64]))
def test_a_convolution_with_every_option(case, dtype):
    check(case, dtype)


@st.composite
def transposed_convolutions(draw):
    torch.manual_seed(draw(st.integers(0, 99)))
    axes = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 2))
    along = [
        (draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2)))
        for _ in range(axes)
    ]
    kernel, stride, dilation = zip(*along, strict=True)
    layer = TRANSPOSED[axes - 1](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=stride,
        dilation=dilation,
        padding=tuple(draw(st.integers(0, 1)) for _ in range(axes)),
        output_padding=tuple(draw(st.integers(0, max(s, d) - 1)) for _, s, d in along),
        groups=groups,
        bias=draw(st.booleans()),
    )
    space = (4, 3, 3)[:axes]
    return Case(Readout(layer), normal(draw(st.integers(1, 3)), layer.in_channels, *space))


@settings(max_examples=25)
@given(transposed_convolutions(), st.sampled_from([FLOAT32, FLOAT64]))
def test_a_transposed_convolution_with_every_option(case, dtype):
    check(case, dtype)


# --- other layers ---------------------------------------------------------------------------


class Called(nn.Module):
    """A module called otherwise than on X alone, or of whose results one is wanted."""

    def __init__(self, call, **modules: nn.Module):
        super().__init__()
        self.call = call
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, X):
        return self.call(self, X)


def trained_batch_norm(layer: type, channels: int):
    norm = layer(channels)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(norm.weight)
    return norm


def words(n: int, t: int, vocabulary: int):
    """Word 1 often, and word 0, the padding, at the end."""
    tokens = torch.randint(0, vocabulary, (n, t))
    tokens[:, 0], tokens[:, 1], tokens[:, -1] = 1, 1, 0
    return tokens


def last(results):
    return results[0][:, -1]


def cross_attention(self, X):
    query, memory, value = X
    return self.attend(query, memory, value, need_weights=False)[0].sum(1)


def attended(self, X):
    return self.attend(X, X, X)[0].sum(1)


LAYERS = {
    "embedding": lambda: Case(
        nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Tanh(), nn.Linear(12, 2)), words(3, 4, 5)
    ),
    "padded embedding": lambda: Case(
        nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.Tanh(), nn.Linear(3, 1)), words(3, 4, 5)
    ),
    "large vocabulary": lambda: Case(
        nn.Sequential(nn.Embedding(300, 2, padding_idx=0), nn.Tanh(), nn.Linear(2, 2)),
        words(2, 5, 300),
    ),
    "layer norm": lambda: Case(
        nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)),
        normal(3, 2, 3),
        direct=("1.weight", "1.bias"),
    ),
    "group norm": lambda: Case(
        Readout(nn.Sequential(nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4))),
        normal(3, 2, 4),
        direct=("layer.1.weight", "layer.1.bias"),
    ),
    "rms norm": lambda: Case(
        nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4, eps=1e-5), nn.Tanh()),
        normal(3, 3),
        direct=("1.weight",),
    ),
    "instance norm": lambda: Case(
        Readout(nn.Sequential(nn.Conv1d(2, 2, 2), nn.InstanceNorm1d(2, affine=True))),
        normal(3, 2, 5),
        direct=("layer.1.weight", "layer.1.bias"),
    ),
    "batch norm": lambda: Case(
        Readout(nn.Sequential(nn.Conv2d(1, 2, 2), trained_batch_norm(nn.BatchNorm2d, 2))),
        normal(3, 1, 3, 3),
        direct=("layer.1.weight", "layer.1.bias"),
    ),
    "batch norm without positions": lambda: Case(
        nn.Sequential(nn.Linear(3, 2), trained_batch_norm(nn.BatchNorm1d, 2), nn.Tanh()),
        normal(4, 3),
        direct=("1.weight", "1.bias"),
    ),
    "prelu": lambda: Case(
        nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 1)),
        normal(5, 3),
        direct=("1.weight",),
    ),
    "bilinear": lambda: Case(
        Called(lambda self, X: self.layer(*X), layer=nn.Bilinear(2, 3, 2)),
        (normal(3, 2), normal(3, 3)),
        direct=("layer.weight",),
    ),
    "self-attention": lambda: Case(
        Called(attended, attend=nn.MultiheadAttention(4, 2, batch_first=True)), normal(2, 3, 4)
    ),
    "cross-attention": lambda: Case(
        Called(cross_attention, attend=nn.MultiheadAttention(4, 2, batch_first=True)),
        (normal(2, 2, 4), normal(2, 3, 4), normal(2, 3, 4)),
    ),
    "attention to other widths": lambda: Case(
        Called(
            cross_attention,
            attend=nn.MultiheadAttention(
                4, 2, kdim=3, vdim=2, bias=False, add_bias_kv=True, batch_first=True
            ),
        ),
        (normal(2, 2, 4), normal(2, 3, 3), normal(2, 3, 2)),
        direct=("attend.bias_k", "attend.bias_v"),
    ),
    "transformer": lambda: Case(
        nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), nn.Flatten(), nn.Linear(12, 2)
        ),
        normal(2, 3, 4),
        direct=("0.norm1.weight", "0.norm1.bias", "0.norm2.weight", "0.norm2.bias"),
    ),
    "decoder": lambda: Case(
        Called(
            lambda self, X: self.head(self.decode(*X).sum(1)),
            decode=nn.TransformerDecoderLayer(4, 2, 3, batch_first=True),
            head=nn.Linear(4, 2),
        ),
        (normal(2, 2, 4), normal(2, 3, 4)),
        direct=tuple(f"decode.norm{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")),
    ),
    "rnn": lambda: Case(
        Called(lambda self, X: last(self.cell(X)), cell=nn.RNN(2, 3, batch_first=True)),
        normal(3, 4, 2),
    ),
    "gru": lambda: Case(
        Called(
            lambda self, X: last(self.cell(X)),
            cell=nn.GRU(2, 2, num_layers=2, batch_first=True),
        ),
        normal(2, 3, 2),
    ),
    "lstm": lambda: Case(
        Called(
            lambda self, X: last(self.cell(X)),
            cell=nn.LSTM(2, 2, bidirectional=True, batch_first=True),
        ),
        normal(3, 3, 2),
    ),
    "recurrent cells": lambda: Case(
        Called(
            lambda self, X: self.gru(X[:, 1], self.gru(X[:, 0])) + self.lstm(X[:, 1])[0],
            gru=nn.GRUCell(2, 2),
            lstm=nn.LSTMCell(2, 2),
        ),
        normal(3, 2, 2),
    ),
    "weight norm": lambda: Case(
        nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)),
        normal(3, 3),
        direct=("0.parametrizations.weight.original0", "0.parametrizations.weight.original1"),
    ),
}


@DTYPES
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer(name, dtype):
    check(LAYERS[name](), dtype)


# --- weights used more than once, in parts, or otherwise than by layers ------------------------


def laplacian(params, x):
    def u(x):
        hidden = torch.tanh(params["W"] @ x + params["b"])
        return params["out"] @ torch.tanh(params["W2"] @ hidden)

    return torch.trace(hessian(u)(x)) + u(x) ** 2


def heat(params, X):
    """u_t − u_xx, by jvp over grad."""

    def u(t, x):
        return params["out"] @ torch.tanh(params["W"] @ torch.stack([t, x]) + params["b"])

    def residual(t, x):
        one = torch.ones_like(x)
        _, u_xx = jvp(lambda x: grad(u, 1)(t, x), (x,), (one,))
        return grad(u)(t, x) - u_xx

    return vmap(residual)(*X)


def equal_and_opposite(params, X):
    """A force from a potential: the Jacobian of a net, inside the model."""
    net = lambda x: torch.sin(x @ params["W"]) @ params["V"]  # noqa: E731 - x alone is differentiated
    return vmap(lambda x: jacrev(net)(x) @ x)(X)


def in_place(params, X):
    """Sums and products written into tensors, some of which are the same for all samples."""
    hidden = X @ params["W"]
    hidden[:, 1] += params["b"]
    hidden.mul_(params["scale"])
    table = torch.zeros_like(params["W"])
    table[0] = params["b"]
    table[1:].copy_(params["W"][1:])
    return hidden + torch.sin(X @ table)


def experts(params, X):
    return sum(torch.tanh(X @ params["W"][i] + params["b"][i]) * (i + 1) for i in range(3))


def chosen_expert(params, X):
    """A weight of each sample's own, looked up."""
    x, choice = X
    return torch.einsum("ni,nio->no", x, params["W"][choice])


SQUARE = {"W": (3, 3), "b": (3,), "c": (3,)}


def of_shapes(model_fn, X, shapes, direct=()):
    return Case(model_fn, X, {name: torch.randn(shape) for name, shape in shapes.items()}, direct)


FUNCTIONS = {
    "twice the same weight": lambda: of_shapes(
        lambda p, x: torch.tanh(x @ p["W"] + p["b"]) @ p["W"] + p["b"],
        normal(4, 3),
        {"W": (3, 3), "b": (3,)},
    ),
    "a weight and its transpose": lambda: of_shapes(
        lambda p, x: torch.tanh(x @ p["W"] + p["b"]) @ p["W"].T + p["c"],
        normal(4, 3),
        {"W": (3, 2), "b": (2,), "c": (3,)},
    ),
    "a weight with two biases": lambda: of_shapes(
        lambda p, x: torch.tanh(x @ p["W"] + p["b"]) @ p["W"] + p["c"], normal(4, 3), SQUARE
    ),
    "two weights with a bias": lambda: of_shapes(
        lambda p, x: torch.tanh(x @ p["W"] + p["b"]) @ p["V"] + p["b"],
        normal(4, 3),
        {"W": (3, 3), "V": (3, 3), "b": (3,)},
    ),
    "siblings": lambda: of_shapes(
        lambda p, x: torch.tanh(x[:, 0] @ p["W"] - x[:, 1] @ p["W"]), normal(3, 2, 3), {"W": (3, 2)}
    ),
    "experts": lambda: of_shapes(experts, normal(3, 2), {"W": (3, 2, 2), "b": (3, 2)}),
    "the expert of each sample": lambda: of_shapes(
        chosen_expert, (normal(4, 2), torch.tensor([0, 2, 2, 1])), {"W": (3, 2, 2)}, ("W",)
    ),
    "parts of a weight": lambda: of_shapes(
        lambda p, x: torch.tanh(x[:, :2] @ p["W"][:2]) + x[:, 2:] @ p["W"][2:],
        normal(4, 4),
        {"W": (4, 2)},
    ),
    "overlapping parts": lambda: of_shapes(
        lambda p, x: torch.tanh(x[:, :2] @ p["W"][:2]) + x[:, 1:] @ p["W"][1:],
        normal(4, 3),
        {"W": (3, 2)},
    ),
    "part of a weight": lambda: of_shapes(
        lambda p, x: torch.tanh(x @ p["W"][::2].flip(0)), normal(4, 2), {"W": (4, 2)}
    ),
    "chunks": lambda: of_shapes(
        lambda p, x: torch.stack([torch.tanh(x @ w.T) for w in p["W"].chunk(3)], 1),
        normal(3, 2),
        {"W": (6, 2)},
    ),
    "a product of weights": lambda: of_shapes(
        lambda p, x: x @ (p["W"] @ p["V"]) + p["b"],
        normal(4, 3),
        {"W": (3, 2), "V": (2, 2), "b": (2,)},
    ),
    "low rank": lambda: of_shapes(
        lambda p, x: torch.tanh(F.linear(x, p["W"] + 0.5 * p["B"] @ p["A"])),
        normal(4, 3),
        {"W": (2, 3), "B": (2, 1), "A": (1, 3)},
        ("B",),
    ),
    "low rank beside": lambda: of_shapes(
        lambda p, x: torch.tanh(x @ p["W"] + 0.5 * (x @ p["A"]) @ p["B"]),
        normal(4, 3),
        {"W": (3, 2), "A": (3, 1), "B": (1, 2)},
    ),
    "a residual": lambda: of_shapes(
        lambda p, x: x + torch.tanh(x @ p["W"] + p["b"]) @ p["V"],
        normal(4, 3),
        {"W": (3, 2), "b": (2,), "V": (2, 3)},
    ),
    "a symmetric weight": lambda: of_shapes(
        lambda p, x: torch.tanh(x @ (p["W"] + p["W"].T)), normal(4, 3), {"W": (3, 3)}
    ),
    "twice a shift": lambda: of_shapes(
        lambda p, x: torch.tanh(x + (p["b"] + p["b"])), normal(4, 3), {"b": (3,)}
    ),
    "shifts along some axes": lambda: of_shapes(
        lambda p, x: torch.tanh(x + p["a"] + p["b"] + p["c"] + p["d"]) * p["d"],
        normal(3, 2, 3),
        {"a": (3,), "b": (2, 1), "c": (2, 3), "d": ()},
        ("d",),
    ),
    "a shift times two": lambda: of_shapes(
        lambda p, x: torch.tanh(torch.add(x, p["b"], alpha=2) - p["c"]),
        normal(3, 2),
        {"b": (2,), "c": (2,)},
        ("b", "c"),
    ),
    "a scaled sum": lambda: of_shapes(
        lambda p, x: torch.addmm(p["b"], x, p["W"], beta=0.5, alpha=2).tanh(),
        normal(3, 2),
        {"b": (2,), "W": (2, 2)},
        ("b", "W"),
    ),
    "an outer product": lambda: of_shapes(
        lambda p, x: torch.sin(x[:, :, None] * p["w"]), normal(3, 2), {"w": (2,)}, ("w",)
    ),
    "a function of a weight": lambda: of_shapes(
        lambda p, x: torch.tanh(torch.tanh(x @ p["W"]) @ p["V"].exp()) @ p["U"],
        normal(4, 3),
        {"W": (3, 3), "V": (3, 2), "U": (2, 2)},
        ("V",),
    ),
    "the spectrum of a weight": lambda: of_shapes(
        lambda p, x: (
            torch.fft.irfft(torch.fft.rfft(x @ p["W"]) * torch.fft.rfft(p["filter"]), n=4) @ p["V"]
        ),
        normal(4, 3),
        {"W": (3, 4), "filter": (4,), "V": (4, 2)},
        ("filter",),
    ),
    "a weight as the input": lambda: of_shapes(
        lambda p, x: torch.tanh(F.conv1d(p["image"][None], x)[0]).mean(1)[:, None],
        normal(3, 2, 2),
        {"image": (2, 5)},
        ("image",),
    ),
    "a weight as the output": lambda: of_shapes(
        lambda p, x: torch.cat([p["b"].expand(len(x), 2), x @ p["W"]], 1),
        normal(3, 2),
        {"b": (2,), "W": (2, 2)},
        ("b",),
    ),
    "a bias as the output": lambda: of_shapes(
        lambda p, x: p["b"].expand(len(x), 2), normal(3, 2), {"b": (2,)}, ("b",)
    ),
    "a scalar and parameters that nobody uses": lambda: of_shapes(
        lambda p, x: torch.tanh(x @ p["W"]) * p["scale"],
        normal(3, 2),
        {"empty": (0, 2), "W": (2, 2), "scale": (), "unused": (3,)},
        ("scale",),
    ),
    "in place": lambda: of_shapes(
        in_place, normal(3, 2), {"W": (2, 2), "b": (), "scale": (2,)}, ("W", "b", "scale")
    ),
    "a Laplacian": lambda: of_shapes(
        vmap(laplacian, (None, 0)),
        normal(4, 2),
        {"W": (3, 2), "b": (3,), "W2": (2, 3), "out": (2,)},
        ("out",),
    ),
    "the heat equation": lambda: of_shapes(
        heat, (torch.rand(5), torch.rand(5)), {"W": (3, 2), "b": (3,), "out": (3,)}, ("out",)
    ),
    "a force": lambda: of_shapes(equal_and_opposite, normal(3, 2), {"W": (2, 3), "V": (3, 2)}),
}


@DTYPES
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function(name, dtype):
    check(FUNCTIONS[name](), dtype)


# --- every problem, every option ------------------------------------------------------------


@cache
def truth(name: str) -> Dense:
    """The dense reference of a problem."""
    return dense(*problem(name))


@cache
def prepared_problem(name: str, dtype: torch.dtype = FLOAT64) -> tuple[Any, Problem]:
    given = problem(name, dtype)
    return prepare(*given[:3]), given


@DTYPES
@pytest.mark.parametrize("trained", ["0", "2"])
def test_a_module_of_which_a_part_is_trained(trained, dtype):
    """The others are the module's own, and stay as they are."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def part(dtype):
        whole = copy.deepcopy(net).to(dtype)
        params = {k: p.detach() for k, p in whole.named_parameters() if k.startswith(trained)}
        X, y = cast(given, dtype)
        return Problem(lambda p, x: functional_call(whole, p, (x,)), params, X, y, nn.MSELoss())

    given = normal(5, 3), normal(5, 2)
    problem = part(dtype)
    compare(prepare(*problem[:3]), problem, dense(*part(FLOAT64)), TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem(name, dtype):
    compare(*prepared_problem(name, dtype), truth(name), TOLERANCE[dtype])


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_in_float32_itself(name, monkeypatch):
    """Large problems are not evaluated in float64: their columns are wrong by eps or so.

    With λ up to 3 and δ = 0.1 the step is wrong by about thirty times that.
    """
    monkeypatch.setattr("ddnewton.linearize.linearization.CHEAP_FLOPS", 0)
    prepared, given = prepared_problem(name, FLOAT32)
    result, info = newton_step_and_info(prepared, *given[1:], 0.1)
    assert error(result, solve(truth(name), 0.1)) < 1e-5
    kept = directions(truth(name)).evals
    large = kept > 1e-3 * kept[-1]
    assert error(info.evals[-int(large.sum()) :], kept[large]) < 1e-6


def test_a_large_problem_in_float32():
    """5 GFLOP: more than is done in float64 for float32's sake."""
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    X, y, criterion = normal(64, 3, 24, 24), torch.arange(64) % 10, nn.CrossEntropyLoss()
    exact = copy.deepcopy(net).double()

    def by(net, gram, X):
        params = {name: p.detach() for name, p in net.named_parameters()}
        model_fn = lambda p, x: functional_call(net, p, (x,))  # noqa: E731 - of this net
        return newton_step(model_fn, params, X, y, criterion, 0.01, gram=gram)

    expected = by(exact, "dense", X.double())
    assert error(by(net, "structured", X), expected) < 1e-5
    assert error(by(exact, "structured", X.double()), expected) < 1e-11


@pytest.mark.parametrize("name", PROBLEMS)
def test_chunks_change_nothing(name):
    prepared, given = prepared_problem(name)
    top = before_the_widest_gap(directions(truth(name)).evals)
    options = {"select": top_k(top), "complement": 0.2}
    whole, info = newton_step_and_info(prepared, *given[1:], 0.1, **options)
    for chunk_size in (1, 2, 3):
        parts, other = newton_step_and_info(
            prepared, *given[1:], 0.1, chunk_size=chunk_size, **options
        )
        assert error(parts, whole) < 1e-11
        for field in ("loss", "evals", "gradient_norm", "gradient_share", "rank"):
            assert error(getattr(other, field), getattr(info, field)) < 1e-11, field
        assert error(other.lambdas, info.lambdas) < 1e-9


def from_noise(evals, evecs, gammas, lambdas):
    """A damping that looks at every sample."""
    return 0.1 + lambdas.square().mean(0).sqrt() + gammas.square().mean(0).sqrt()


CHOICES = {
    "all": (None, None),
    "above": (above(0.05), lambda evals: evals > 0.05 * evals[-1]),
    "list": (lambda evals: [len(evals) - 1, len(evals) - 3],) * 2,
    "nothing": (lambda evals: [],) * 2,
}
SMALL_AND_LARGE = ["relu_mlp", "tanh_mlp", "more_columns_than_parameters", "many_points"]
"""With fewer and with more columns NM than parameters D."""


@DTYPES
@pytest.mark.parametrize("name", SMALL_AND_LARGE)
def test_every_choice_of_directions_and_dampings(name, dtype):
    prepared, given = prepared_problem(name, dtype)
    for theirs, ours in CHOICES.values():
        for damping in (0.05, from_noise):
            for complement in (None, 0.5):
                expected = step(truth(name), damping, ours, complement)
                options = {"select": theirs, "complement": complement}
                result = newton_step(prepared, *given[1:], damping, **options)
                assert error(result, expected) < 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["convolution", "attention", "tied_autoencoder", "poisson"])
def test_unprepared_it_is_the_same(name):
    prepared, given = prepared_problem(name)
    unprepared = newton_step(*given, 0.1, gram="structured")
    assert error(unprepared, newton_step(prepared, *given[1:], 0.1)) < 1e-13


# --- the contraction, whatever its order ----------------------------------------------------


class Shape(NamedTuple):
    n: int
    m: int
    g: int
    o: int
    t: int
    widths: tuple[int, ...]
    lookup: bool = False


def outer_products(shape: Shape, dtype=FLOAT64) -> Outer:
    n, m, g, o, t, widths, lookup = shape
    a = torch.randint(-1, sum(widths), (n, g, t)) if lookup else normal(n, g, t, sum(widths))
    return Outer(a if lookup else a.to(dtype), normal(n, m, g, o, t).to(dtype), widths)


def columns(outer: Outer):
    """Every column by itself: the weight's entries group by group, then the bias's."""
    a = outer.a
    if not a.is_floating_point():
        a = F.one_hot(a + 1, sum(outer.widths) + 1)[..., 1:]
    a, b = a.double(), outer.b.double()
    n, m, g = b.shape[:3]
    products = torch.stack(
        [b[i, j, k] @ a[i, k] for i in range(n) for j in range(m) for k in range(g)]
    ).unflatten(0, (n * m, g))
    return torch.cat([part.flatten(1) for part in products.split(outer.widths, -1)], 1)


SHAPES = {
    "one position": Shape(5, 2, 1, 4, 1, (3, 1)),
    "groups at one position": Shape(5, 2, 3, 4, 1, (3,)),
    "columns first": Shape(4, 2, 1, 2, 50, (2, 1)),
    "columns of groups first": Shape(4, 2, 3, 2, 30, (2,)),
    "positions first": Shape(4, 2, 1, 24, 2, (25,)),
    "positions of groups first": Shape(4, 3, 2, 20, 3, (20, 1)),
    "lookups": Shape(3, 2, 1, 2, 4, (7,), lookup=True),
    "lookups in a large table": Shape(4, 2, 1, 6, 3, (400,), lookup=True),
    "lookups of two kinds": Shape(3, 2, 1, 2, 3, (4, 1), lookup=True),
    "one lookup": Shape(4, 2, 1, 3, 1, (5,), lookup=True),
    "many columns at one position": Shape(37, 3, 1, 4, 1, (3,)),
    "many columns first": Shape(37, 3, 1, 2, 6, (2,)),
    "many positions first": Shape(30, 3, 1, 20, 2, (20,)),
}


def check_contraction(shape: Shape, others: int, dtype=FLOAT64) -> None:
    left = outer_products(shape, dtype)
    right = outer_products(shape._replace(n=others, m=shape.m + 1), dtype)
    mine, theirs = columns(left), columns(right)
    tolerance = {FLOAT32: 1e-6, FLOAT64: 1e-14}[dtype]
    assert error(dense_columns(left), mine) < tolerance
    m, m2 = shape.m, shape.m + 1
    pairs = {
        "one set": (left, left, (m, m), mine @ mine.T),
        "two sets": (left, right, (m, m2), mine @ theirs.T),
        "two sets, swapped": (right, left, (m2, m), theirs @ mine.T),
        "two kinds": (left, theirs.to(dtype), (m, m2), mine @ theirs.T),
        "as they are": (mine.to(dtype), mine.to(dtype), (m, m), mine @ mine.T),
    }
    for one, other, counts, expected in pairs.values():
        products = inner(one, other, counts).flatten(0, 1).flatten(1)
        assert error(products, expected) < tolerance
    weights = normal(3, shape.n, shape.m).double()
    for factor in (left, dense_columns(left)):
        sums = torch.cat(weighted_sums(factor, weights), 1)
        assert error(sums, weights.flatten(1) @ mine) < tolerance
        vectors = normal(3, mine.shape[1]).double()
        assert error(inner_products(factor, vectors), mine @ vectors.T) < tolerance


@DTYPES
@pytest.mark.parametrize("name", SHAPES)
def test_inner_products_in_every_order(name, dtype):
    check_contraction(SHAPES[name], 3, dtype)


@pytest.mark.parametrize("name", SHAPES)
def test_inner_products_in_small_blocks(name, monkeypatch):
    monkeypatch.setattr("ddnewton.columns.contraction.INTERMEDIATE_BYTES", 2**9)
    monkeypatch.setattr("ddnewton.columns.factors.INTERMEDIATE_BYTES", 2**9)
    check_contraction(SHAPES[name], 5)


COUNT = st.integers(1, 6)
WIDTHS = st.lists(COUNT, min_size=1, max_size=2).map(tuple)


@settings(max_examples=50)
@given(st.builds(Shape, COUNT, COUNT, COUNT, COUNT, COUNT, WIDTHS, st.booleans()), COUNT)
def test_inner_products_of_any_shape(shape, others):
    torch.manual_seed(0)
    shape = shape._replace(g=1) if shape.lookup else shape
    check_contraction(shape, others)


# --- memory ---------------------------------------------------------------------------------

PEAKS = """
import torch
from ddnewton import newton_step, prepare, top_k
from torch import nn
from torch.func import functional_call

torch.set_num_threads(1)


def step(net, *shape):
    params = {name: p.detach() for name, p in net.named_parameters()}
    model_fn = prepare(lambda p, x: functional_call(net, p, (x,)), params, torch.randn(1, *shape))

    def peak(n, **options):
        X, y = torch.randn(n, *shape), torch.arange(n) % 10
        newton_step(model_fn, params, X, y, nn.CrossEntropyLoss(), 0.1, select=top_k(5), **options)
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        return int(status["VmHWM"].split()[0]) / 2**10

    return peak


mlp = step(nn.Sequential(nn.Linear(400, 600), nn.ReLU(), nn.Linear(600, 10)), 400)
pool = (nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10))
convolutions = step(nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), *pool), 3, 32, 32)
print(mlp(1), convolutions(1), mlp(64), convolutions(64, chunk_size=4), convolutions(64))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_no_jacobian_is_ever_in_memory():
    """The peaks of a process, in MiB; the Jacobian of the MLP alone would have 540."""
    # Freed at once, or peaks depend on what the allocator happens to keep.
    plain = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", PEAKS],
        env=os.environ | plain,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    _, before, mlp, in_chunks, whole = map(float, done.stdout.split())
    assert mlp - before < 60
    assert in_chunks - before < 0.5 * (whole - before)


# --- what cannot be traced ------------------------------------------------------------------


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
    return (x @ p["W"]).sin() * (1 + p["W"].abs().max().item())


def straight_through(p, x):
    return StraightThrough.apply(3 * x @ p["W"])


UNTRACEABLE = {
    branch: "model_fn must be traceable; got .*torch.where",
    item: "model_fn must be traceable; got .*leave tensors tensors",
    straight_through: "the trace of model_fn must agree with it; got .*autograd.Function",
}


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
def test_what_cannot_be_traced_goes_dense_and_says_so(model_fn, caplog):
    given = untraceable(model_fn, n=100, d=1200)  # 1.5 GFLOP: not tiny
    expected = newton_step(*given, 0.1, gram="dense")
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="ddnewton"):
        result = newton_step(*given, 0.1)
    assert torch.equal(flat(result), flat(expected))
    assert "the Gram matrix is formed from dense Jacobians: " in caplog.text


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
