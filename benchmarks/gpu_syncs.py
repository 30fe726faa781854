"""How often a step waits for the GPU, and where; kernels, copies and calls by torch's profiler."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.compiled_step import under_compile
from benchmarks.gpu_process import Job, Measurement, seconds_of
from benchmarks.quantities import DIRECTIONS
from benchmarks.recipes import Case, build
from benchmarks.waits import profiled, reads_of, waits_of
from ddnewton import (
    directional_newton,
    levenberg_marquardt,
    monte_carlo,
    newton_step,
    prepare,
    top_k,
)

ORDER = (
    ("mlp", 64, "prepared"),
    ("mlp", 64, "compiled"),
    ("reference", 4, "prepared"),
    ("reference", 4, "compiled"),
    ("3c3d-128", 128, "prepared"),
)
"""The last makes so many calls that torch's profiler needs seconds to count them."""
QUICK_ORDER = (("tiny-mlp", 6, "prepared"), ("tiny-mlp", 6, "compiled"))
RUNS = 5


def functions_of(case: Case) -> dict[str, Callable[..., Any]]:
    """Return the steps and the update that are looked into, of parameters, inputs and targets."""
    model_fn, params, X, _, criterion = case.problem
    prepared = prepare(model_fn, params, X)
    drawn = monte_carlo(criterion, 1, torch.Generator().manual_seed(0))
    optimizer = directional_newton(prepared, criterion, levenberg_marquardt())
    state, damping, select = optimizer.init(params), case.damping, top_k(DIRECTIONS)
    return {
        "step, one δ": lambda p, X, y: newton_step(prepared, p, X, y, criterion, damping),
        "step, top 10": lambda p, X, y: newton_step(
            prepared, p, X, y, criterion, damping, select=select
        ),
        "Monte-Carlo step": lambda p, X, y: newton_step(
            prepared, p, X, y, drawn, damping, complement=damping
        ),
        "Levenberg-Marquardt update": lambda p, X, y: optimizer.update(p, state, X, y),
    }


def looked_into(job: Job, problem: str, samples: int, name: str, way: str) -> dict[str, Any]:
    """Return what a step waits for, how many kernels it starts, and its seconds."""
    case = build(problem, job.device, torch.float32, samples)
    function = functions_of(case)[name]
    if way == "compiled":
        function = under_compile(function, job.device)
    run = partial(function, case.problem.params, case.problem.X, case.problem.y)
    # The first derivatives, and what is compiled, come before.
    for _ in range(2):
        run()
    seconds = statistics.median(seconds_of(run, job.device) for _ in range(RUNS))
    # On a CPU nothing waits, and of what is compiled no single calls can be looked at.
    look = waits_of if job.device == "cuda" else reads_of
    places = look(run) if job.device == "cuda" or way == "prepared" else {}
    return {
        "seconds": seconds,
        "waits": sum(places.values()),
        "places": places,
        "profile": profiled(run, job.device),
    }


def measurements(job: Job) -> Iterator[Measurement]:
    """Yield what is looked into; where it is to be quick, of compiled steps the first alone."""
    names = list(functions_of(build("tiny-mlp", job.device, torch.float32)))
    for problem, samples, way in QUICK_ORDER if job.quick else ORDER:
        for name in names[:1] if job.quick and way == "compiled" else names:
            about = {"problem": problem, "samples": samples, "way": way, "name": name}
            yield about, partial(looked_into, job, problem, samples, name, way)
