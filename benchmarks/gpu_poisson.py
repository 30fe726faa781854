"""Poisson's equation in five dimensions on a GPU: the error against seconds of training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_process import Job, Measurement, synchronize
from benchmarks.training.pinns import SOFT_PROBLEMS
from ddnewton import directional_newton, prepare, spring

PROBLEM, QUICK_PROBLEM = "poisson-5d", "poisson-10d"
SEED = 0
POINTS, FIRST = 24, 1.0
"""How often the error is measured, in geometric distances from so many seconds on."""


class Training:
    """A run, whose clock stands still while the error is measured."""

    def __init__(self, problem: str, device: str) -> None:
        self.problem, self.device = SOFT_PROBLEMS[problem](), device
        self.generator = torch.Generator().manual_seed(SEED)
        self.params = {name: p.to(device) for name, p in self.problem.start(SEED).items()}
        X = self.drawn()
        self.zeros = torch.zeros(len(X), dtype=X.dtype, device=device)
        prepared = prepare(self.problem.model_fn, self.params, X)
        self.optimizer = directional_newton(prepared, nn.MSELoss(), spring())
        self.state = self.optimizer.init(self.params)
        self.seconds, self.updates = 0.0, 0

    def drawn(self) -> Tensor:
        """Return new points."""
        return self.problem.batch(self.generator).to(self.device)

    def train_until(self, seconds: float, updates: int | None) -> dict[str, Any]:
        """Go on for so many seconds of training, or updates; return the error and the loss."""
        start, before = time.perf_counter(), self.seconds
        while self.seconds < seconds if updates is None else self.updates < updates:
            state = self.params, self.state, self.drawn(), self.zeros
            self.params, self.state, info = self.optimizer.update(*state)
            self.updates += 1
            synchronize(self.device)
            self.seconds = before + time.perf_counter() - start
        error = self.problem.error({name: p.cpu() for name, p in self.params.items()})
        return {
            "seconds": self.seconds,
            "updates": self.updates,
            "error": float(error),
            "loss": float(info.loss),
        }


def measurements(job: Job) -> Iterator[Measurement]:
    """Yield the points of the curve."""
    if job.quick:
        training = Training(QUICK_PROBLEM, job.device)
        for updates in (1, 2):
            yield {"problem": QUICK_PROBLEM}, partial(training.train_until, 0.0, updates)
        return
    training = Training(PROBLEM, job.device)
    # What is left, less the time in which errors are measured.
    last = max(2 * FIRST, 0.95 * job.left() - 2)
    for number in range(POINTS):
        until = FIRST * (last / FIRST) ** (number / (POINTS - 1))
        if until > training.seconds:  # else the update before took longer
            yield {"problem": PROBLEM}, partial(training.train_until, until, None)
