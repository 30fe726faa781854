"""What an update costs where parameters are few, beside a few lines of torch.func.

Run with ``python -m benchmarks.small_fits``: medians of CPU time on one thread, the peers taking
turns, since a busy machine is slow for all of them alike. An update of ddnewton as it comes makes
several trials, to take as long a step as it can; one of a fixed damping makes a single one, as most
updates of the peers do. torch-levenberg-marquardt is measured where it is installed. The problems:

- poisson2d: ENGD's 2-d Poisson equation (Müller, Zeinhofer, 2023), 129 parameters and 900 rows in
  float64, the net's Laplacian carried forward through its layers.
- sinc: the example of torch-levenberg-marquardt, 61 parameters and 20,000 points in float32.
- reference: the example of ViViT, 4 samples in float32; a step along ten directions.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from math import pi

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parameters_to_vector

from benchmarks import nets, peers, recipes
from benchmarks.problem import Problem
from ddnewton import directional_newton, prepare

Update = Callable[[], object]
"""Makes one update, from where the last one left the parameters."""

DAMPING = 1e-3
"""Of the updates that make one trial, and of the first of `plain`."""

TRIES = 6
WARM_UP = 3
PEER = "torch.func"
"""The peer in units of which times are given."""


def poisson2d() -> Problem:
    """Return the rows Δu + 2π² sin πx sin πy inside the unit square, and u on its edge."""
    line = torch.linspace(0, 1, 30, dtype=torch.float64)
    inside, side = torch.cartesian_prod(line[1:-1], line[1:-1]), line[:-1]
    low, high = torch.zeros_like(side), torch.ones_like(side)
    corners = ((side, low), (high, side), (side, high), (low, side))
    edge = torch.cat([torch.stack(pair, 1) for pair in corners])
    # Such factors that the mean square of all rows is that inside, plus 4 times that of the edge.
    points, on_edge = torch.cat([inside, edge]), torch.ones(len(inside) + len(edge), 1).double()
    on_edge[: len(inside)] = 0
    n = len(points)
    factor = torch.where(on_edge > 0, (4 * n / len(edge)) ** 0.5, (n / len(inside)) ** 0.5)
    X = torch.cat([points, on_edge, factor], 1)

    def rows(params: dict[str, Tensor], X: Tensor) -> Tensor:
        x, on_edge, factor = X[:, :2], X[:, 2] > 0, X[:, 3]
        u, laplacian = with_laplacian(params, x)
        source = 2 * pi**2 * torch.sin(pi * x).prod(1)
        return factor * torch.where(on_edge, u, laplacian + source)

    params = drawn(nets.mlp(2, 32, 1).double(), 0.1)
    return Problem(rows, params, X, torch.zeros(n, dtype=torch.float64), nn.MSELoss())


def with_laplacian(params: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a tanh net's values and Laplacians, carried forward through its layers."""
    n, d = x.shape
    first = torch.eye(d, dtype=x.dtype).expand(n, d, d)
    second = torch.zeros(n, 1, d, dtype=x.dtype)
    layers = [name.removesuffix(".weight") for name in params if name.endswith(".weight")]
    for layer in layers:
        W = params[f"{layer}.weight"]
        x = x @ W.T + params[f"{layer}.bias"]
        first, second = (torch.cat([first, second], 1) @ W.T).split([d, 1], 1)
        if layer != layers[-1]:
            # The chain rule of tanh: σ' = 1 − σ², σ'' = −2σσ'.
            x = torch.tanh(x)
            slope = (1 - x * x)[:, None]
            bent = 2 * x[:, None] * (first * first).sum(1, keepdim=True)
            first, second = slope * first, slope * (second - bent)
    return x[:, 0], second[:, 0, 0]


def sinc() -> Problem:
    """Return a net of one hidden layer, to be fitted to sinc 10x."""
    torch.manual_seed(0)
    X = torch.linspace(-1, 1, 20000)[:, None]
    net = nets.mlp(1, 20, 1, activation=nn.Tanh)
    params = {name: p.detach() for name, p in net.named_parameters()}
    return Problem(
        lambda p, x: functional_call(net, p, (x,)), params, X, torch.sinc(10 * X), nn.MSELoss()
    )


def drawn(net: nn.Module, scale: float) -> dict[str, Tensor]:
    """Return parameters like a net's, normal of a standard deviation."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in net.named_parameters()
    }


def ours(
    problem: Problem, *, prepared: bool = True, one_trial: bool = False, compiled: bool = False
) -> Update:
    """Return an update of ddnewton as it comes, or of a damping that leaves it a single trial."""
    model_fn, params, X, y, criterion = problem
    if prepared:
        model_fn = prepare(model_fn, params, X)
    optimizer = directional_newton(model_fn, criterion, DAMPING if one_trial else None)
    state = optimizer.init(params)
    update = torch.compile(optimizer.update) if compiled else optimizer.update

    def updated() -> object:
        nonlocal params, state
        params, state, info = update(params, state, X, y)
        return info.loss_after

    return updated


def plain(problem: Problem) -> Update:
    """Return an update as a user of torch.func writes it: vmap(grad), JᵀJ and a solve."""
    model_fn, start, X, y, _ = problem
    shapes = {name: p.shape for name, p in start.items()}
    v, damping = parameters_to_vector(start.values()), DAMPING

    def row(v: Tensor, x: Tensor) -> Tensor:
        parts = v.split([shape.numel() for shape in shapes.values()])
        leaves = {name: p.view(s) for (name, s), p in zip(shapes.items(), parts, strict=True)}
        return model_fn(leaves, x[None]).reshape(())

    def residuals(v: Tensor) -> Tensor:
        return vmap(row, (None, 0))(v, X) - y.reshape(-1)

    loss = float(residuals(v).square().mean())

    def updated() -> object:
        nonlocal v, loss, damping
        J, r = vmap(grad(row), (None, 0))(v, X), residuals(v)
        G, g = J.T @ J, J.T @ r
        for _ in range(TRIES):
            moved = v - torch.linalg.solve(G + damping * torch.diag(G.diagonal() + 1e-8), g)
            after = float(residuals(moved).square().mean())
            if after < loss:
                v, loss, damping = moved, after, damping / 5
                break
            damping *= 4
        return loss

    return updated


def torch_levenberg_marquardt(problem: Problem) -> Update:
    """Return an update of torch-levenberg-marquardt, as its examples have it."""
    package = import_module("torch_levenberg_marquardt")
    model_fn, start, X, y, _ = problem

    class Module(nn.Module):
        """The problem's function, its parameters those of a module."""

        def __init__(self) -> None:
            super().__init__()
            self.names = list(start)
            self.values = nn.ParameterList(p.clone() for p in start.values())

        def forward(self, X: Tensor) -> Tensor:
            return model_fn(dict(zip(self.names, self.values, strict=True)), X)

    module = package.training.LevenbergMarquardtModule(Module(), package.loss.MSELoss())
    return lambda: module.training_step(X, y)


def fit(problem: Problem, compiled: bool) -> dict[str, Update]:
    """Return the updates of all peers on a fit."""
    updates = {
        PEER: plain(problem),
        "ddnewton, prepared, one trial": ours(problem, one_trial=True),
        "ddnewton, one trial": ours(problem, prepared=False, one_trial=True),
        "ddnewton, prepared": ours(problem),
    }
    if compiled:
        updates["ddnewton, compiled, one trial"] = ours(problem, one_trial=True, compiled=True)
    if find_spec("torch_levenberg_marquardt"):
        updates["torch-levenberg-marquardt"] = torch_levenberg_marquardt(problem)
    return updates


def step() -> dict[str, Update]:
    """Return the steps of all peers on the reference example."""
    case = recipes.build("reference")
    ours = {"ddnewton, prepared": peers.prepared, "ddnewton": peers.unprepared}
    makers = {PEER: peers.jacobians} | ours
    return {name: make(case, "top10") for name, make in makers.items()}


PROBLEMS = {
    "poisson2d": lambda compiled: fit(poisson2d(), compiled),
    "sinc": lambda compiled: fit(sinc(), compiled),
    "reference": lambda compiled: step(),
}


def seconds(update: Update) -> float:
    """Return the CPU time of an update."""
    start = time.process_time()
    update()
    return time.process_time() - start


def medians(updates: dict[str, Update], count: int) -> dict[str, float]:
    """Return the median time of every peer's updates, made in turns; the first ones warm up."""
    rounds = [
        {peer: seconds(update) for peer, update in updates.items()} for _ in range(count + WARM_UP)
    ]
    return {peer: statistics.median(r[peer] for r in rounds[WARM_UP:]) for peer in updates}


def main() -> None:
    """Print a table a problem."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problem", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--updates", type=int, default=30, help="how many of each peer")
    parser.add_argument("--compiled", action="store_true", help="our updates compiled as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Medians of {options.updates}, CPU time on one thread; torch {torch.__version__}")
    for name in options.problem:
        times = medians(PROBLEMS[name](options.compiled), options.updates)
        print(f"\n| {name} | ms | × |\n|---|---|---|")
        for peer, of_peer in times.items():
            print(f"| {peer} | {1e3 * of_peer:.2f} | {of_peer / times[PEER]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
