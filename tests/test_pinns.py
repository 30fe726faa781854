"""The published physics-informed nets are those that were published: sizes, weights, solutions."""

import json
import math
from itertools import pairwise

import pytest
import torch
from torch.func import grad, hessian, vmap

from benchmarks.training import pdes, pinns
from benchmarks.training.instances import batches, soft
from benchmarks.training.pinns import SOFT_PROBLEMS

PI = math.pi
SOLUTIONS = {
    "engd-poisson-2d": lambda x: torch.sin(PI * x).prod(),
    "engd-heat": lambda x: torch.exp(-(PI**2) * x[0] / 4) * torch.sin(PI * x[1]),
    "engd-poisson-5d": lambda x: torch.sin(PI * x).sum(),
    "poisson-10d": lambda x: x[0::2] @ x[1::2],
    "poisson-5d": lambda x: torch.cos(torch.pi * x).sum(),
    "diffusivity": lambda x: torch.exp(-(PI**2) * x[0] / 4) * torch.sin(PI * x[1]),
}
# Parameters, and the rows of every term, as the papers' code has them.
SIZES = {
    "engd-poisson-2d": (129, (784, 116)),
    "engd-heat": (257, (784, 29, 29, 29)),
    "engd-poisson-5d": (449, (4000, 500)),
    "poisson-10d": (118145, (100, 50)),
    "poisson-5d": (10065, (3000, 500)),
    "diffusivity": (258, (784, 100)),
}


@pytest.mark.parametrize("name", SOFT_PROBLEMS)
def test_sizes_are_the_published(name):
    problem = SOFT_PROBLEMS[name]()
    entries, rows = SIZES[name]
    assert sum(p.numel() for p in problem.start(0).values()) == entries
    X = problem.batch(torch.Generator().manual_seed(0))
    assert [int((X[:, -2] == term).sum()) for term in range(len(rows))] == list(rows)


@pytest.mark.parametrize("name", SOFT_PROBLEMS)
def test_the_mean_square_of_all_rows_is_the_weighted_sum_of_the_terms(name):
    problem = SOFT_PROBLEMS[name]()
    params, X = problem.start(0), problem.batch(torch.Generator().manual_seed(0))
    residual = problem.residual(params, X[:, :-2], X[:, -2])
    terms = sum(
        weight * residual[X[:, -2] == term].square().mean()
        for term, weight in enumerate(problem.weights)
    )
    torch.testing.assert_close(problem.model_fn(params, X).square().mean(), terms)


@pytest.mark.parametrize("name", SOFT_PROBLEMS)
def test_the_solution_has_no_residual_in_any_term(name, monkeypatch):
    u = SOLUTIONS[name]

    def jet(params, X):
        second = vmap(hessian(u))(X).diagonal(dim1=1, dim2=2)
        return pdes.Jet(vmap(u)(X), vmap(grad(u))(X), second)

    monkeypatch.setattr(pinns, "net_jet", jet)
    monkeypatch.setattr(
        pinns, "net_laplacian", lambda p, X: (jet(p, X).value, jet(p, X).second.sum(1))
    )
    problem = SOFT_PROBLEMS[name]()
    X = problem.batch(torch.Generator().manual_seed(0))[::7]
    params = {"diffusivity": torch.tensor(0.25, dtype=torch.float64)}
    assert problem.model_fn(params, X).abs().max() < 1e-12
    monkeypatch.setattr(pinns, "_net", lambda params, x: vmap(u)(x))
    assert SOFT_PROBLEMS[name]().error(params) < 1e-14


@pytest.mark.parametrize("name", SOFT_PROBLEMS)
def test_points_of_the_edge_terms_lie_on_the_edge(name):
    problem = SOFT_PROBLEMS[name]()
    X = problem.batch(torch.Generator().manual_seed(0))
    x, term = X[:, :-2], X[:, -2]
    on_edge = ((x == 0) | (x == 1)).any(1)
    assert not on_edge[term == 0].any()
    if name != "diffusivity":  # whose data lie inside
        assert on_edge[term > 0].all()
    assert len({tuple(row) for row in x.tolist()}) >= len(x) - 2  # two corners of the heat equation


def test_a_laplacian_is_the_sum_of_a_jet_s_second_derivatives():
    params = SOFT_PROBLEMS["poisson-10d"]().start(0)
    X = torch.rand(5, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    jet, (value, laplacian) = pdes.net_jet(params, X), pdes.net_laplacian(params, X)
    torch.testing.assert_close(value, jet.value)
    torch.testing.assert_close(laplacian, jet.second.sum(1))
    torch.testing.assert_close(pinns._net(params, X), value)


def test_points_are_new_in_every_step_where_they_are_drawn_and_only_there():
    for name, new in (("poisson-10d", True), ("engd-heat", False)):
        instance = soft(SOFT_PROBLEMS[name], 0)
        draws = [X for (X, _), _ in zip(batches(instance, 0), range(3), strict=False)]
        assert all(torch.equal(a, b) != new for a, b in pairwise(draws))
        again = next(batches(instance, 0))[0]
        assert torch.equal(again, draws[0])


def test_an_unknown_constant_starts_wrong_and_is_trained():
    instance = soft(SOFT_PROBLEMS["diffusivity"], 0)
    assert instance.measure(instance.problem.params)["error"] == 3  # 1 in place of ¼
    slopes = grad(
        lambda params: instance.problem.model_fn(params, instance.problem.X).square().mean()
    )(instance.problem.params)
    assert slopes["diffusivity"].abs() > 0
    json.dumps(instance.measure(instance.problem.params))
