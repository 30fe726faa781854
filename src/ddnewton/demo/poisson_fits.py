"""Fit a physics-informed net with soft boundaries, by `fit` and by others in the same seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from time import process_time
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad_and_value, hessian, vmap
from torch.optim import LBFGS, Adam, Optimizer

from ddnewton.criteria import weighted
from ddnewton.inputs.module_function import as_function
from ddnewton.optim.fit import fit
from ddnewton.optim.fit_record import Fit
from ddnewton.trees import flattened, unflattened
from ddnewton.types import ModelFn, PyTree

try:
    from scipy.optimize import OptimizeResult, minimize
except ImportError as missing:
    _message = f"the demo needs {missing.name}: python -m pip install 'ddnewton[demo]'"
    raise ImportError(_message, name=missing.name) from missing

WIDTH, INSIDE_COUNT, EDGE_COUNT, EDGE_WEIGHT = 32, 400, 120, 4.0
POISSON_ADAM_RATE, HISTORY_SIZE = 0.03, 100
EVALUATED_POINTS = 41
"""Points of the error's grid along an axis."""

INTRODUCTION = f"""\
2. A physics-informed net: 2-{WIDTH}-1 tanh network u, 129 parameters, float64

   Poisson's equation in two dimensions, −Δu = 2π² sin πx sin πy, as two terms of one loss: its
   residual at {INSIDE_COUNT} points inside the unit square, and u itself, which is to be zero, at
   {EDGE_COUNT} points of its edge, with a weight of {EDGE_WEIGHT:g}. All have the same start, loss
   and seconds.

   ddnewton.fit   as shipped
   BFGS           SciPy's, with a dense inverse Hessian
   L-BFGS         torch's, steps of 20 iterations, history {HISTORY_SIZE}, strong-Wolfe search
   Adam           learning rate {POISSON_ADAM_RATE}

   Settings: the best of a few by the error after 6 s, 2 other seeds. Below: the relative error of
   u on a grid, after so many seconds of one processor.
"""
REMARK = """\
   The strongest competitor on such problems, dense self-scaled Broyden, is in docs/training.md.
"""


def trace(params: PyTree, points: Tensor, *, net_fn: ModelFn) -> Tensor:
    """Return u at one or several points."""
    outputs: Tensor = net_fn(params, points)[..., 0]
    return outputs


def exact(points: Tensor) -> Tensor:
    """Return sin πx sin πy at one or several points: it solves the equation."""
    return torch.sin(math.pi * points).prod(-1)


def residual(params: PyTree, points: Float[Tensor, "n 2"], *, net_fn: ModelFn) -> Tensor:
    """Return Δu + 2π² sin πx sin πy at points."""
    second = vmap(hessian(partial(trace, net_fn=net_fn), 1), (None, 0))(params, points)
    laplacian: Tensor = second.diagonal(dim1=1, dim2=2).sum(1)
    return laplacian + 2 * math.pi**2 * exact(points)


class PoissonProblem(NamedTuple):
    """The terms of the loss, as dicts, and the parameters at the start."""

    terms: dict[str, ModelFn]
    params: PyTree
    points: dict[str, Float[Tensor, "n 2"]]
    targets: dict[str, Float[Tensor, " n"]]
    weights: dict[str, float]


def poisson_problem(seed: int) -> PoissonProblem:
    """Return the problem with a net and points from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(2, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)).double()
        inside = torch.rand(INSIDE_COUNT, 2, dtype=torch.float64)
    # As many points on each of the four sides.
    side = torch.linspace(0, 1, EDGE_COUNT // 4 + 1, dtype=torch.float64)[:-1]
    zeros, ones = torch.zeros_like(side), torch.ones_like(side)
    sides = ((side, zeros), (ones, side), (1 - side, ones), (zeros, 1 - side))
    points = {"inside": inside, "edge": torch.cat([torch.stack(xy, 1) for xy in sides])}
    net_fn, params = as_function(net)
    return PoissonProblem(
        terms={"inside": partial(residual, net_fn=net_fn), "edge": partial(trace, net_fn=net_fn)},
        params=params,
        points=points,
        targets={name: torch.zeros(len(at), dtype=at.dtype) for name, at in points.items()},
        weights={"inside": 1.0, "edge": EDGE_WEIGHT},
    )


@torch.no_grad()
def solution_error(problem: PoissonProblem, params: PyTree) -> float:
    """Return the relative error of u on a grid."""
    axis = torch.linspace(0, 1, EVALUATED_POINTS, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    solution = exact(grid)
    difference = problem.terms["edge"](params, grid) - solution
    return float(difference.norm() / solution.norm())


class Course(NamedTuple):
    """The errors of a method, from before its first step, and its seconds up to each."""

    seconds: list[float]
    errors: list[float]

    def error_after(self, seconds: float) -> float:
        """Return the last error within a number of seconds."""
        pairs = zip(self.seconds, self.errors, strict=True)
        return [error for spent, error in pairs if spent <= seconds][-1]


Watch: TypeAlias = Callable[[PyTree], None]
"""``watch(params)`` adds to a course, and raises StopIteration when the seconds are used up."""


def observed(problem: PoissonProblem, limit: float) -> tuple[Watch, Course]:
    """Return a course that begins now, and what adds to it; the errors take no time of it."""
    course = Course([0.0], [solution_error(problem, problem.params)])
    resumed = process_time()

    def watch(params: PyTree) -> None:
        nonlocal resumed
        course.seconds.append(course.seconds[-1] + process_time() - resumed)
        course.errors.append(solution_error(problem, params))
        if course.seconds[-1] >= limit:
            raise StopIteration
        resumed = process_time()

    return watch, course


def by_fit(problem: PoissonProblem, watch: Watch, updates: int | None = None) -> Fit:
    """Fit by `fit`, with nothing set but that a number of updates, or ``watch``, ends it."""
    criteria = {name: weighted(nn.MSELoss(), weight) for name, weight in problem.weights.items()}
    return fit(
        *(problem.terms, problem.params, problem.points, problem.targets, criteria),
        max_updates=updates,
        callback=lambda so_far: watch(so_far.params),
    )


def loss_and_gradient(
    problem: PoissonProblem, vector: Float[Tensor, " d"]
) -> tuple[Float[Tensor, ""], Float[Tensor, " d"]]:
    """Return the loss, and its gradient, of parameters as one vector."""

    def loss(vector: Tensor) -> Tensor:
        params, total = unflattened(vector, problem.params), torch.zeros(()).double()
        for name, term in problem.terms.items():
            rows = term(params, problem.points[name]) - problem.targets[name]
            total = total + problem.weights[name] * rows.square().mean()
        return total

    gradient, value = grad_and_value(loss)(vector)
    return value, gradient


def by_bfgs(problem: PoissonProblem, watch: Watch) -> None:
    """Fit by SciPy's BFGS until ``watch`` ends it, or no step gains anything."""

    def function(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = loss_and_gradient(problem, torch.from_numpy(x))
        return value.item(), gradient.numpy()

    def callback(intermediate_result: OptimizeResult) -> None:
        watch(unflattened(torch.tensor(intermediate_result.x), problem.params))

    begin, options = flattened(problem.params).numpy(), {"gtol": 0.0, "maxiter": 10**9}
    minimize(function, begin, jac=True, method="BFGS", callback=callback, options=options)


def by_torch(problem: PoissonProblem, watch: Watch, optimizer_of: Callable[..., Optimizer]) -> None:
    """Fit by an optimizer of torch until ``watch`` raises."""
    vector = flattened(problem.params).requires_grad_()
    optimizer = optimizer_of([vector])

    def closure() -> float:
        value, vector.grad = loss_and_gradient(problem, vector.detach())
        return value.item()

    while True:
        optimizer.step(closure)
        watch(unflattened(vector.detach(), problem.params))


PEERS: dict[str, Callable[[PoissonProblem, Watch], None]] = {
    "BFGS": by_bfgs,
    "L-BFGS": partial(
        by_torch,
        optimizer_of=partial(LBFGS, history_size=HISTORY_SIZE, line_search_fn="strong_wolfe"),
    ),
    "Adam": partial(by_torch, optimizer_of=partial(Adam, lr=POISSON_ADAM_RATE)),
}


class PoissonRuns(NamedTuple):
    """The course of every method, and the losses of the fit's terms at every update."""

    courses: dict[str, Course]
    term_losses: Mapping[str, Float[Tensor, " t"]]


def poisson_example(limit: float, seed: int) -> PoissonRuns:
    """Fit the net by all methods, print a line for each, and return the courses."""
    print(INTRODUCTION)
    problem = poisson_problem(seed)
    # What torch does once in a process is to count for none.
    by_fit(problem, lambda params: None, updates=1)
    loss_and_gradient(problem, flattened(problem.params))
    # One method after the other, each for as long.
    shown = [limit / 8, limit / 4, limit / 2, limit]
    print(f"   {'':12s}" + "".join(f"{seconds:8.3g} s" for seconds in shown) + "     steps")
    watch, course = observed(problem, limit)
    result = by_fit(problem, watch)
    courses = {"ddnewton.fit": course}
    report_course("ddnewton.fit", course, shown)
    for name, method in PEERS.items():
        watch, courses[name] = observed(problem, limit)
        with suppress(StopIteration):
            method(problem, watch)
        report_course(name, courses[name], shown)
    print(f"\n{REMARK}")
    term_losses = result.history.term_losses
    assert isinstance(term_losses, Mapping)  # as there are several
    return PoissonRuns(courses, term_losses)


def report_course(name: str, course: Course, shown: list[float]) -> None:
    """Print the errors of a method after some seconds, and the number of its steps."""
    errors = "".join(f"{course.error_after(seconds):10.1e}" for seconds in shown)
    print(f"   {name:12s}{errors}{len(course.errors) - 1:10d}")
