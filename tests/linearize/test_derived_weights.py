"""Weights that are computed from parameters alone, before any data meet them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from ddnewton import prepare
from ddnewton.columns.factors import Outer
from ddnewton.linearize.structured.visit import visit
from tests.linearize.layer_cases import Case, Readout, check, of_shapes, with_targets
from tests.methods import DTYPES, FLOAT64
from tests.models import normal

MASK = torch.tensor([[1, 0, 1.0], [1, 1, 0]])
SQUARE_MASK = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 1.0]])


def mix(weight):
    """Tanh of a product with a weight that is made of a parameter."""
    return lambda p, x: torch.tanh(F.linear(x, weight(p["W"]), p["b"]))


def tied(params, X):
    """One parameter as it is, and what is computed from it."""
    return torch.tanh(torch.tanh(X @ params["W"].exp()) @ params["W"].T + params["b"])


def twice(params, X):
    """Two weights computed from the same parameters."""
    W = F.softplus(params["W"]) * params["scale"]
    return torch.tanh(torch.tanh(X @ W) @ W.T.sin()) @ params["V"]


def whole(params, X):
    """A weight that is computed from another weight."""
    first = params["W"].exp()
    return torch.tanh(X @ first) @ (first @ first)


def both_ways(params, X):
    """A parameter that meets data without a rule, and is part of a weight."""
    return torch.tanh(X @ (params["W"] * params["scale"])) * params["scale"]


def experts(params, X):
    """A weight a head, each row of which has a norm of its own."""
    W = F.normalize(params["W"], dim=1)
    return torch.einsum("nti,hij->nthj", X, W).tanh().sum((1, 2))


def spectral(params, X):
    """A convolution in Fourier space, by a weight that is kept as pairs of reals."""
    modes = torch.fft.rfft(X)
    W = torch.view_as_complex(params["W"])
    mixed = torch.zeros(len(X), 2, modes.shape[2], dtype=modes.dtype)
    mixed[..., :3] = torch.einsum("nik,iok->nok", modes[..., :3], W)
    return torch.tanh(torch.fft.irfft(mixed, n=X.shape[2])).flatten(1) @ params["V"]


def shared_modes(params, X):
    """One complex matrix for all modes, and its transpose."""
    W = torch.view_as_complex(params["W"])
    modes = torch.fft.rfft(X).mT @ W
    return torch.tanh(torch.fft.irfft((modes * modes.abs()) @ W.T, dim=1)).sum(2)


W_AND_B = {"W": (2, 3), "b": (2,)}

MULTIPLES = {
    "a multiple": mix(lambda W: 0.5 * W),
    "a quotient": mix(lambda W: -W / 3),
    "a shifted weight": mix(lambda W: 2 * (1 - W) + MASK),
    "half of it in place": mix(lambda W: W.clone().mul_(0.5)),
}

BY_ROWS = {
    "a mask": mix(lambda W: W * MASK.to(W)),
    "a function": mix(F.softplus),
    "a function of the transpose": lambda p, x: torch.tanh(x @ p["W"].T.exp() + p["b"]),
    "rows of length one": mix(lambda W: F.normalize(W, dim=1)),
    "rows of mean zero": mix(lambda W: W - W.mean(1, keepdim=True)),
}

MIXED = {
    "columns of length one": mix(lambda W: F.normalize(W, dim=0)),
    "a norm of all": mix(lambda W: W / W.norm()),
    "a cumulative sum": mix(lambda W: W.cumsum(0)),
    "a softmax": mix(lambda W: W.flatten().softmax(0).reshape(W.shape)),
    "two parts": mix(lambda W: torch.cat([W[:, :1].exp(), W[:, 1:]], 1)),
    "all or some": mix(lambda W: torch.where(W > 0, W, W.sum())),
}

CASES = {
    **{
        name: lambda f=f: of_shapes(f, normal(4, 3), W_AND_B)
        for name, f in (MULTIPLES | BY_ROWS | MIXED).items()
    },
    **{
        f"{name}, at many positions": lambda f=f: of_shapes(
            lambda p, x: f(p, x).sum(1), normal(3, 4, 3), W_AND_B
        )
        for name, f in (BY_ROWS | MIXED).items()
    },
    "a parameter as it is, too": lambda: of_shapes(tied, normal(4, 3), {"W": (3, 2), "b": (3,)}),
    "two weights": lambda: of_shapes(
        twice, normal(4, 3), {"W": (3, 2), "scale": (2,), "V": (3, 2)}
    ),
    "a weight of a weight": lambda: of_shapes(whole, normal(4, 3), {"W": (3, 3)}),
    "a parameter without a rule": lambda: of_shapes(
        both_ways, normal(4, 3), {"W": (3, 2), "scale": (2,)}, ("scale",)
    ),
    "a complex weight a mode": lambda: of_shapes(
        spectral, normal(3, 2, 6), {"W": (2, 2, 3, 2), "V": (12, 2)}
    ),
    "a complex matrix": lambda: of_shapes(shared_modes, normal(3, 2, 4), {"W": (2, 2, 2)}),
    "a function of pairs": lambda: of_shapes(
        lambda p, x: spectral({"W": p["W"].sin(), "V": p["V"]}, x),
        normal(3, 2, 6),
        {"W": (2, 2, 3, 2), "V": (12, 2)},
    ),
    "a function of a bias": lambda: of_shapes(
        lambda p, x: torch.tanh(F.linear(x, p["W"].exp(), F.softplus(p["b"]))),
        normal(4, 3),
        W_AND_B,
    ),
    "a repeated shift": lambda: of_shapes(
        lambda p, x: torch.tanh(x + p["b"].repeat(2)), normal(3, 4), {"b": (2,)}
    ),
    "experts": lambda: of_shapes(experts, normal(3, 2, 3), {"W": (2, 3, 4)}),
    "a multiple of a table": lambda: of_shapes(
        lambda p, x: F.embedding(x, p["W"] * 3).sin().sum(1),
        torch.tensor([[0, 1, 1], [3, 2, 0]]),
        {"W": (4, 2)},
    ),
    "a function of a table": lambda: of_shapes(
        lambda p, x: F.embedding(x, p["W"].exp()).sin().sum(1),
        torch.tensor([[0, 1, 1], [3, 2, 0]]),
        {"W": (4, 2)},
    ),
    "a sum with low rank": lambda: of_shapes(
        lambda p, x: torch.tanh(x @ (p["W"] + 0.5 * p["A"] @ p["B"]) + p["b"]),
        normal(4, 3),
        {"W": (3, 2), "A": (3, 1), "B": (1, 2), "b": (2,)},
    ),
    "a function of a vector": lambda: of_shapes(
        lambda p, x: torch.tanh(x @ p["W"]) + p["b"].exp(), normal(4, 3), {"W": (3, 2), "b": (2,)}
    ),
    "a diagonal": lambda: of_shapes(
        lambda p, x: torch.tanh(x @ p["W"]) @ torch.diag(p["b"]),
        *(normal(4, 3), {"W": (3, 2), "b": (2,)}),
    ),
    "an unused function": lambda: of_shapes(
        lambda p, x: x @ p["W"] + (p["V"] > 0).sum(), normal(4, 3), {"W": (3, 2), "V": (2,)}, ("V",)
    ),
    "convolutions": lambda: Case(
        Readout(
            nn.Sequential(
                weight_norm(nn.Conv1d(2, 4, 2)), nn.Tanh(), weight_norm(nn.Conv1d(4, 3, 2))
            )
        ),
        normal(3, 2, 5),
    ),
    "transposed convolution": lambda: Case(
        Readout(weight_norm(nn.ConvTranspose1d(2, 3, 2), dim=1)), normal(3, 2, 3)
    ),
    "a spectral norm": lambda: Case(
        nn.Sequential(spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)), normal(3, 3)
    ),
    "an orthogonal weight": lambda: Case(
        nn.Sequential(orthogonal(nn.Linear(3, 3)), nn.Tanh(), nn.Linear(3, 2)), normal(3, 3)
    ),
}


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_a_weight_computed_from_parameters(name, dtype):
    check(CASES[name](), dtype)


def factors(model, X, shapes):
    """The columns of a model along all parameters, of an output of its own each."""
    problem = with_targets(of_shapes(model, X, shapes), FLOAT64)
    prepared = prepare(*problem[:3])
    visited = visit(prepared.narrow, *prepared.leaves(problem.params, problem.X))
    n, c = visited.outputs.shape
    return visited.pullback(torch.eye(c, dtype=FLOAT64).expand(n, c, c))


@pytest.mark.parametrize("name", [*MULTIPLES, *BY_ROWS])
def test_columns_stay_outer_products(name):
    """Dense ones would take m² times the operations to multiply."""
    for factor in factors((MULTIPLES | BY_ROWS)[name], normal(4, 3), W_AND_B):
        assert isinstance(factor, Outer)
        assert factor.a.shape[3] > 1 or factor.b.shape[3] == 2


@pytest.mark.parametrize("name", MULTIPLES)
def test_a_multiple_and_its_bias_are_one_layer(name):
    (factor,) = factors(MULTIPLES[name], normal(4, 3), W_AND_B)
    assert factor.widths == (3, 1)


@pytest.mark.parametrize("name", MIXED)
def test_columns_are_dense_where_rows_share_parameters(name):
    """What the shape of the graph does not rule out counts as shared, whatever the values are."""
    bias, weight = factors(MIXED[name], normal(4, 3), W_AND_B)
    assert isinstance(bias, Outer)
    assert weight.shape == (8, 6)


def test_the_path_of_a_derived_weight():
    model_fn = mix(lambda W: W.exp() * MASK.to(W))
    params = {"W": normal(2, 3), "b": normal(2)}
    assert "['W']: mul, addmm" in repr(prepare(model_fn, params, normal(2, 3)))
