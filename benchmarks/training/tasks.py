"""The tasks: how long, by what settings are chosen and by what they are judged."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from benchmarks import nets
from benchmarks.training import data
from benchmarks.training.instances import (
    Instance,
    classification,
    pde,
    regression,
    soft,
    trained,
)
from benchmarks.training.pdes import EQUATIONS
from benchmarks.training.pinns import SOFT_PROBLEMS

SEEDS = tuple(range(10))
"""Of reported runs: a task takes the first few."""
TUNING_SEEDS = (100, 101)


class Task(NamedTuple):
    """A task.

    ``kind`` says which methods there are and over which grids they are tuned: ``full`` batch,
    ``mini`` batches, ``late``, a number of ``steps`` from a trained net in place of seconds, or
    ``drawn``, so many on new points. A run is measured at ``points``, in geometric distances over
    its last ``decades``, or at every step. For the plan: a run takes ``setup`` seconds besides,
    each measurement ``evaluation``, and where steps count each of them ``step``.
    """

    build: Callable[[int], Instance]
    kind: str
    group: str
    budgets: tuple[float, ...]
    tuning: float
    judged: str
    tuned: str
    level: float | None = None
    every_step: bool = False
    points: int = 40
    decades: float = 3.0
    steps: int | None = None
    tuning_steps: int | None = None
    step: float = 0.0
    seeds: int = 5
    tuning_seeds: int = 1
    without: tuple[str, ...] = ()
    setup: float = 0.1
    evaluation: float = 0.01


def small_tanh() -> nn.Module:
    """Return the net of the digits."""
    return nets.mlp(64, 32, 10, activation=nn.Tanh)


def wide_relu() -> nn.Module:
    """Return the perceptron of Fashion-MNIST."""
    return nets.mlp(784, 64, 10)


def a_teacher(seed: int) -> data.Split:
    """Return the outputs of a teacher of the student's shape."""
    torch.manual_seed(seed)
    return data.teacher(nets.mlp(6, 32, 32, 1, activation=nn.Tanh), seed)


build_digits = partial(classification, data.digits, small_tanh)
build_fashion = partial(classification, partial(data.fashion, flat=True), wide_relu)
build_2c2d = partial(
    classification, partial(data.fashion, flat=False, test=400), nets.net_2c2d, batch=64
)

_pde = partial(
    Task,
    kind="full",
    group="pde",
    budgets=(5.0, 20.0),
    tuning=6.0,
    judged="error",
    tuned="valid",
    without=("constant", "LM", "trust region", "ENGD"),  # more parameters than rows
)
_soft = partial(
    _pde, without=("SGD", "Adam", "constant", "LM", "LM, momentum", "trust region", "ENGD-W")
)
_least_squares = partial(Task, kind="full", group="regression", without=("ENGD",))
_images = partial(
    Task, kind="mini", group="images", judged="test_accuracy", tuned="seconds to level"
)
_late = partial(
    Task, kind="late", group="late", budgets=(), tuning=0.0, judged="test", tuned="valid", steps=10
)

TASKS = {
    "teacher": _least_squares(
        partial(regression, a_teacher, (6, 32, 32, 1)),
        budgets=(4.0,),
        tuning=4.0,
        judged="train",
        tuned="train",  # what is judged is how far it falls, on other seeds
    ),
    "diabetes": _least_squares(
        partial(regression, data.diabetes, (10, 32, 1)),
        budgets=(2.0,),
        tuning=2.0,
        judged="test",
        tuned="valid",
    ),
    "poisson-1d": _pde(partial(pde, EQUATIONS["poisson-1d"], 200)),
    "poisson-2d": _pde(partial(pde, EQUATIONS["poisson-2d"], 400)),
    "heat": _pde(partial(pde, EQUATIONS["heat"], 400)),
    "engd-poisson-2d": _soft(partial(soft, SOFT_PROBLEMS["engd-poisson-2d"])),
    "engd-heat": _soft(partial(soft, SOFT_PROBLEMS["engd-heat"])),
    "engd-poisson-5d": _soft(
        partial(soft, SOFT_PROBLEMS["engd-poisson-5d"]), budgets=(5.0, 20.0, 40.0), evaluation=0.1
    ),
    "diffusivity": _soft(partial(soft, SOFT_PROBLEMS["diffusivity"])),
    "poisson-10d": Task(
        partial(soft, SOFT_PROBLEMS["poisson-10d"]),
        kind="drawn",
        group="drawn",
        budgets=(),
        tuning=0.0,
        judged="error",
        tuned="valid",
        steps=400,
        tuning_steps=100,
        step=0.5,
        evaluation=0.1,
    ),
    "digits": _images(
        build_digits,
        budgets=(6.0,),
        tuning=4.0,
        level=0.97,
        every_step=True,
        seeds=10,
        tuning_seeds=2,
    ),
    "fashion-mlp": _images(
        build_fashion,
        budgets=(20.0,),
        tuning=6.0,
        level=0.85,
        setup=0.5,
        evaluation=0.05,
        without=("held-out, complement", "held-out γ and λ", "noise-aware"),
    ),
    "fashion-2c2d": _images(
        build_2c2d,
        budgets=(40.0,),
        tuning=10.0,
        level=0.75,
        points=8,
        decades=1.0,
        setup=0.5,
        evaluation=1.0,
        without=(
            "constant",
            "constant, momentum",
            "held-out",
            "held-out, complement",
            "held-out, no momentum",
            "held-out γ and λ",
            "noise-aware",
        ),
    ),
    "late-digits": _late(
        partial(trained, build_digits, 400, 1e-2), setup=1.5, seeds=10, tuning_seeds=2
    ),
    "late-fashion": _late(
        partial(trained, build_fashion, 1500, 3e-3), setup=2.5, seeds=10, evaluation=0.05
    ),
}
QUICK = ("diabetes", "poisson-1d", "engd-heat", "digits", "late-digits")


def shortened(task: Task) -> Task:
    """Return a task that ends after three updates, however long they take, to see that it works."""
    return task._replace(
        steps=3,
        tuning_steps=None,
        seeds=2,
        tuning_seeds=1,
    )
