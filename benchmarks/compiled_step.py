"""A prepared step under `torch.compile`, as a user compiles it: parameters and batch go in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import flat
from benchmarks.quantities import DIRECTIONS, Answer
from benchmarks.recipes import Case
from ddnewton import newton_step, prepare, top_k

BACKEND = {"cuda": "inductor", "cpu": "aot_eager"}
"""On a CPU, where nobody times it, without a compiler for C++."""


def under_compile(function: Callable[..., Any], device: str, mode: str | None = None) -> Any:
    """Return a function under `torch.compile`, in a mode of its own on a GPU."""
    torch.compiler.reset()  # what was compiled before counts towards a limit
    if device == "cpu":
        return torch.compile(function, backend=BACKEND[device])
    return torch.compile(function, backend=BACKEND[device], mode=mode)


def compiled(mode: str | None = None) -> Callable[[Case, str], Answer]:
    """Return the peer of a mode: "reduce-overhead" records a CUDA graph and replays it."""

    def made(case: Case, quantity: str) -> Answer:
        model_fn, params, X, y, criterion = case.problem
        prepared = prepare(model_fn, params, X)
        select = top_k(DIRECTIONS) if quantity == "top10" else None

        def step(params: dict[str, Tensor], X: Tensor, y: Tensor) -> dict[str, Tensor]:
            return newton_step(prepared, params, X, y, criterion, case.damping, select=select)

        run = under_compile(step, X.device.type, mode)
        return lambda: flat(run(params, X, y))

    return made
