"""The largest batch on a GPU whose step with the top 10 fits in a stated memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_plan import TIME_WAS_UP
from benchmarks.gpu_process import Job, Measurement, seconds_of
from benchmarks.largest_batch import largest
from benchmarks.measure import watch
from benchmarks.peers import PEERS
from benchmarks.processes import in_words
from benchmarks.recipes import build

STARTS = {
    ("mlp", "vivit"): (64, 128, 192),
    ("mlp", "ddnewton"): (128, 256, 384),
    ("3c3d-128", "vivit"): (16, 32, 48),
    ("3c3d-128", "ddnewton"): (64, 128, 192),
    ("mlp", "jacrev"): (16, 32, 64),
    ("3c3d-128", "jacrev"): (16, 32, 64),
}
"""Which problems and peers, and the batches to begin with."""
QUICK_STARTS = {("tiny-mlp", "ddnewton"): (2, 4), ("tiny-mlp", "jacrev"): (2, 4)}
TRIES = 2
CUBIC = 3
"""A step with all eigenpairs takes seconds as the third power of the batch, at most."""


def measurements(job: Job) -> Iterator[Measurement]:
    """Yield the searches."""
    starts = QUICK_STARTS if job.quick else STARTS
    for number, (problem, peer) in enumerate(starts):
        share = 1 / (len(starts) - number)
        yield {"problem": problem, "peer": peer}, partial(searched, job, problem, peer, share)


def searched(job: Job, problem: str, peer: str, share: float) -> dict[str, Any]:
    """Return the largest batch that was run in a share of the time, and where the peaks lead."""
    tried: list[tuple[int, float]] = []
    until = job.left() * (1 - share)

    def measure(problem: str, peer: str, samples: int) -> dict[str, Any]:
        n, seconds = tried[-1] if tried else (samples, 0.0)
        expected = seconds * (samples / n) ** CUBIC
        if job.left() < until:
            return {"status": TIME_WAS_UP}
        if expected > job.left() - until:
            return {"status": f"not run: would take {expected:.0f} s"}
        record = once(job, problem, peer, samples)
        if record["status"] == "ok":
            tried.append((samples, record["seconds"]))
        return record

    PEERS[peer].make(build("tiny-mlp", job.device), "top10")()  # imports and first derivatives
    starts = (QUICK_STARTS if job.quick else STARTS)[problem, peer]
    return largest(measure, problem, peer, starts, tries=0 if job.quick else TRIES)


def once(job: Job, problem: str, peer: str, samples: int) -> dict[str, Any]:
    """Return peak and seconds of a step, or that there was not enough memory."""
    try:
        run = PEERS[peer].make(build(problem, job.device, samples=samples), "top10")
        peak = watch(job.device)
        seconds = seconds_of(run, job.device)
        return {"status": "ok", "peak": max(peak(), 1), "seconds": seconds}
    except (RuntimeError, MemoryError, ValueError) as error:
        return {"status": in_words(f"{type(error).__name__}: {error}")}
    finally:
        gc.collect()
        if job.device == "cuda":
            torch.cuda.empty_cache()
