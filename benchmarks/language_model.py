"""Train a small GPT by steps without the Gauss-Newton matrix, beside AdamW; no downloads.

Run with ``python -m benchmarks.language_model``. The data are the sources of Python's standard
library, split by file; the net is that of `benchmarks.character_model`. Every method is tuned on a
seed of its own, by the validation loss at the end of shorter runs; then its best settings run on
the reported seeds. Seconds are CPU seconds of updates and of drawing their batches, on one thread.
Every run that ends is a line of ``runs.jsonl``: what was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from bisect import bisect_right
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

import torch

from benchmarks import character_model, language_tables
from benchmarks.language_methods import METHODS, Config
from benchmarks.training.train import ENVIRONMENT, read

TUNING_SEED = 100
TUNING_SHARE = 0.375
"""How long a run is that chooses settings, of one that is reported."""

POINTS = 24
"""How many times in a run the validation loss is measured, ever less often."""


class Job(NamedTuple):
    """One run; its ``length`` is in CPU seconds, or in updates where a method has so many."""

    stage: str
    method: str
    config: Config
    seed: int
    length: float

    @property
    def key(self) -> str:
        """A name of its own, by which it is found again."""
        return json.dumps(self)


def run(job: Job) -> dict[str, Any]:
    """Train once; return the validation loss over updates and seconds."""
    torch.set_num_threads(1)
    method, config = METHODS[job.method], dict(job.config)
    batch = config.pop("batch")
    problem, text = character_model.problem(job.seed), character_model.standard_library().train
    # An update outside of the clock: a process pays for its first one.
    generator = torch.Generator().manual_seed(job.seed)
    first = character_model.sequences(text, batch, torch.Generator().manual_seed(0))
    method.start(problem, seed=job.seed, **config)(*first, 0.5)
    # The run itself, measured ever less often.
    update = method.start(problem, seed=job.seed, **config)
    params, seconds, updates, place, due, curve = problem.params, 0.0, 0, 0.0, 0.0, []
    places = [job.length * (point / POINTS) ** 2 for point in range(POINTS + 1)]
    while True:
        if place >= due:
            with torch.no_grad():
                loss = problem.criterion(problem.model_fn(params, problem.X), problem.y).item()
            curve.append({"updates": updates, "seconds": seconds, "loss": loss})
            if place >= job.length or not math.isfinite(loss):
                break
            due = places[bisect_right(places, place)]
        began = time.process_time()
        X, y = character_model.sequences(text, batch, generator)
        try:
            params = update(X, y, place / job.length)
        except ValueError:  # no derivative is finite any more
            curve.append({"updates": updates, "seconds": seconds, "loss": math.inf})
            break
        seconds, updates = seconds + time.process_time() - began, updates + 1
        place = float(updates) if method.updates else seconds
    return {**job._asdict(), "key": job.key, "curve": curve}


def run_all(jobs: Iterable[Job], pool: ProcessPoolExecutor, path: Path) -> None:
    """Run what has not been run, and append every record as it comes."""
    done = read(path)
    futures = [pool.submit(run, job) for job in jobs if job.key not in done]
    with path.open("a", encoding="utf-8") as file:
        for future in as_completed(futures):
            record = future.result()
            print(json.dumps(record), file=file, flush=True)
            end = record["curve"][-1]
            print(
                f"{record['stage']:6} {record['method']}, {record['config']}, seed "
                f"{record['seed']}: {end['loss']:.3f} after {end['updates']} updates, "
                f"{end['seconds']:.1f} s",
                flush=True,
            )


def tuning(name: str, options: argparse.Namespace) -> list[Job]:
    """Return the runs that choose a method's settings, none where there is one setting."""
    method = METHODS[name]
    length = min(method.updates, options.updates) or TUNING_SHARE * options.seconds
    grid = method.grid[: options.settings]
    return [Job("tune", name, config, TUNING_SEED, length) for config in grid if len(grid) > 1]


def reported(name: str, options: argparse.Namespace, done: dict[str, Any]) -> list[Job]:
    """Return the runs of a method's best settings that are reported."""

    def final_loss(job: Job) -> float:
        loss: float = done[job.key]["curve"][-1]["loss"]
        return loss if math.isfinite(loss) else math.inf

    method, jobs = METHODS[name], tuning(name, options)
    config = min(jobs, key=final_loss).config if jobs else method.grid[0]
    length = min(method.updates, options.updates) or options.seconds
    return [Job("report", name, config, seed, length) for seed in options.seed]


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="an update or two a run, of two settings"
    )
    parser.add_argument("--report", action="store_true", help="only write the table and the figure")
    parser.add_argument("--method", nargs="+", choices=METHODS, help="some methods only")
    parser.add_argument("--seconds", type=float, default=30.0, help="of a reported run")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1], help="of reported runs")
    parser.add_argument("--workers", type=int, default=1, help="how many runs at a time")
    parser.add_argument("--out", type=Path, help="folder of runs, table and figure")
    options = parser.parse_args(words)
    options.settings, options.updates, options.method = 9, 100, options.method or [*METHODS]
    if options.quick:
        options.seconds, options.settings, options.updates, options.seed = 1e-3, 2, 2, [0]
    if options.out is None:
        results = Path(__file__).parent / "results" / "language_model"
        options.out = Path(mkdtemp(prefix="language-")) if options.quick else results
    return options


def main() -> None:
    """Tune every method, run its best settings on the reported seeds, and write the report."""
    options = arguments()
    names = options.method
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "runs.jsonl"
    # Workers import torch after the environment is set.
    os.environ.update(ENVIRONMENT)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        if not options.report:
            run_all((job for name in names for job in tuning(name, options)), pool, path)
            done = read(path)
            jobs = [job for name in names for job in reported(name, options, done)]
            run_all(sorted(jobs, key=lambda job: job.seed), pool, path)
    language_tables.write(options.out, read(path).values(), METHODS, options.seconds)
    print(f"written: {options.out / 'language_model.md'} and a figure beside it")


if __name__ == "__main__":
    main()
