"""Small problems as data: each entry builds a model, parameters, a batch and a loss.

Every number is drawn in float32 and then cast, so that a problem is the same one in both dtypes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils._pytree import tree_map

from benchmarks.problem import Problem


def cast(tree, dtype: torch.dtype):
    """The tree with its floating leaves in ``dtype``."""
    return tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, tree)


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape)


def dense_layer(inputs: int, outputs: int) -> dict[str, Tensor]:
    return {
        "weight": normal(outputs, inputs, scale=inputs**-0.5),
        "bias": normal(outputs, scale=0.1),
    }


def of_module(module: nn.Module, X, y, criterion, dtype: torch.dtype) -> Problem:
    """A module in eval mode, called functionally with its own parameters."""
    module = module.to(dtype).eval()
    params = {name: p.detach().clone() for name, p in module.named_parameters()}

    def model_fn(params, X):
        return functional_call(module, params, (X,))

    return Problem(model_fn, params, cast(X, dtype), cast(y, dtype), criterion)


def of_function(model_fn, params, X, y, criterion, dtype: torch.dtype) -> Problem:
    return Problem(model_fn, cast(params, dtype), cast(X, dtype), cast(y, dtype), criterion)


# --- modules --------------------------------------------------------------------------------


def relu_mlp(dtype):
    """A flat dict of parameters."""
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    return of_module(
        module, normal(5, 4), torch.tensor([0, 2, 1, 1, 0]), nn.CrossEntropyLoss(), dtype
    )


def convolution(dtype):
    """In-place activations, pooling, strides and groups."""
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 2, stride=2, groups=2, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    y = torch.tensor([0, 2, 1, 1])
    return of_module(module, normal(4, 2, 4, 4), y, nn.CrossEntropyLoss(), dtype)


class Block(nn.Module):
    """Token ids and a padding mask in a dict; one pre-norm attention block; a weight used twice."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.project = nn.Linear(4, 12)
        self.mix = nn.Linear(4, 4, bias=False)

    def forward(self, X):
        hidden = self.embedding(X["tokens"])
        query, key, value = self.project(self.norm(hidden)).unflatten(-1, (3, 2, 2)).unbind(-3)
        allowed = X["mask"][:, None, None, :]
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=allowed
        )
        hidden = hidden + self.mix(attended.transpose(1, 2).flatten(-2))
        weights = X["mask"].to(hidden.dtype)[..., None]
        pooled = (hidden * weights).sum(1) / weights.sum(1)
        return F.linear(pooled, self.embedding.weight)


def attention(dtype):
    """Integer inputs, a mask, embeddings tied to the output layer."""
    tokens = torch.tensor([[1, 2, 3], [4, 0, 0], [5, 6, 0]])
    X = {"tokens": tokens, "mask": tokens > 0}
    return of_module(Block(), X, torch.tensor([3, 0, 6]), nn.CrossEntropyLoss(), dtype)


def encoder_layer(dtype):
    """Torch's own transformer layer; its eval mode has a fast path without derivatives."""
    module = nn.Sequential(
        nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, batch_first=True, norm_first=True),
        nn.Flatten(),
        nn.Linear(12, 2),
    )
    return of_module(module, normal(3, 3, 4), torch.tensor([1, 0, 1]), nn.CrossEntropyLoss(), dtype)


def eval_batch_norm(dtype):
    """Buffers that are no parameters."""
    norm = nn.BatchNorm2d(2)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    module = nn.Sequential(norm, nn.Conv2d(2, 2, 2), nn.GELU(), nn.Flatten(), nn.Linear(8, 2))
    return of_module(module, normal(4, 2, 3, 3), normal(4, 2), nn.MSELoss(), dtype)


class LastState(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, X):
        states, _ = self.cell(X)
        return self.head(states[:, -1])


def lstm(dtype):
    """A recurrent net, which vmap refuses."""
    return of_module(
        LastState(), normal(3, 4, 2), torch.tensor([1, 0, 1]), nn.CrossEntropyLoss(), dtype
    )


# --- functions ------------------------------------------------------------------------------


def tanh_mlp(dtype):
    """A nested dict with a list and a scalar inside; outputs [N]; a parameter nobody uses."""

    def model_fn(params, X):
        hidden = torch.tanh(F.linear(X, **params["in"]))
        return params["scale"] * (hidden @ params["out"][0]) + params["out"][1]

    params = {
        "in": dense_layer(3, 5),
        "out": [normal(5), normal(1)[0]],
        "scale": torch.tensor(0.7),
        "unused": normal(2, 2),
    }
    return of_function(model_fn, params, normal(6, 3), normal(6), nn.MSELoss(), dtype)


def list_of_layers(dtype):
    """Parameters as a list of tuples."""

    def model_fn(params, X):
        for weight, bias in params[:-1]:
            X = F.silu(X @ weight.T + bias)
        weight, bias = params[-1]
        return X @ weight.T + bias

    params = [tuple(dense_layer(a, b).values()) for a, b in ((3, 4), (4, 4), (4, 2))]
    y = torch.rand(4, 2)
    return of_function(model_fn, params, normal(4, 3), y, nn.BCEWithLogitsLoss(), dtype)


class Layers(NamedTuple):
    code: Tensor
    shift: Tensor


def tied_autoencoder(dtype):
    """A NamedTuple; one matrix encodes and decodes."""

    def model_fn(params, X):
        return torch.tanh(X @ params.code) @ params.code.T + params.shift

    params = Layers(normal(4, 2, scale=0.5), normal(4, scale=0.1))
    X = normal(5, 4)
    return of_function(model_fn, params, X, X.clone(), nn.MSELoss(), dtype)


def one_tensor(dtype):
    """Parameters are a single matrix; softmax regression."""
    y = torch.tensor([2, 0, 1, 1])
    return of_function(
        lambda W, X: X @ W, normal(3, 3), normal(4, 3), y, nn.CrossEntropyLoss(), dtype
    )


def tuple_of_two(dtype):
    """A tuple of parameters and a tuple of inputs; outputs [N, 2, 3]."""

    def model_fn(params, X):
        left, right = X
        return torch.einsum("nij,jk,nk->nik", left, params[0], right)[..., None] * params[1]

    params = (normal(2, 2), normal(3))
    X = (normal(3, 2, 2), normal(3, 2))
    return of_function(
        lambda p, X: model_fn(p, X).sum(2), params, X, normal(3, 2, 3), nn.MSELoss(), dtype
    )


def written_in_place(dtype):
    """Outputs written column by column into a tensor of the model's own."""

    def model_fn(params, X):
        outputs = X.new_zeros(len(X), 2)
        outputs[:, 0] = torch.sin(X @ params["a"])
        outputs[:, 1] += X[:, 0] * params["b"]
        return outputs

    params = {"a": normal(3), "b": normal(1)[0]}
    return of_function(model_fn, params, normal(4, 3), normal(4, 2), nn.MSELoss(), dtype)


def poisson(dtype):
    """A physics-informed net: the residual u″ + sin at every point by grad, jvp and vmap; [N]."""

    def u(params, x):
        hidden = torch.tanh(params["in"]["weight"][:, 0] * x + params["in"]["bias"])
        return x * (1 - x) * (params["out"] @ hidden)

    def residual(params, x):
        def slope(x):
            return grad(u, argnums=1)(params, x)

        _, curvature = jvp(slope, (x,), (torch.ones_like(x),))
        return curvature + torch.sin(3 * x)

    def model_fn(params, X):
        return vmap(residual, in_dims=(None, 0))(params, X)

    params = {"in": dense_layer(1, 4), "out": normal(4)}
    return of_function(model_fn, params, torch.rand(5), torch.zeros(5), nn.MSELoss(), dtype)


def one_sample(dtype):
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    return of_module(module, normal(1, 3), torch.tensor([1]), nn.CrossEntropyLoss(), dtype)


def one_output(dtype):
    """Binary classification with outputs [N, 1]."""
    module = nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 1))
    y = torch.tensor([[0.0], [1.0], [1.0], [0.0]])
    return of_module(module, normal(4, 3), y, nn.BCEWithLogitsLoss(), dtype)


def more_columns_than_parameters(dtype):
    """NM = 40 columns, D = 9 parameters: the other side of the Gram matrix is smaller."""
    module = nn.Sequential(nn.Linear(2, 1), nn.Tanh(), nn.Linear(1, 3))
    return of_module(module, normal(20, 2), torch.arange(20) % 3, nn.CrossEntropyLoss(), dtype)


def many_points(dtype):
    """NM = 24 columns, D = 6 parameters, one of them a strided view; a squared error."""

    def model_fn(params, X):
        return torch.tanh(X @ params["W"]) @ params["v"]

    params = {"W": normal(2, 2), "v": normal(2, 2)[:, :1]}
    return of_function(model_fn, params, normal(24, 2), normal(24, 1), nn.MSELoss(), dtype)


PROBLEMS = {
    build.__name__: build
    for build in (
        relu_mlp,
        convolution,
        attention,
        encoder_layer,
        eval_batch_norm,
        lstm,
        tanh_mlp,
        list_of_layers,
        tied_autoencoder,
        one_tensor,
        tuple_of_two,
        written_in_place,
        poisson,
        one_sample,
        one_output,
        more_columns_than_parameters,
        many_points,
    )
}


def problem(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Problem:
    """Build one entry; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PROBLEMS[name](dtype)
