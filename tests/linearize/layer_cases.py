"""Models as cases, whose steps by layers are compared with the dense reference."""

import copy
import re
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from ddnewton import newton_step_and_info, prepare, top_k
from tests.methods import FLOAT32, FLOAT64
from tests.models import Problem, cast, problem
from tests.reference import Dense, clusters, dense, directions, error, solve, step

TOLERANCE = {FLOAT32: 1e-6, FLOAT64: 1e-10}
"""Small problems are evaluated in float64 and rounded once, whatever their dtype."""


class Case(NamedTuple):
    """A module, or a function with a dict of parameters; and which of them may have no rule."""

    model: Any
    X: Any
    params: Any = None
    direct: tuple[str, ...] = ()


def with_targets(case: Case, dtype: torch.dtype) -> Problem:
    """A regression of targets near a case's outputs; the same numbers in any dtype."""
    if isinstance(case.model, nn.Module):
        module = copy.deepcopy(case.model).to(dtype).eval()
        params = {name: p.detach() for name, p in module.named_parameters()}

        def model_fn(params, X):
            return functional_call(module, params, (X,))
    else:
        model_fn, params = case.model, cast(case.params, dtype)
    X = cast(case.X, dtype)
    with torch.no_grad():
        outputs = model_fn(params, X)
    shift = torch.arange(outputs.numel()).sin().reshape(outputs.shape)
    return Problem(model_fn, params, X, outputs + shift.to(dtype), nn.MSELoss())


def without_a_rule(prepared) -> set[str]:
    """The parameters that a prepared model differentiates directly."""
    return set(re.findall(r"\['(.*?)'\]: directly", repr(prepared)))


def check(case: Case, dtype: torch.dtype) -> None:
    """See that the rules are used, and that they are right."""
    problem = with_targets(case, dtype)
    prepared = prepare(*problem[:3])
    assert without_a_rule(prepared) <= set(case.direct), repr(prepared)
    exact = with_targets(case, FLOAT64)._replace(y=problem.y)
    compare(prepared, problem, dense(*exact), TOLERANCE[dtype])


def compare(prepared, problem: Problem, truth: Dense, tolerance: float) -> None:
    """Compare steps and what they were made of: by layers, by Jacobians, by the textbook."""
    every = directions(truth)
    top = before_the_widest_gap(every.evals)
    some = directions(truth, lambda evals: range(len(evals) - top, len(evals)))
    choices = [
        ({}, every, solve(truth, 0.1)),
        (
            {"select": top_k(top), "complement": 0.3},
            some,
            step(truth, 0.1, lambda evals: range(len(evals) - top, len(evals)), 0.3),
        ),
    ]
    for options, kept, expected in choices:
        rest = (*problem[1:], 0.1)
        by_layers, info = newton_step_and_info(prepared, *rest, **options)
        by_jacobians, other = newton_step_and_info(problem.model_fn, *rest, gram="dense", **options)
        pairs = [
            (by_layers, expected),
            (by_jacobians, expected),
            (by_layers, by_jacobians),
            (info.loss, truth.loss),
            (info.gradient_norm, truth.gradient.norm()),
            (info.gradient_share, other.gradient_share),
            *zip(basis_free(info, kept.evals), basis_free(kept, kept.evals), strict=True),
            *zip(basis_free(info, kept.evals), basis_free(other, kept.evals), strict=True),
        ]
        for found, true in pairs:
            assert error(found, true) < tolerance
        assert int(info.rank) == int(other.rank) == len(every.evals)


def before_the_widest_gap(evals) -> int:
    """How many of the largest eigenvalues stand apart from the others."""
    gaps = torch.cat([evals[:1], evals.diff()])
    return len(evals) - int(gaps.argmax())


def basis_free(record, evals):
    """Eigenvalues, Σ γγᵀ and Σ λ of those that are equal: signs and rotations do not show."""
    runs = clusters(evals)
    gammas = [record.gammas[:, run] for run in runs]
    lambdas = torch.stack([record.lambdas[:, run].sum(1) for run in runs])
    return record.evals, torch.stack([slopes @ slopes.T for slopes in gammas]), lambdas


class Readout(nn.Module):
    """A layer between others: what it puts out at any place counts, nonlinearly, by itself."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, X):
        values = torch.tanh(self.layer(X)).flatten(2)
        ramp = torch.arange(1, values.shape[2] + 1, dtype=X.dtype)
        return values @ torch.stack([ramp.cos(), ramp.sin()], 1)


SQUARE = {"W": (3, 3), "b": (3,), "c": (3,)}


def of_shapes(model_fn, X, shapes, direct=()):
    return Case(model_fn, X, {name: torch.randn(shape) for name, shape in shapes.items()}, direct)


@cache
def prepared_problem(name: str, dtype: torch.dtype = FLOAT64) -> tuple[Any, Problem]:
    given = problem(name, dtype)
    return prepare(*given[:3]), given
