"""The heat equation of DeepXDE's examples, as terms of a loss that ``fit`` minimises.

``python examples/deepxde_problem.py`` solves u_t = 0.4 u_xx with u = 0 at both ends and a sine at
the beginning, and compares with the exact solution. With ``--deepxde`` DeepXDE solves it too, as in
its own example: by Adam and then L-BFGS (``pip install deepxde``).
"""

from __future__ import annotations

import argparse
import math
import os
from functools import partial
from itertools import pairwise
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.quasirandom import SobolEngine

from ddnewton import Fit, as_function, fit
from ddnewton.types import ModelFn, PyTree

DIFFUSIVITY, WIDTH, DEPTH = 0.4, 20, 3
INSIDE, AT_ENDS, AT_BEGINNING = 2540, 80, 160
SPACE, TIME = torch.eye(2, dtype=torch.float64)


def exact(X: Tensor) -> Tensor:
    """Return the solution at points (x, t)."""
    x, t = X.split(1, 1)
    return torch.exp(-(math.pi**2) * DIFFUSIVITY * t) * torch.sin(math.pi * x)


def derivative(function: ModelFn, direction: Tensor) -> ModelFn:
    """Return the derivative of a function of parameters and points along a direction."""

    def along(params: PyTree, X: Tensor) -> Tensor:
        slope: Tensor = jvp(partial(function, params), (X,), (direction.expand_as(X),))[1]
        return slope

    return along


def residual(params: PyTree, X: Tensor, *, u: ModelFn) -> Tensor:
    """Return u_t − 0.4 u_xx at points (x, t)."""
    u_t, u_xx = derivative(u, TIME), derivative(derivative(u, SPACE), SPACE)
    return u_t(params, X) - DIFFUSIVITY * u_xx(params, X)


def drawn(counts: tuple[int, int, int], seed: int) -> dict[str, Tensor]:
    """Return points (x, t) inside, at both ends and at the beginning of the unit square."""
    inside, at_ends, at_beginning = (
        SobolEngine(2, scramble=True, seed=seed + i).draw(count, dtype=torch.float64)
        for i, count in enumerate(counts)
    )
    at_ends[:, 0] = at_ends[:, 0].round()
    at_beginning[:, 1] = 0.0
    return {"inside": inside, "ends": at_ends, "beginning": at_beginning}


def net(seed: int) -> nn.Module:
    """Return a tanh network u(x, t) with the weights that DeepXDE's "Glorot normal" draws."""
    sizes, generator = [2, *[WIDTH] * DEPTH, 1], torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        linear = nn.Linear(fan_in, fan_out, dtype=torch.float64)
        nn.init.xavier_normal_(linear.weight, generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def grid() -> Tensor:
    """Return a grid of points (x, t) to compare on."""
    axis = torch.linspace(0, 1, 101, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis)


def relative_error(outputs: Tensor) -> float:
    """Return the relative L² error of outputs on the grid."""
    solution = exact(grid())
    return float((outputs - solution).norm() / solution.norm())


def solved(counts: tuple[int, int, int], seed: int, updates: int, watch: Any = None) -> Fit:
    """Return the fit of the net to the equation, its ends and its beginning."""
    u, params = as_function(net(seed))
    points = drawn(counts, seed)
    terms = {"inside": partial(residual, u=u), "ends": u, "beginning": u}
    targets = {
        "inside": torch.zeros(len(points["inside"]), 1).double(),
        "ends": torch.zeros(len(points["ends"]), 1).double(),
        "beginning": exact(points["beginning"]),
    }
    return fit(terms, params, points, targets, nn.MSELoss(), max_updates=updates, callback=watch)


def by_deepxde(seed: int, iterations: int, dtype: str) -> list[tuple[str, float, float]]:
    """Return the name, seconds and error of each stage of DeepXDE's example."""
    os.environ.setdefault("DDE_BACKEND", "pytorch")
    import deepxde as dde  # noqa: PLC0415 - the example runs without it

    # The equation, its domain and conditions, as in DeepXDE's examples/pinn_forward/heat.py.
    dde.config.set_default_float(dtype)
    dde.config.set_random_seed(seed)

    def equation(x: Tensor, u: Tensor) -> Tensor:
        u_t = dde.grad.jacobian(u, x, i=0, j=1)
        u_xx = dde.grad.hessian(u, x, i=0, j=0)
        return u_t - DIFFUSIVITY * u_xx

    domain = dde.geometry.GeometryXTime(dde.geometry.Interval(0, 1), dde.geometry.TimeDomain(0, 1))
    ends = dde.icbc.DirichletBC(domain, lambda x: 0, lambda _, on_boundary: on_boundary)
    beginning = dde.icbc.IC(
        domain, lambda x: (torch.pi * torch.tensor(x[:, :1])).sin().numpy(), lambda _, at: at
    )
    counts = {"num_domain": INSIDE, "num_boundary": AT_ENDS, "num_initial": AT_BEGINNING}
    data = dde.data.TimePDE(domain, equation, [ends, beginning], **counts)
    model = dde.Model(data, dde.nn.FNN([2, *[WIDTH] * DEPTH, 1], "tanh", "Glorot normal"))
    # Adam, and L-BFGS from where it ends.
    stages, begin = [], process_time()
    for name in ("adam", "L-BFGS"):
        model.compile(name, lr=1e-3) if name == "adam" else model.compile(name)
        model.train(
            iterations=iterations if name == "adam" else None, verbose=0, display_every=10**9
        )
        seconds = process_time() - begin
        outputs = torch.from_numpy(model.predict(grid().numpy().astype(dtype))).double()
        stages.append((name, seconds, relative_error(outputs)))
    return stages


def main(
    updates: int = 100,
    seed: int = 0,
    counts: tuple[int, int, int] = (INSIDE, AT_ENDS, AT_BEGINNING),
) -> dict[str, list[float]]:
    """Solve the equation, and return the error and the seconds of one core after every update."""
    u, _ = as_function(net(seed))
    course: dict[str, list[float]] = {"error": [], "seconds": []}
    begin, watching = process_time(), 0.0

    def watch(so_far: Fit) -> None:
        nonlocal watching
        course["seconds"].append(process_time() - begin - watching)
        with torch.no_grad():
            course["error"].append(relative_error(u(so_far.params, grid())))
        watching = process_time() - begin - course["seconds"][-1]

    result = solved(counts, seed, updates, watch)
    marks = [mark for mark in (10, 20, 50, 100, 200, 500) if mark < result.updates]
    for mark in [*marks, result.updates]:
        seconds, error = course["seconds"][mark - 1], course["error"][mark - 1]
        print(f"seed {seed}: {mark:4d} updates {seconds:7.1f} s, error {error:.1e}", flush=True)
    return course


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--deepxde", action="store_true", help="solve it by DeepXDE as well")
    parser.add_argument("--iterations", type=int, default=20000, help="of DeepXDE's Adam")
    parser.add_argument("--dtype", default="float32", help="DeepXDE's; its own default is float32")
    options = parser.parse_args()
    for number in range(options.seeds):
        main(options.updates, number)
        if options.deepxde:
            for name, seconds, error in by_deepxde(number, options.iterations, options.dtype):
                print(f"seed {number}: DeepXDE {name} {seconds:7.1f} s, error {error:.1e}")
