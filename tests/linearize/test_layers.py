"""Steps by the layers of a model: matrix products, convolutions and torch's other layers."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import vmap
from torch.nn.utils.parametrizations import weight_norm

from ddnewton import newton_step, prepare
from tests.linearize.layer_cases import Case, Readout, check, with_targets
from tests.methods import DTYPES, FLOAT32, FLOAT64
from tests.models import normal
from tests.reference import error

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
    ),
}


@DTYPES
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer(name, dtype):
    check(LAYERS[name](), dtype)


@pytest.mark.parametrize("sizes", [(2, 3, 2), (1, 1, 1), (3, 1, 2)])
@pytest.mark.parametrize("positions", [(), (2,)])
def test_a_bilinear_layer_is_a_product_of_matrices(sizes, positions):
    """Two of its operands are data, for which there is no rule: it is decomposed."""
    i, j, o = sizes
    layer = Called(lambda self, X: self.layer(*X).tanh(), layer=nn.Bilinear(i, j, o))
    given = with_targets(Case(layer, (normal(4, *positions, i), normal(4, *positions, j))), FLOAT64)
    prepared = prepare(*given[:3])
    assert repr(prepared).split()[1:-1] == ["['layer.weight']:", "mm", "['layer.bias']:", "add"]
    expected = newton_step(*given, 0.1, gram="dense")
    assert error(newton_step(prepared, *given[1:], 0.1), expected) < 1e-12
