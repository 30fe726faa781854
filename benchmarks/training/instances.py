"""What one seed of a task comes down to: data, net, loss, and what is measured.

A seed makes the data's split, the net's start and the order of the mini-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks import nets
from benchmarks.problem import Problem
from benchmarks.training import data
from benchmarks.training.pdes import Equation, fine_grid
from benchmarks.training.pinns import SoftProblem

Params = dict[str, Tensor]
Metrics = dict[str, float]


class Instance(NamedTuple):
    """What one seed of a task comes down to.

    The problem has all training data; ``batch`` is the size of mini-batches, None for full ones.
    ``measure`` returns losses, accuracies and whatever else there is to report. Where batches are
    new points in every step ``draw`` makes the next.
    """

    problem: Problem
    batch: int | None
    measure: Callable[[Params], Metrics]
    draw: Callable[[torch.Generator], Tensor] | None = None


def functional(net: nn.Module) -> tuple[Callable[[Params, Any], Tensor], Params]:
    """Return a module as a function of parameters and a batch, and its parameters."""
    params = {name: p.detach().clone() for name, p in net.named_parameters()}
    return lambda params, X: functional_call(net, params, (X,)), params


def losses(model_fn: Callable, criterion: nn.Module, split: data.Split, params: Params) -> Metrics:
    """Return the loss on every part of the data; with classes, the accuracy too.

    Of the training data, as many as there are to test on are taken, 5,000 at most.
    """
    most = min(len(split.test[1]), 5000)
    metrics = {}
    for name, (X, y) in (
        split._replace(train=tuple(part[:most] for part in split.train))._asdict().items()
    ):
        outputs = model_fn(params, X)
        metrics[name] = float(criterion(outputs, y))
        if not y.is_floating_point():
            metrics[f"{name}_accuracy"] = float((outputs.argmax(1) == y).float().mean())
    return metrics


def regression(make: Callable[[int], data.Split], widths: tuple[int, ...], seed: int) -> Instance:
    """Return full-batch least squares by a tanh net."""
    split = make(seed)
    torch.manual_seed(seed + 1)
    model_fn, params = functional(nets.mlp(*widths, activation=nn.Tanh).double())
    measure = partial(losses, model_fn, nn.MSELoss(), split)
    return Instance(Problem(model_fn, params, *split.train, nn.MSELoss()), None, measure)


def pde(equation: Equation, points: int, seed: int) -> Instance:
    """Return an equation at random points, its loss the mean squared residual."""
    torch.manual_seed(seed)
    net = nets.mlp(equation.axes, 32, 32, 1, activation=nn.Tanh).double()
    params = functional(net)[1]
    # Points to train on and to choose settings by, then the grid of the error.
    train, valid = (torch.rand(points, equation.axes, dtype=torch.float64) for _ in range(2))
    grid = fine_grid(equation.axes)
    exact = equation.exact(grid)

    def measure(params: Params) -> Metrics:
        train_loss, valid_loss = (
            float(equation.model_fn(params, X).square().mean()) for X in (train, valid)
        )
        error = (equation.ansatz(params, grid).value - exact).norm() / exact.norm()
        return {"train": train_loss, "valid": valid_loss, "error": float(error)}

    zeros = torch.zeros(points, dtype=torch.float64)
    return Instance(Problem(equation.model_fn, params, train, zeros, nn.MSELoss()), None, measure)


def soft(make: Callable[[], SoftProblem], seed: int) -> Instance:
    """Return a published physics-informed net with soft boundaries, its rows' mean square."""
    problem = make()
    # The points to train on, and those of a finer grid or another draw to choose settings by.
    train = problem.batch(torch.Generator().manual_seed(1000 + seed))
    valid = problem.batch(torch.Generator().manual_seed(9000 + seed), finer=True)

    def measure(params: Params) -> Metrics:
        losses = (float(problem.model_fn(params, X).square().mean()) for X in (train, valid))
        train_loss, valid_loss = losses
        return {"train": train_loss, "valid": valid_loss, "error": float(problem.error(params))}

    zeros = torch.zeros(len(train), dtype=train.dtype)
    start = Problem(problem.model_fn, problem.start(seed), train, zeros, nn.MSELoss())
    return Instance(start, None, measure, problem.batch if problem.drawn else None)


def classification(
    make: Callable[[int], data.Split], net: Callable[[], nn.Module], seed: int, batch: int = 128
) -> Instance:
    """Return images to classify, by mini-batches, with the cross-entropy."""
    split = make(seed)
    torch.manual_seed(seed + 1)
    model_fn, params = functional(net())
    criterion = nn.CrossEntropyLoss()
    measure = partial(losses, model_fn, criterion, split)
    return Instance(Problem(model_fn, params, *split.train, criterion), batch, measure)


def batches(instance: Instance, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches without end: new points, all the data, or pieces in an order drawn anew."""
    X, y, size = instance.problem.X, instance.problem.y, instance.batch
    generator = torch.Generator().manual_seed(seed)
    while instance.draw is not None:
        yield instance.draw(generator), y
    while size is None:
        yield X, y
    while True:
        order = torch.randperm(len(y), generator=generator)
        for part in order[: len(y) // size * size].split(size):
            yield X[part], y[part]


def trained(build: Callable[[int], Instance], steps: int, lr: float, seed: int) -> Instance:
    """Return an instance whose start is a net that Adam has trained, its rate falling to zero."""
    instance = build(seed)
    problem = instance.problem
    leaves = {name: p.clone().requires_grad_() for name, p in problem.params.items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    # Adam's updates, on batches of another order than those of the run.
    for _, (X, y) in zip(range(steps), batches(instance, seed + 1000), strict=False):
        optimizer.zero_grad()
        torch.autograd.backward(problem.criterion(problem.model_fn(leaves, X), y))
        optimizer.step()
        decay.step()
    params = {name: p.detach().clone() for name, p in leaves.items()}
    return instance._replace(problem=problem._replace(params=params))
