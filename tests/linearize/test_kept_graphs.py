"""How many samples a product visits at once is decided by what a sample takes."""

import torch
from torch import nn
from torch.func import functional_call

from ddnewton.linearize import jacobian_products, kept_graphs
from ddnewton.linearize.free_linearization import linearized_freely


def samples_at_once(net, X, chunk_size=None):
    def model_fn(params, X):
        return functional_call(net, params, (X,))

    params = {name: p.detach() for name, p in net.named_parameters()}
    with linearized_freely(model_fn, params, X, chunk_size) as linearization:
        return linearization.samples_at_once


def test_parameters_are_not_counted_for_every_sample(monkeypatch):
    # The copies of the parameters, 40 kB, are in the graph of one sample as in that of all.
    net = nn.Sequential(nn.Linear(3, 100), nn.Tanh(), nn.Linear(100, 100), nn.Tanh())
    monkeypatch.setattr(kept_graphs, "KEPT_BYTES", 10**6)
    assert samples_at_once(net, torch.randn(100, 3)) == 100
    monkeypatch.setattr(kept_graphs, "CHUNK_BYTES", 10**5)
    assert 1 < samples_at_once(net, torch.randn(2000, 3)) < 200
    assert samples_at_once(net, torch.randn(2000, 3), chunk_size=7) == 7
    assert [samples_at_once(net, torch.randn(n, 3)) for n in (1, 2, 3)] == [1, 2, 3]


def test_the_graph_of_the_pullback_is_made_once_it_is_asked_for(monkeypatch):
    made, backward = [], jacobian_products._backward

    def counted(*arguments, create_graph=False):
        made.append(create_graph)
        return backward(*arguments, create_graph=create_graph)

    monkeypatch.setattr(jacobian_products, "_backward", counted)
    W, x = torch.randn(2, 3), torch.randn(5, 3)
    products = jacobian_products.products_of(lambda leaves: (x @ leaves[0].T).tanh(), [W], [0])
    products.pull(torch.ones(5, 2))
    assert made == [False]
    for _ in range(2):
        products.push([torch.ones(2, 3)])
    assert made == [False, True, False, False]
