"""Graphs without constants to be computed and operations that come twice."""

import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from ddnewton import prepare
from ddnewton.linearize.structured.simplified import simplified


def targets(graph) -> list:
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def test_constants_are_computed_and_nothing_twice():
    def function(x):
        ones = torch.eye(3).sum(0) * 2
        return (x * ones).sin() + (x * ones).sin(), torch.ones(2)

    x = torch.randn(3)
    graph = make_fx(function)(x)
    simple = simplified(graph)
    aten = torch.ops.aten
    assert targets(simple) == [aten.mul.Tensor, aten.sin.default, aten.add.Tensor]
    for mine, theirs in zip(simple(x), function(x), strict=True):
        assert torch.equal(mine, theirs)


def test_random_numbers_are_drawn_anew_and_one_by_one():
    graph = make_fx(lambda x: x + torch.rand(3) - torch.rand(3))(torch.zeros(3))
    simple = simplified(graph)
    assert targets(simple).count(torch.ops.aten.rand.default) == 2
    torch.manual_seed(0)
    first = simple(torch.zeros(3))
    assert not torch.equal(first, simple(torch.zeros(3)))
    torch.manual_seed(0)
    assert torch.equal(first, graph(torch.zeros(3)))


def test_large_constants_are_made_when_asked_for(monkeypatch):
    monkeypatch.setattr("ddnewton.linearize.structured.simplified.CONSTANT_ENTRIES", 2)
    graph = make_fx(lambda x: x + torch.ones(3))(torch.zeros(3))
    assert targets(simplified(graph)) == targets(graph)


def test_programs_of_derivatives_get_shorter():
    """Inside a residual the forward pass comes several times."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    params = {name: p.detach() for name, p in net.named_parameters()}

    def residual(params, x):
        def u(x):
            return functional_call(net, params, (x,))[0]

        axes = torch.eye(2, dtype=x.dtype)
        return sum(jvp(grad(u), (x,), (axis,))[1] @ axis for axis in axes)

    model_fn, X = vmap(residual, (None, 0)), torch.rand(5, 2).double()
    prepared = prepare(model_fn, params, X)
    assert len(targets(prepared.narrow.plain)) < len(targets(prepared.sample))
    assert torch.allclose(prepared(params, X), model_fn(params, X), rtol=1e-12)
