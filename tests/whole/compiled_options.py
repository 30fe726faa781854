"""Steps with all options under `torch.compile`: run as a program, ``… compiled_options NAME``.

In a process of its own, as the hook that checks shapes in the tests cannot be compiled.
"""

import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from ddnewton import (
    Batches,
    Group,
    above,
    directional_newton,
    energy,
    monte_carlo,
    newton_step,
    newton_step_and_info,
    prepare,
    top_k,
    trust_region,
)
from ddnewton.criteria import clipped, cross_entropy, empirical_fisher, fisher, majorized, weighted
from ddnewton.damping import bootstrap, signal_to_noise

HOST_READS = ("_local_scalar_dense", "nonzero", "item", "equal")
"""Operations that read a number on the host, or whose result has a size that is read there."""

net = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
ce, mse = nn.CrossEntropyLoss(), nn.MSELoss()


def call(params, X):
    """Return the outputs of the net."""
    return functional_call(net, params, (X,))


def leading_four(evals):
    """Return indices as a user's function makes them, a list of numbers."""
    return [evals.numel() - 4 + i for i in range(4)]


def curved(evals):
    """Return a mask."""
    return evals > 0.1 * evals.amax()


def huber(outputs, y):
    """Return a loss that is not convex in what is inside of it."""
    return F.huber_loss(outputs, y)


torch.manual_seed(0)
PARAMS = {name: torch.randn_like(p) / 2 for name, p in net.named_parameters()}
PREPARED = prepare(call, PARAMS, torch.rand(4, 7))
LAYERS = [[name for name in PARAMS if name.startswith(i)] for i in "024"]
OPTIONS = {
    "the reference example": (mse, 1.0, {"select": top_k(4)}),
    "a number, all directions": (mse, 0.5, {}),
    "a tensor, a complement": (ce, torch.tensor(0.5), {"select": above(0.1), "complement": 0.3}),
    "a rule, energy": (ce, signal_to_noise(), {"select": energy(0.9)}),
    "a user's indices": (mse, 0.5, {"select": leading_four, "scale": 2.0}),
    "groups, a user's mask": (
        ce,
        0.5,
        {"groups": [Group(LAYERS[0], select=curved), Group(LAYERS[1] + LAYERS[2])]},
    ),
    "sub-samples": (
        mse,
        0.5,
        {
            "subsampling_grad": torch.tensor([0, 3]),
            "subsampling_ggn": torch.tensor([0, 1]),
            "subsampling_curvature": torch.tensor([2, 3]),
            "select": top_k(3),
            "scale": dict.fromkeys(PARAMS, 2.0),
        },
    ),
    "scale by columns": (mse, 0.5, {"scale": "jac"}),
    "empirical Fisher": (empirical_fisher(ce), 0.5, {"complement": 0.5}),
    "Fisher, clipped": (clipped(fisher(weighted(ce, 2.0))), 0.5, {}),
    "majorized": (majorized(huber), 0.5, {}),
    "terms": ({"a": mse, "b": mse}, 0.5, {}),
}
"""Criterion, damping and options of steps that are one graph for any number of samples."""


def noisy(outputs, y, count, uniform):
    """Return columns of two draws, one after the other."""
    shift, numbers = uniform(outputs.shape), uniform((*outputs.shape, count))
    return (numbers - shift[..., None]).flatten(1, -2)


DRAWN = {
    "one column, a complement": (lambda draw: draw(ce, 1), {"complement": 0.5}),
    "one criterion for terms": (lambda draw: draw(ce, 1), {"select": top_k(3)}),
    "terms": (
        lambda draw: {
            "b": weighted(draw(ce, 2, per="sequence"), 2.0),
            "a": draw(cross_entropy()._replace(scores=noisy), 1),
        },
        {},
    ),
}
"""Criteria that draw random numbers, and options of their steps."""

LOWERED = (
    "the reference example",
    "a tensor, a complement",
    "sub-samples",
    "one column, a complement",
)
"""Those whose operations are looked at."""

ALONE = {
    "model_fn": "another model_fn",
    "gram": 'gram="dense"',
    "bootstrap": "bootstrap as damping",
    "batches": "Batches as X",
    "trust_region": "a search for a step of some length",
}
"""What is left uncompiled, and how the reason names it."""


def batch(name, n):
    """Return the inputs and targets of a case."""
    generator = torch.Generator().manual_seed(n)
    X = torch.randn(n, 7, generator=generator)
    criterion = OPTIONS[name][0] if name in OPTIONS else ce
    of_classes = criterion is ce or "isher" in name
    y = torch.randint(3, (n,), generator=generator) if of_classes else X[:, :3] ** 2
    return ({"a": X, "b": 2 * X}, {"a": y, "b": -y}) if name == "terms" else (X, y)


def step_of(name):
    """Return the step of a case as a function of parameters and a batch."""
    criterion, damping, options = OPTIONS[name]
    model_fn = {"a": PREPARED, "b": PREPARED} if name == "terms" else PREPARED
    function = newton_step_and_info if "energy" in name else newton_step

    def step(params, X, y):
        return function(model_fn, params, X, y, criterion, damping, **options)

    return step


def forbidden(graph):
    """Return the names of operations that wait for a GPU: host reads, constants from the host."""
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    reads = [name for name in names if any(f"aten.{word}" in name for word in HOST_READS)]
    constants = [
        node.target
        for node in graph.graph.nodes
        if node.op == "get_attr"
        and not isinstance(getattr(graph, node.target), torch.fx.GraphModule)
    ]
    return reads + constants


def one_graph(name, lowered):
    """Compile a step, and require one graph for several numbers of samples.

    Where it is ``lowered`` to operations, none of them may wait for a GPU.
    """
    torch._dynamo.config.error_on_recompile = True
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward) if lowered else graph.forward

    step, backend = step_of(name), aot_autograd(fw_compiler=keep) if lowered else keep
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for n in (6, 9, 5):
        X, y = batch(name, n)
        for leaf in tree_leaves((X, y)):
            torch._dynamo.mark_dynamic(leaf, 0)
        close(compiled(PARAMS, X, y), step(PARAMS, X, y))
    assert len(graphs) == 1, len(graphs)
    waiting = forbidden(graphs[0]) if lowered else []
    assert not waiting, waiting


def close(one, other):
    """Require trees of tensors to be the same up to rounding."""
    for a, b in zip(tree_leaves(one), tree_leaves(other), strict=True):
        if a.shape == b.shape:  # where None selects, all directions are there, with a mask
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def drawn(name):
    """Compile a step that draws: one graph behind its seeds, for any of them and any batch."""
    make, options = DRAWN[name]
    model_fn = dict.fromkeys("ab", PREPARED) if "terms" in name else PREPARED
    graphs, lowered = [], name in LOWERED

    def step(params, X, y, criterion):
        return newton_step(model_fn, params, X, y, criterion, 0.5, **options)

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward) if lowered else graph.forward

    def of_generator(seed):
        generator = torch.Generator().manual_seed(seed)
        return generator, make(partial(monte_carlo, generator=generator))

    # The same steps, and the same states of the generators behind them.
    torch._dynamo.config.error_on_recompile = True
    compiled = torch.compile(step, backend=aot_autograd(fw_compiler=keep) if lowered else keep)
    for seed, sizes in ((0, (6, 9)), (1, (5,))):
        (one, given), (other, same) = (of_generator(seed) for _ in range(2))
        for n in sizes:
            X, y = batch("empirical Fisher", n)
            for leaf in (X, y):
                torch._dynamo.mark_dynamic(leaf, 0)
            X, y = (dict.fromkeys("ab", leaf) if "terms" in name else leaf for leaf in (X, y))
            close(compiled(PARAMS, X, y, given), step(PARAMS, X, y, same))
            assert torch.equal(one.get_state(), other.get_state())
    assert len(graphs) == 1, len(graphs)
    waiting = forbidden(graphs[0]) if lowered else []
    assert not waiting, waiting
    # A single graph of it all is refused, by name.
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match=r"draws no seed; got monte_carlo as criterion\."):
        torch.compile(step, backend="eager", fullgraph=True)(PARAMS, X, y, given)


def by_inductor(name):
    """Compile a step for one number of samples by C++."""
    X, y = batch(name, 4)
    compiled = torch.compile(step_of(name), fullgraph=True, dynamic=False)
    close(compiled(PARAMS, X, y), step_of(name)(PARAMS, X, y))


def left_alone(name):
    """Require a step that is left uncompiled to be right, and refused where one graph is a must."""
    X, y = batch(name, 6)
    model_fn = call if name == "model_fn" else PREPARED
    gram = "dense" if name == "gram" else "auto"
    if name == "batches":
        X, y = Batches([(X[:3], y[:3]), (X[3:], y[3:])]), None
    optimizer = directional_newton(PREPARED, ce, trust_region())
    state = optimizer.init(PARAMS)

    def step(params, X, y, generator):
        if name == "trust_region":
            return optimizer.update(params, state, X, y)[0]
        damping = bootstrap([0.1, 1.0], generator, 10) if name == "bootstrap" else 0.5
        return newton_step(model_fn, params, X, y, ce, damping, gram=gram)

    first, second = (torch.Generator().manual_seed(1) for _ in range(2))
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=f"got {ALONE[name]}."):
        compiled(PARAMS, X, y, first)
    compiled = torch.compile(step, backend="eager")
    close(compiled(PARAMS, X, y, first), step(PARAMS, X, y, second))


if __name__ == "__main__":
    way, *names = sys.argv[1:]
    for name in names:
        torch.compiler.reset()
        ways = {"inductor": by_inductor, "alone": left_alone, "drawn": drawn}
        ways.get(way, partial(one_graph, lowered=name in LOWERED))(name)
        sys.stdout.write(f"{name}\n")
        sys.stdout.flush()
