"""Modules whose parameters are DTensors: tensor-parallel plans, and what FSDP leaves."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.func import functional_call

import ddnewton
from ddnewton import as_function, directional_newton, newton_step, prepare
from ddnewton.optim import DirectionalNewton
from tests import reference
from tests.distributed.meshes import gathered, mesh_of, placed, same_on_all, texts_of
from tests.distributed.test_dtensors import PLACES, arguments_on_mesh, net, params

WIDTH, HEADS, CLASSES = 8, 2, 3


class Block(nn.Module):
    """A transformer block whose heads may be on different ranks."""

    def __init__(self):
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        n, t, _ = x.shape
        normed = self.before(x)
        heads = (
            layer(normed).view(n, t, -1, WIDTH // HEADS).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        attended = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).reshape(n, t, -1))
        return x + self.down(nn.functional.gelu(self.up(self.between(x))))


class Transformer(nn.Module):
    """An embedding, two blocks, and logits of the mean."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens):
        return self.head(self.blocks(self.embedding(tokens)).mean(1))


PLAN = {
    f"blocks.{number}.{name}": way()
    for number in range(2)
    for name, way in [
        *((name, ColwiseParallel) for name in ("q", "k", "v", "up")),
        *((name, RowwiseParallel) for name in ("o", "down")),
    ]
}


def transformer():
    torch.manual_seed(0)
    return Transformer().double()


def tokens():
    generator = torch.Generator().manual_seed(1)
    shapes = ((7, (4, 3)), (CLASSES, (4,)))
    return [torch.randint(high, shape, generator=generator) for high, shape in shapes]


def by_plan(rank):
    """A step of a module with a plan, and how it is placed."""
    model_fn, P = as_function(parallelize_module(transformer(), mesh_of(), PLAN))
    loss = nn.CrossEntropyLoss()
    step = newton_step(model_fn, P, *tokens(), loss, 1.0, complement=1.0, tol=1e-24)
    return gathered(step), texts_of(step)


def test_a_tensor_parallel_plan(two):
    results = two.results(by_plan)
    step, texts = results[0]
    model_fn, P = as_function(transformer())
    problem = reference.dense(model_fn, P, *tokens(), nn.CrossEntropyLoss())
    assert reference.error(step, reference.solve(problem, 1.0)) < 1e-10
    # In front of q, whose input becomes a DTensor inside, are parameters that stay plain.
    names = ("q.weight", "o.weight", "o.bias", "before.weight")
    assert [texts[f"blocks.1.{name}"] for name in names] == ["0", "1", "r", ""]
    assert same_on_all([of[0] for of in results])


def trained(rank, plan, folder, options):
    """Three steps in place, the state saved by shards after two and loaded by a new optimizer."""
    module = transformer()
    if plan:
        parallelize_module(module, mesh_of(), PLAN)
    gram = "auto" if plan else "free"
    loss = nn.CrossEntropyLoss()

    def make(module):
        return DirectionalNewton(module, loss, gram=gram, tol=1e-26, **options)

    optimizer, tensors = make(module), dict(module.named_parameters())
    losses = [float(optimizer.step(*tokens())) for _ in range(2)]
    state = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
    if plan:
        checkpoint.save(state, checkpoint_id=folder)
        module = copy.deepcopy(module)
        for p in module.parameters():
            p.data.mul_(0)
        optimizer = make(module)
        state["module"] = module.state_dict()
        checkpoint.load(state, checkpoint_id=folder)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
    losses.append(float(optimizer.step(*tokens())))
    same = [p is tensors[name] for name, p in module.named_parameters()]
    return (
        losses,
        gathered({name: p.detach() for name, p in module.named_parameters()}),
        same[0] != plan,
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"damping": 0.1, "momentum": 0.5, "complement": "damping"}],
    ids=["trust region", "momentum"],
)
def test_a_module_is_trained_in_place(two, tmp_path, options):
    by_shards = two.results(trained, True, tmp_path / "shards", options)
    losses, weights, in_place = two.results(trained, False, tmp_path / "whole", options)[0]
    assert by_shards[0][0] == pytest.approx(losses, rel=1e-9)
    assert losses[2] < losses[0]
    assert (by_shards[0][2], in_place) == (True, True)
    assert reference.error(by_shards[0][1], weights) < 1e-8
    assert same_on_all([of[1] for of in by_shards])


def wrapped_by_fsdp():
    module = transformer()
    for block in module.blocks:
        fully_shard(block, mesh=mesh_of())
    return fully_shard(module, mesh=mesh_of())


def of_fsdp(rank, inputs):
    """A step of the shards of a module of FSDP, by a copy of it without values."""
    with torch.device("meta"):
        empty = Transformer()
    module, (X, y) = wrapped_by_fsdp(), tokens()
    P = dict(module.named_parameters())

    def model_fn(p, x):
        return functional_call(empty, {name: leaf.full_tensor() for name, leaf in p.items()}, (x,))

    options = {"complement": 1.0, "tol": 1e-24}
    X = placed(X, inputs, mesh_of())
    step = newton_step(model_fn, P, X, y, nn.CrossEntropyLoss(), 1.0, **options)
    with torch.no_grad():
        for name, p in P.items():
            p.add_(step[name])
    return gathered(step), texts_of(step) == texts_of(P), module(tokens()[0]).detach()


@pytest.mark.parametrize("inputs", ["", "0"], ids=["plain", "sharded"])
def test_shards_of_fsdp(two, inputs):
    step, placed_alike, outputs = two.results(of_fsdp, inputs)[0]
    model_fn, P = as_function(transformer())
    problem = reference.dense(model_fn, P, *tokens(), nn.CrossEntropyLoss())
    assert placed_alike
    assert reference.error(step, reference.solve(problem, 1.0)) < 1e-10
    moved = {name: leaf + step[name] for name, leaf in P.items()}
    torch.testing.assert_close(outputs, model_fn(moved, tokens()[0]), rtol=0, atol=1e-12)


def of_own_samples(rank, gram):
    """A step of shards where every rank has samples of its own, and gathers its parameters."""
    with torch.device("meta"):
        empty = Transformer()
    P, (X, y) = dict(wrapped_by_fsdp().named_parameters()), tokens()
    own = slice(0, 3) if rank == 0 else slice(3, 4)
    step = newton_step(
        *(as_function(empty)[0], P, X[own], y[own], nn.CrossEntropyLoss(), 1.0),
        complement=1.0,
        gram=gram,
        process_group=mesh_of(),
    )
    return gathered(step), texts_of(step) == texts_of(P)


@pytest.mark.parametrize("gram", ["auto", "dense"])
def test_shards_of_ranks_with_samples_of_their_own(two, gram):
    results = two.results(of_own_samples, gram)
    model_fn, P = as_function(transformer())
    problem = reference.dense(model_fn, P, *tokens(), nn.CrossEntropyLoss())
    assert reference.error(results[0][0], reference.solve(problem, 1.0)) < 1e-10
    assert results[0][1]


class Constant(torch.autograd.Function):
    """The identity, whose derivative has none of its own."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        with torch.no_grad():
            return 1 * gradient


def broken(p, x):
    return net(p | {"w": Constant.apply(p["w"])}, x)


def partly(p, x):
    """Outputs that a rank has, in place of all of them."""
    return p["w"].to_local()[:2].sum() * x[:, :3]


def refused(rank, name):
    model_fn, P, X, y, loss = arguments_on_mesh(PLACES["rows"])
    problem = (model_fn, P, X, y, loss)
    whole = params()
    inputs = placed(X, "0", mesh_of())

    def updated(targets=y, **options):
        optimizer = directional_newton(model_fn, loss, **options)
        return optimizer.update(P, optimizer.init(P), X, targets)

    calls = {
        "structured": lambda: newton_step(*problem, 0.1, gram="structured"),
        "dense": lambda: ddnewton.ggn_eigh(*problem, gram="dense"),
        "dense update": lambda: updated(gram="dense"),
        "dense fit": lambda: ddnewton.fit(*problem, gram="dense"),
        "scale": lambda: newton_step(*problem, 0.1, scale="jac"),
        "scale of an update": lambda: updated(scale="jac"),
        "eigenvalues": lambda: ddnewton.ggn_eigvalsh(*problem),
        "Gram matrix": lambda: ddnewton.gram_matrix(*problem),
        "covariance": lambda: ddnewton.covariance(*problem),
        "standard errors": lambda: ddnewton.standard_errors(*problem),
        "prepare": lambda: prepare(model_fn, P, X),
        "prepared": lambda: newton_step(prepare(model_fn, whole, X), *problem[1:], 0.1),
        "seconds": lambda: ddnewton.fit(*problem, max_seconds=1.0),
        "inputs alone": lambda: newton_step(model_fn, whole, inputs, y, loss, 0.1),
        "FSDP": lambda: as_function(wrapped_by_fsdp()),
        "FSDP in place": lambda: DirectionalNewton(wrapped_by_fsdp(), loss),
        "samples of its own": lambda: newton_step(model_fn, P, X + rank, y, loss, 0.1),
        "targets of its own": lambda: updated(targets=y + rank),
        "options of its own": lambda: newton_step(*problem, 0.1 + rank),
        "outputs of its own": lambda: newton_step(partly, *problem[1:], 0.1),
        "one derivative": lambda: newton_step(broken, *problem[1:], 0.1),
    }
    if name == "FSDP in a function":
        module, (X, y) = wrapped_by_fsdp(), tokens()
        P = dict(module.named_parameters())
        newton_step(
            lambda p, x: functional_call(module, p, (x,)), P, X, y, nn.CrossEntropyLoss(), 0.1
        )
    calls[name]()


MESSAGES = {
    "structured": r'newton_step: gram must be "free" or "auto" where params are DTensors; got',
    "dense": r'ggn_eigh: gram must be "free" or "auto".*Leave gram at "auto", or pass "free"',
    "dense update": r'update: gram must be "free" or "auto" where params are DTensors',
    "dense fit": r'fit: gram must be "free" or "auto" where params are DTensors',
    "scale": r'newton_step: gram="free" must have a scale that is given',
    "scale of an update": r'update: gram="free" must have a scale that is given',
    "eigenvalues": r"ggn_eigvalsh: all eigenvalues needs the matrix itself; got params",
    "Gram matrix": r'gram_matrix: the Gram matrix needs .* Ask for what products give, gram="free"',
    "covariance": r"covariance: a covariance needs the matrix itself; got .* p.full_tensor\(\)",
    "standard errors": r"standard_errors: a covariance needs .* DTensors",
    "prepare": r"prepare: prepare needs tensors that are whole; got DTensors. Pass model_fn itself",
    "prepared": r"newton_step: model_fn must not be prepared where params are DTensors",
    "seconds": r"fit: max_seconds must be None where params are DTensors; got 1.0. Clocks of ranks",
    "inputs alone": r"newton_step: X and y may hold DTensors only where params do",
    "FSDP": r"as_function: a module must be called with any parameters, which FSDP replaces",
    "FSDP in place": r"DirectionalNewton: a module must be .*FSDPTransformer.*_call\(copy",
    "FSDP in a function": r"newton_step: model_fn: a module .* dict\(module.named_par",
    "samples of its own": r"newton_step: X must be the same on all ranks where params are DTensors",
    "targets of its own": r"update: y must be the same on all ranks.* Pass the whole batch on each",
    "options of its own": r"newton_step: damping must be the same on all ranks",
    "outputs of its own": r"newton_step: plain tensors that leave a model of DTensors must be the",
    "one derivative": r"newton_step: model_fn must have two derivatives .*; got uᵀ\(J v\)",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_refusals(two, name):
    for outcome in two.run(refused, name):
        kind, message = outcome.error
        assert kind in ("BadValue", "BadType"), outcome.traceback
        assert re.search(MESSAGES[name], message), message
