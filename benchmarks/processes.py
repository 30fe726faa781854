"""Processes of the benchmark: each measures, or leaves word why it could not."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.recipes import RECIPES
from benchmarks.step_tables import Record, cell

ROOT = Path(__file__).parents[1]

say = partial(print, flush=True)

TOO_MUCH = ("allocate", "MemoryError", "bad_alloc", "out of memory", "RESOURCE_EXHAUSTED")
"""What errors say where memory ran out."""


class Job(NamedTuple):
    """What one process does."""

    problem: str
    peer: str
    quantities: tuple[str, ...]
    limit: float
    samples: int | None = None


class Bench(NamedTuple):
    """What all processes share."""

    folder: Path
    device: str
    threads: int
    memory: int
    deadline: float
    patience: float
    runs: int | None = None  # so many and no time limits, in place of patience


def run(bench: Bench, job: Job) -> list[Record]:
    """Run a job and return a record for every quantity, whatever happens."""
    folder = bench.folder / "-".join([job.problem, job.peer, *job.quantities, str(job.samples)])
    folder.mkdir(parents=True)
    # What the process is told.
    arguments = [folder, job.problem, job.peer, *job.quantities, "--device", bench.device]
    arguments += ["--threads", bench.threads]
    if bench.device == "cpu":  # CUDA reserves addresses without end
        arguments += ["--memory", bench.memory]
    if bench.runs is None:
        slow = min(job.limit / 3, 8 * bench.patience)
        arguments += ["--patience", bench.patience, "--slow", slow]
    else:
        arguments += ["--runs", bench.runs]
    if job.samples is not None:
        arguments += ["--samples", job.samples]
    environment = os.environ | {"OMP_NUM_THREADS": str(bench.threads)}
    if bench.threads == 1:
        environment["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    # How long it may take, and what came of it.
    limit = min(job.limit, bench.deadline - time.monotonic())
    if limit < 5:
        status = "not run: the time was up"
    else:
        try:
            ended = subprocess.run(
                [sys.executable, "-m", "benchmarks.measure", *map(str, arguments)],
                cwd=ROOT,
                env=environment,
                timeout=None if math.isinf(limit) else limit,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
            status = failure(folder, ended)
        except subprocess.TimeoutExpired:
            status = f"more than {limit:.0f} s"
    return [outcome(folder, job, quantity, status) for quantity in job.quantities]


def failure(folder: Path, ended: subprocess.CompletedProcess[str]) -> str:
    """Return in a few words how a process ended."""
    if ended.returncode == 0:
        return "ok"
    explained = folder / "error.txt"
    if explained.exists():
        text = explained.read_text(encoding="utf-8")
    else:
        text = (ended.stderr.strip().splitlines() or [f"ended with {ended.returncode}"])[-1]
    return "out of memory" if ended.returncode == -signal.SIGKILL else in_words(text)


def in_words(error: str) -> str:
    """Return the status that an error's kind and message come to."""
    if error.startswith("ModuleNotFoundError"):
        return "not installed"
    if any(word in error for word in TOO_MUCH):
        return "out of memory"
    return f"failed: {error.splitlines()[0][:100]}".replace("|", "/")


def outcome(folder: Path, job: Job, quantity: str, status: str) -> Record:
    """Return the record that a process left, or one that says why it left none."""
    record: Record = {
        "problem": job.problem,
        "samples": job.samples or RECIPES[job.problem].samples,
        "peer": job.peer,
        "quantity": quantity,
        "status": status,
    }
    left = folder / f"{quantity}.json"
    if left.exists():
        record |= {"status": "ok"} | json.loads(left.read_text(encoding="utf-8"))
        answer = folder / f"{quantity}.pt"
        if answer.exists():
            record["answer"] = str(answer)
    return record


def run_all(bench: Bench, todo: list[Job], workers: int) -> list[Record]:
    """Run the jobs and return their records; what failed by its size is not tried again."""
    lost: dict[tuple[str, str], str] = {}

    # A peer that was lost to a problem once is not tried again on it.
    def one(job: Job) -> list[Record]:
        if reason := lost.get((job.problem, job.peer)):
            return [outcome(bench.folder / "none", job, q, reason) for q in job.quantities]
        records = run(bench, job)
        for record in records:
            print(
                f"{job.problem:10} {job.peer:20} {record['quantity']:12} {cell(record)}", flush=True
            )
            if record["status"].startswith(("more than", "out of memory", "not installed")):
                lost[job.problem, job.peer] = record["status"]
        return records

    with ThreadPoolExecutor(workers) as pool:
        return [record for records in pool.map(one, todo) for record in records]


def free_memory() -> int:
    """Return the bytes that are free, on Linux."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
