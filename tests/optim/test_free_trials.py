"""Trial steps by products: what an update costs, and that nothing is made twice."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from ddnewton import directional_newton
from ddnewton.optim.free_matrices import PROBES
from ddnewton.quadratic.matrix_free.sample_operator import SampleOperator

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(12, 5, generator=GENERATOR), torch.randint(3, (12,), generator=GENERATOR)


@pytest.fixture
def net():
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
    params = {name: p.detach() for name, p in module.named_parameters()}
    return lambda params, X: functional_call(module, params, (X,)), params


@pytest.fixture
def products(monkeypatch):
    """Return how many products with G, and how many curvatures, are made."""
    counts = {"product": 0, "curvature": 0}
    product, curvatures = SampleOperator.product, SampleOperator.curvatures

    def counted_product(self, vectors):
        counts["product"] += len(vectors)
        return product(self, vectors)

    def counted_curvatures(self, vectors):
        counts["curvature"] += len(vectors)
        return curvatures(self, vectors)

    monkeypatch.setattr(SampleOperator, "product", counted_product)
    monkeypatch.setattr(SampleOperator, "curvatures", counted_curvatures)
    return counts


def updated(net, ways, **options):
    """Return the records of three updates by every way."""
    model_fn, first = net
    for gram in ways:
        optimizer = directional_newton(
            model_fn, nn.CrossEntropyLoss(), complement="damping", gram=gram, tol=1e-12, **options
        )
        params, state, infos = first, optimizer.init(first), []
        for _ in range(3):
            params, state, info = optimizer.update(params, state, X, Y)
            infos.append(info)
        yield infos


OPTIONS = {
    "plain": {"damping": 0.1},
    "rate": {"damping": 0.1, "learning_rate": 0.3},
    "momentum": {"damping": 0.1, "momentum": 0.9, "learning_rate": 0.5},
    "decay": {"damping": 0.1, "momentum": 0.5, "weight_decay": 0.01},
    "radius": {"damping": 1e-3, "trust_radius": 0.1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_predicted_decrease_is_that_of_the_matrix(net, options):
    by_matrix, by_products = updated(net, ("auto", "free"), **options)
    for exact, free in zip(by_matrix, by_products, strict=True):
        torch.testing.assert_close(
            free.predicted_decrease, exact.predicted_decrease, rtol=1e-5, atol=0
        )


def test_what_an_update_multiplies(net, products):
    """Of a step that one product is enough for: that, and the trace by halves of a few products."""
    model_fn, params = net
    optimizer = directional_newton(
        model_fn, nn.CrossEntropyLoss(), 1e3, complement="damping", gram="free", tol=0.5
    )
    optimizer.update(params, optimizer.init(params), X, Y)
    assert products == {"product": 1, "curvature": PROBES}
