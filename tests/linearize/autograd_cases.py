"""Models that autograd differentiates and torch.func refuses, with what they compute in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from tests.models import normal
from tests.reference import dense

N = 5


class Case(NamedTuple):
    """A model at a batch, and the same function as the reference takes it."""

    model_fn: Callable[[Any, Any], Tensor]
    params: Any
    X: Any
    reference: Callable[[Any, Any], Tensor]


def hidden(p, x):
    return torch.tanh(x @ p["W"] + p["b"]) @ p["v"]


def weights(d: int, c: int, dtype=torch.float64) -> dict[str, Tensor]:
    params = {"W": normal(d, 4), "b": normal(4), "v": normal(4, c)}
    return {name: p.to(dtype) for name, p in params.items()}


def physics_informed(dtype) -> Case:
    """As the tutorials write it: u'' + u by torch.autograd.grad, whatever mode it is called in."""

    def residual(p, x):
        x = x.detach().requires_grad_(True)
        with torch.enable_grad():
            u = hidden(p, x)
            first = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
            second = torch.autograd.grad(first.sum(), x, create_graph=True)[0]
        return second + u

    return Case(residual, weights(1, 1, dtype), normal(N, 1).to(dtype), residual)


def ambient(dtype) -> Case:
    """It relies on autograd being on where it is called, as it is in anyone's loop."""

    def residual(p, x):
        x.requires_grad_(True)
        u = hidden(p, x)
        return torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)[0] - u

    return Case(residual, weights(2, 1, dtype), normal(N, 2).to(dtype), residual)


def samples_that_require_a_gradient(dtype) -> Case:
    """Collocation points made with requires_grad=True, outside of the model."""

    def slope(p, x):
        return torch.autograd.grad(hidden(p, x).sum(), x, create_graph=True)[0]

    X = normal(N, 2).to(dtype).requires_grad_()
    return Case(slope, weights(2, 1, dtype), X, lambda p, x: slope(p, x.requires_grad_()))


def force_field(dtype) -> Case:
    """Energy and forces of molecules of four atoms."""

    def energy_and_forces(p, X):
        with torch.enable_grad():
            at = X["positions"].requires_grad_()
            distances = (at[:, :, None] - at[:, None]).square().sum(-1).add(1e-3).sqrt()
            energy = hidden(p, distances * X["charges"][:, None]).sum((1, 2))
            forces = -torch.autograd.grad(energy.sum(), at, create_graph=True)[0]
        return torch.cat([energy[:, None], forces.flatten(1)], 1)

    X = {"positions": normal(N, 4, 3).to(dtype), "charges": normal(N, 4).to(dtype)}
    return Case(energy_and_forces, weights(4, 1, dtype), X, energy_and_forces)


def inner_steps(dtype) -> Case:
    """Two steps of gradient descent inside, along which the outer derivatives go (MAML)."""

    def adapted(p, X):
        support, query = X
        outputs = []
        with torch.enable_grad():
            for s, q in zip(support, query, strict=True):
                fast = {name: leaf.clone() for name, leaf in p.items()}
                for _ in range(2):
                    loss = (hidden(fast, s) - s.sum(1, keepdim=True)).square().mean()
                    grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                    pairs = zip(fast.items(), grads, strict=True)
                    fast = {name: leaf - 0.1 * g for (name, leaf), g in pairs}
                outputs.append(hidden(fast, q)[:, 0])
        return torch.stack(outputs)

    X = (normal(N, 6, 2).to(dtype), normal(N, 3, 2).to(dtype))
    return Case(adapted, weights(2, 1, dtype), X, adapted)


def stopped(dtype) -> Case:
    """What the model itself detaches stays a constant, whatever autograd detaches of its own."""

    def residual(p, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            u = hidden(p, x)
            slope = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
            return u + slope * u.detach() + slope.data.square()

    return Case(residual, weights(1, 1, dtype), normal(N, 1).to(dtype), residual)


def laplacian(net):
    def residual(p, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            u = functional_call(net, p, (x,))
            slopes = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
            terms = [
                torch.autograd.grad(slopes[:, i].sum(), x, create_graph=True)[0][:, i]
                for i in range(2)
            ]
        return torch.stack(terms, 1).sum(1, keepdim=True) + u

    return residual


def normalized(dtype) -> Case:
    """Second derivatives of group norm and layer norm."""
    net = nn.Sequential(
        nn.Linear(2, 6), nn.GroupNorm(2, 6), nn.SiLU(), nn.LayerNorm(6), nn.Linear(6, 1)
    ).to(dtype)
    params = {name: p.detach() + 0.1 for name, p in net.named_parameters()}
    twin = nn.Sequential(
        nn.Linear(2, 6), nn.GroupNorm(2, 6), nn.SiLU(), nn.LayerNorm(6), nn.Linear(6, 1)
    ).double()
    return Case(laplacian(net), params, normal(N, 2).to(dtype), laplacian(twin))


class Recurrent(nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        self.rnn = kind(2, 3, batch_first=True)
        self.out = nn.Linear(3, 2)

    def forward(self, X):
        x, lengths = X
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        state = self.rnn(packed)[1]
        return self.out((state[0] if isinstance(state, tuple) else state)[-1])


def of_modules(net: nn.Module, reference: nn.Module, X, dtype) -> Case:
    """A module at parameters other than its own, and a twin for the reference."""
    net, reference = net.to(dtype).eval(), reference.double().eval()
    return Case(
        lambda p, x: functional_call(net, p, (x,)),
        {name: p.detach() + 0.1 for name, p in net.named_parameters()},
        X,
        lambda p, x: functional_call(reference, p, (x,)),
    )


def packed(kind, dtype) -> Case:
    X = (normal(N, 4, 2).to(dtype), torch.tensor([4, 1, 3, 2, 4]))
    return of_modules(Recurrent(kind), Recurrent(kind), X, dtype)


def sparse_embedding(dtype) -> Case:
    def net(sparse):
        return nn.Sequential(
            nn.Embedding(7, 3, sparse=sparse), nn.Flatten(), nn.Linear(6, 2), nn.Tanh()
        )

    X = torch.randint(7, (N, 2), generator=torch.Generator().manual_seed(0))
    return of_modules(net(True), net(False), X, dtype)


def sparse_bag(dtype) -> Case:
    def net(sparse):
        return nn.Sequential(nn.EmbeddingBag(7, 3, sparse=sparse, mode="sum"), nn.Linear(3, 2))

    X = torch.randint(7, (N, 2), generator=torch.Generator().manual_seed(0))
    return of_modules(net(True), net(False), X, dtype)


def compressed_rows(dtype) -> Case:
    """A constant operator in compressed sparse rows, as a Laplacian on a mesh."""
    A = normal(6, 6).to(dtype) * (normal(6, 6) > 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are in beta state
        sparse, wide = A.to_sparse_csr(), A.double()
    return Case(
        lambda p, x: torch.tanh(sparse @ (x @ p["W"]).mT).mT @ p["v"] + p["b"].sum(),
        {"W": normal(3, 6).to(dtype), "b": normal(4).to(dtype), "v": normal(6, 2).to(dtype)},
        normal(N, 3).to(dtype),
        lambda p, x: torch.tanh(wide @ (x @ p["W"]).mT).mT @ p["v"] + p["b"].sum(),
    )


def sparse_samples(dtype) -> Case:
    """Samples in compressed sparse rows, as bags of words."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        X = (normal(N, 3).to(dtype) * (normal(N, 3) > 0)).to_sparse_csr()
    return Case(
        lambda p, x: torch.tanh(torch.sparse.mm(x, p["W"]) + p["b"]) @ p["v"],
        weights(3, 2, dtype),
        X,
        lambda p, x: hidden(p, x.to_dense()),
    )


class Checkpointed(nn.Module):
    """Its own parameters are not those that it is called with: they must not get in."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.options = options

    def forward(self, x):
        x = torch.tanh(self.first(x))

        def block(x):
            return torch.tanh(self.middle(torch.sin(self.middle(x))))

        return self.last(checkpoint(block, x, **self.options) if self.options else block(x))


def checkpointed(dtype) -> Case:
    net, reference = Checkpointed(use_reentrant=False), Checkpointed()
    return of_modules(net, reference, normal(N, 3).to(dtype), dtype)


class Cube(torch.autograd.Function):
    """As they were written before there was setup_context."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


def own_function(dtype) -> Case:
    return Case(
        lambda p, x: Cube.apply(x @ p["W"] + p["b"]) @ p["v"],
        weights(3, 2, dtype),
        normal(N, 3).to(dtype),
        lambda p, x: (x @ p["W"] + p["b"]) ** 3 @ p["v"],
    )


@torch.library.custom_op("ddnewton_tests::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    return x**3


cube.register_autograd(
    lambda ctx, g: 3 * ctx.saved_tensors[0] ** 2 * g,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def own_operation(dtype) -> Case:
    """Of torch.library: no rule for vmap, and none for fake tensors."""
    return own_function(dtype)._replace(
        model_fn=lambda p, x: cube(x @ p["W"] + p["b"]) @ p["v"],
    )


def _scripted(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    y = x @ W + b
    for _ in range(2):
        y = torch.tanh(y)
    return y


def scripted(dtype) -> Case:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are to be compiled instead
        script = torch.jit.script(_scripted)
    return Case(
        lambda p, x: script(x, p["W"], p["b"]) @ p["v"],
        weights(3, 2, dtype),
        normal(N, 3).to(dtype),
        lambda p, x: _scripted(x, p["W"], p["b"]) @ p["v"],
    )


CASES: dict[str, Callable[[torch.dtype], Case]] = {
    "physics-informed": physics_informed,
    "ambient autograd": ambient,
    "samples with gradients": samples_that_require_a_gradient,
    "force field": force_field,
    "inner steps": inner_steps,
    "stop-gradient": stopped,
    "norms": normalized,
    "packed LSTM": lambda dtype: packed(nn.LSTM, dtype),
    "packed GRU": lambda dtype: packed(nn.GRU, dtype),
    "sparse embedding": sparse_embedding,
    "sparse bag": sparse_bag,
    "compressed rows": compressed_rows,
    "sparse samples": sparse_samples,
    "checkpoint": checkpointed,
    "autograd.Function": own_function,
    "torch.library": own_operation,
    "TorchScript": scripted,
}

UNTRACEABLE = {"packed LSTM", "packed GRU", "sparse bag", "compressed rows", "sparse samples"}
"""Those that only autograd takes; of the others torch.func takes a trace."""


def value(model_fn, params, X):
    """The outputs, as in anyone's loop: of parameters that require a gradient."""
    params = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    return model_fn(params, X).detach()


def given_and_truth(name, dtype):
    torch.manual_seed(0)
    model_fn, params, X, reference = CASES[name](dtype)
    y = torch.cos(value(model_fn, params, X) + 1)
    return (model_fn, params, X, y, nn.MSELoss()), dense(reference, params, X, y, nn.MSELoss())
