"""Weights that are used more than once, in parts, or otherwise than by layers."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, hessian, jacrev, jvp, vmap

from tests.linearize.layer_cases import SQUARE, check, of_shapes
from tests.methods import DTYPES
from tests.models import normal


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
