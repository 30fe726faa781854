"""Leading directions without all others, of a matrix on either side, against dense references."""

from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.func import functional_call

from ddnewton import (
    above,
    directional_derivatives,
    directional_newton,
    energy,
    ggn_eigh,
    newton_step,
    newton_step_and_info,
    top_k,
)
from ddnewton.quadratic import directions, leading
from tests.models import Problem, cast, normal
from tests.reference import Dense, dense, eigenpairs, error, flat, step
from tests.whole.eigenpairs import check_derivatives, check_eigenpairs, picked, rows

SIDES = {"columns": (400, 48), "parameters": (430, 33)}
"""Samples, and the width of a net of 12 width + 1 parameters: sides of 400 and 397."""

RULES = {
    "top 1": top_k(1),
    "top 7": top_k(7),
    "above": above(0.3),
    "above nothing": above(1e9, relative=False),
    "energy": energy(0.5),
}
FUNCTIONS = {
    "last": lambda evals: range(len(evals) - 5, len(evals)),
    "backwards": lambda evals: [len(evals) - 1, len(evals) - 3],
    "mask": lambda evals: evals >= evals[-4],
    "none": lambda _: [],
}
OF_MANY = {
    "top 40": top_k(40),
    "above 0": above(0.0),
    "smallest and largest": lambda evals: [0, len(evals) - 1],
    "all": lambda evals: evals >= 0,
}
ALL = RULES | FUNCTIONS | OF_MANY
EITHER_SIDE = pytest.mark.parametrize("side", SIDES)


class Given(NamedTuple):
    problem: Problem
    reference: Dense


@cache
def given(side):
    samples, width = SIDES[side]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, width), nn.Tanh(), nn.Linear(width, 1)).double()
    params = {name: p.detach() for name, p in net.named_parameters()}
    X = normal(samples, 10).double()
    problem = Problem(
        lambda p, x: functional_call(net, p, (x,)), params, X, X[:, :1].sin(), nn.MSELoss()
    )
    return Given(problem, dense(*problem))


@pytest.fixture
def decompositions(monkeypatch):
    """The matrices of which all eigenvectors are computed."""
    made, decompose = [], leading.decompose

    def counted(matrix):
        made.append(matrix)
        return decompose(matrix)

    monkeypatch.setattr(leading, "decompose", counted)
    monkeypatch.setattr(directions, "decompose", counted)
    return made


def check_info(info, expected):
    """Assert that two records are the same but for the signs of directions."""
    for field, found, value in zip(info._fields, info, expected, strict=True):
        assert found.shape == value.shape, field
        assert error(found.abs(), value.abs()) < 1e-8, field


@EITHER_SIDE
@pytest.mark.parametrize("name", ALL)
def test_eigenpairs_and_derivatives(name, side, decompositions):
    (problem, reference), select = given(side), ALL[name]
    evals, evecs = ggn_eigh(*problem, select=select)
    pair = directional_derivatives(*problem, select=select)
    assert len(decompositions) == 2 * (name in OF_MANY)
    if name != "above 0":  # which eigenvalues are above 0 is a matter of rounding
        expected = picked(select, eigenpairs(reference)[0])
        assert evals.shape == expected.shape
        assert error(evals, expected) < 1e-12
    if name not in OF_MANY:  # of these not all eigenvalues have directions
        check_eigenpairs(reference, evals, rows(evecs), 1e-11)
        check_derivatives(reference, rows(evecs), pair, 1e-10)


@EITHER_SIDE
@pytest.mark.parametrize("name", RULES | FUNCTIONS)
def test_steps(name, side, decompositions):
    (problem, reference), select = given(side), ALL[name]
    result = newton_step(*problem, 0.01, select=select)
    assert error(result, step(reference, 0.01, select)) < 1e-9
    assert not decompositions


@EITHER_SIDE
@pytest.mark.parametrize("name", ALL)
def test_the_info_is_that_of_all_directions(name, side, decompositions, monkeypatch):
    problem, select = given(side).problem, ALL[name]
    found, info = newton_step_and_info(*problem, 0.01, select=select)
    assert len(decompositions) == (name in OF_MANY)
    monkeypatch.setattr(leading, "LEADING_FROM", 10**9)
    whole, expected = newton_step_and_info(*problem, 0.01, select=select)
    assert error(found, whole) < 1e-9
    check_info(info, expected)
    assert info.rank == expected.rank > 0


def test_the_rank_of_samples_that_come_twice(decompositions):
    model_fn, params, X, y, criterion = given("columns").problem
    twice = torch.cat([X[:200], X[:200]])
    for select in (top_k(3), FUNCTIONS["last"]):
        _, info = newton_step_and_info(model_fn, params, twice, y, criterion, 0.1, select=select)
        assert info.rank == 200
    assert not decompositions


def test_a_rank_that_eigenvalues_do_not_tell(decompositions, monkeypatch):
    """Columns in float32: an eigenvalue may be theirs or their rounding's."""
    monkeypatch.setattr("ddnewton.linearize.precision.CHEAP_FLOPS", 0)
    y = given("columns").problem.y
    scales = torch.logspace(0, -7, 400, dtype=torch.float64)[:, None]
    W, X = torch.zeros(450, 1), (scales * normal(400, 450)).float()
    arguments = (lambda W, X: X @ W, W, X, y.float(), nn.MSELoss(), 0.1)
    _, info = newton_step_and_info(*arguments, select=top_k(3), gram="structured")
    assert len(decompositions) == 1
    monkeypatch.setattr(leading, "LEADING_FROM", 10**9)
    _, expected = newton_step_and_info(*arguments, select=top_k(3), gram="structured")
    check_info(info, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_function_gets_all_eigenvalues_once(dtype):
    seen = []

    def select(evals):
        seen.append(evals.clone())
        answer = [len(evals) - 2]
        evals.zero_()  # its own
        return answer

    (model_fn, *data, criterion), reference = given("columns")
    evals, _ = ggn_eigh(model_fn, *cast(data, dtype), criterion, select=select)
    expected, _ = eigenpairs(reference)
    (shown,) = seen
    assert shown.dtype == dtype
    assert error(shown, expected) < 1e-5
    assert error(evals, expected[-2:-1]) < 1e-5


def test_flat_samples_are_told_of_all_the_same():
    """A third of the samples pull with no curvature; the share of these takes all directions."""
    model_fn, params, X, y, _ = given("columns").problem
    y = y + 10.0 * normal(400, 1).sign() * (torch.arange(400) % 3 == 0)[:, None]
    arguments = (model_fn, params, X, y, nn.HuberLoss(), 0.1)
    _, info = newton_step_and_info(*arguments, select=FUNCTIONS["last"])
    J = dense(*arguments[:5]).jacobians[:, 0]
    is_flat = (model_fn(params, X) - y).abs()[:, 0] > 1
    slopes = (model_fn(params, X) - y)[:, 0].clamp(-1, 1) / 400
    basis, _ = torch.linalg.qr(J[~is_flat].T)
    pull = J[is_flat].T @ slopes[is_flat]
    outside = pull - basis @ (basis.T @ pull)
    expected = outside.square().sum() / (J.T @ slopes).square().sum()
    assert 1e-4 < expected < 1
    assert error(info.flat_share, expected) < 1e-6


@pytest.mark.parametrize("select", [top_k(4), FUNCTIONS["last"]], ids=["rule", "function"])
def test_updates_along_leading_directions(select, decompositions, monkeypatch):
    model_fn, params, X, y, criterion = given("columns").problem

    def update():
        optimizer = directional_newton(model_fn, criterion, select=select)
        return optimizer.update(params, optimizer.init(params), X, y)

    updated, _, info = update()
    assert not decompositions
    monkeypatch.setattr(leading, "LEADING_FROM", 10**9)
    expected, _, expected_info = update()
    assert error(flat(updated), flat(expected)) < 1e-9
    if select is FUNCTIONS["last"]:  # a rule leaves the rank unknown
        assert info.rank == expected_info.rank


def test_several_matrices_under_vmap():
    model_fn, params, X, y, criterion = given("columns").problem
    several = {name: torch.stack([p, 0.5 * p]) for name, p in params.items()}

    def stepped(p):
        return newton_step(model_fn, p, X, y, criterion, 0.1, select=top_k(3))

    steps = torch.func.vmap(stepped)(several)
    for member in range(2):
        one = {name: p[member] for name, p in several.items()}
        mapped = {name: p[member] for name, p in steps.items()}
        assert error(mapped, stepped(one)) < 1e-9
