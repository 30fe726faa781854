"""Train a net on handwritten digits with damped Newton steps, SGD and Adam."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import fmean
from time import process_time
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, Adam, Optimizer

from ddnewton.newton import newton_step_and_info
from ddnewton.quadratic.info import NewtonInfo
from ddnewton.trees import tree_map
from ddnewton.types import ModelFn, PyTree

try:
    from sklearn.datasets import load_digits
    from tqdm import tqdm
except ImportError as missing:
    _message = f"the demo needs {missing.name}: python -m pip install 'ddnewton[demo]'"
    raise ImportError(_message, name=missing.name) from missing

BATCH_SIZE, BATCH_COUNT = 64, 22
TRAINING_SIZE = BATCH_SIZE * BATCH_COUNT  # of 1,797 images; the other 389 are for testing
NEWTON_DAMPING, NEWTON_RATE, SGD_RATE, ADAM_RATE = 0.03, 0.5, 0.3, 0.03
SETTINGS = f"""\
3. Handwritten digits: 64-32-10 tanh network, cross-entropy, mini-batches of {BATCH_SIZE} images

   damped Newton  all directions, damping {NEWTON_DAMPING}, learning rate {NEWTON_RATE}
   SGD            learning rate {SGD_RATE}, momentum 0.9
   Adam           learning rate {ADAM_RATE}

   All three get the same start and mini-batches, but not the same time: SGD and Adam are far
   cheaper per step. Settings: the best of a grid by training loss after 5 epochs, 3 other seeds.
   Loss on all training images, accuracy on the test images; the rest are means over the epoch's
   mini-batches: leading eigenvalue, rank, and the decrease of the mini-batch's own loss.
"""


def function_and_params(model: nn.Module) -> tuple[ModelFn, dict[str, Tensor]]:
    """Return a module as a function of parameters and a batch, and a copy of its parameters."""
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    return lambda params, X: functional_call(model, params, (X,), strict=True), params


class Images(NamedTuple):
    """Images of 8 × 8 = 64 pixels from 0 to 1, and their digits."""

    X: Float[Tensor, "n 64"]
    y: Int[Tensor, " n"]


class Task(NamedTuple):
    """What is the same for all methods: the net, the data, the epochs, the seed of the batches."""

    model_fn: ModelFn
    images: Images
    test: Images
    epochs: int
    seed: int


def digits(seed: int) -> tuple[Images, Images]:
    """Return the training and the test images of scikit-learn's digits, in random order."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    X, y = torch.tensor(pixels, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    training = Images(X[:TRAINING_SIZE], y[:TRAINING_SIZE])
    return training, Images(X[TRAINING_SIZE:], y[TRAINING_SIZE:])


Update: TypeAlias = Callable[[PyTree, Images], tuple[PyTree, NewtonInfo | None]]
"""``update(params, batch) -> params, info``; the info is None except for Newton steps."""


def damped_newton(model_fn: ModelFn) -> Update:
    """Return the update by a damped Newton step, θ + η s with the learning rate η."""

    def update(params: PyTree, batch: Images) -> tuple[PyTree, NewtonInfo]:
        step, info = newton_step_and_info(model_fn, params, *batch, F.cross_entropy, NEWTON_DAMPING)
        return tree_map(lambda p, s: p + NEWTON_RATE * s, params, step), info

    return update


def first_order(model_fn: ModelFn, optimizer: Optimizer) -> Update:
    """Return the update by an optimizer of torch, which changes its parameters in place."""

    def update(params: PyTree, batch: Images) -> tuple[PyTree, None]:
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model_fn(params, batch.X), batch.y))
        optimizer.step()
        return params, None

    return update


class Run(NamedTuple):
    """The course of a training, with a value for every step."""

    losses: list[float]  # of all training images, from before the first step
    accuracies: list[float]  # on the test images, likewise
    seconds: list[float]
    infos: list[NewtonInfo]
    predicted: list[float]  # decreases of the loss on the step's own mini-batch
    actual: list[float]


def train(name: str, update: Update, params: PyTree, task: Task) -> Run:
    """Train from the given parameters, print a line for every epoch, and return the course."""
    # Every method draws the same mini-batches, from the seed.
    run = Run([], [], [], [], [], [])
    evaluate(run, params, task)
    generator = torch.Generator().manual_seed(task.seed)
    for epoch in range(1, task.epochs + 1):
        order = torch.randperm(len(task.images.y), generator=generator).split(BATCH_SIZE)
        for samples in tqdm(order, f"{name}, epoch {epoch}", leave=False, disable=None):
            batch = Images(task.images.X[samples], task.images.y[samples])
            # The update alone is timed.
            begin = process_time()
            params, info = update(params, batch)
            run.seconds.append(process_time() - begin)
            evaluate(run, params, task)
            # Of a Newton step also the decrease of its own mini-batch's loss.
            if info is not None:
                after = F.cross_entropy(task.model_fn(params, batch.X), batch.y)
                run.infos.append(info)
                run.predicted.append(predicted_decrease(info))
                run.actual.append((info.loss - after).item())
        report(name, epoch, run)
    print(f"   {sum(run.seconds):.2f} s for {len(run.seconds)} steps\n")
    return run


@torch.no_grad()
def evaluate(run: Run, params: PyTree, task: Task) -> None:
    """Append the loss of the training images and the accuracy on the test images to a run."""
    run.losses.append(F.cross_entropy(task.model_fn(params, task.images.X), task.images.y).item())
    hits = task.model_fn(params, task.test.X).argmax(1) == task.test.y
    run.accuracies.append(hits.double().mean().item())


def predicted_decrease(info: NewtonInfo) -> float:
    """Return the decrease of the quadratic model, −Σ_k (γ_k c_k + ½ λ_k c_k²).

    ``info.coefficients`` are of the whole step; c_k are those of the step times the learning rate.
    """
    c = NEWTON_RATE * info.coefficients
    return -(info.gammas.mean(0) * c + info.evals * c**2 / 2).sum().item()


def report(name: str, epoch: int, run: Run) -> None:
    """Print a line for the last epoch; before the first one, a headline."""
    head = f"   {name:13s}  epoch    loss  accuracy"
    line = f"   {'':13s}  {epoch:5d} {run.losses[-1]:7.4f} {run.accuracies[-1]:9.1%}"
    if run.infos:
        leading = fmean(info.evals.max().item() for info in run.infos[-BATCH_COUNT:])
        rank = fmean(info.rank.item() for info in run.infos[-BATCH_COUNT:])
        predicted, actual = fmean(run.predicted[-BATCH_COUNT:]), fmean(run.actual[-BATCH_COUNT:])
        head += "  eigenvalue  rank  predicted  actual"
        line += f"  {leading:10.2f} {rank:5.0f} {predicted:10.4f} {actual:7.4f}"
    print(line if epoch > 1 else f"{head}\n{line}")


def digits_example(epochs: int, seed: int) -> dict[str, Run]:
    """Train a net on the digits with all three methods, and return their courses."""
    print(SETTINGS)
    # One net, and one order of the images, for all methods.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    model_fn, params = function_and_params(model)
    task = Task(model_fn, *digits(seed), epochs, seed)
    # Each method starts from a copy of the net's parameters.
    runs = {"damped Newton": train("damped Newton", damped_newton(model_fn), params, task)}
    sgd, adam = partial(SGD, lr=SGD_RATE, momentum=0.9), partial(Adam, lr=ADAM_RATE)
    optimizers: dict[str, Callable[..., Optimizer]] = {"SGD": sgd, "Adam": adam}
    for name, optimizer in optimizers.items():
        params = {key: p.requires_grad_() for key, p in function_and_params(model)[1].items()}
        runs[name] = train(name, first_order(model_fn, optimizer(params.values())), params, task)
    return runs
