"""Train the same nets by our methods and by others, in the same seconds on the same seeds.

Run with ``python -m benchmarks.training.train``, or ``nox -s train``. Every method is first tuned
on seeds of its own, by validation data, over a grid of one size; then its best settings run on the
reported seeds. Every run that ends is a line of ``runs.jsonl``, so that a run of the whole can be
stopped and started again. Seconds are CPU seconds of updates alone, a worker has one thread.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import statistics
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

from benchmarks.training import training_tables
from benchmarks.training.grids import GRIDS, SHIPPED, Config
from benchmarks.training.installed_packages import PACKAGES, is_missing
from benchmarks.training.learning_curve import METHODS, Job, Record, run, score
from benchmarks.training.tasks import QUICK, SEEDS, TASKS, TUNING_SEEDS, Task, shortened

say = partial(print, flush=True)

BY_BUDGET = ("Adam, cosine", "SOAP")
"""Methods that know when they end: a run for every budget, where others have one for the longest.
"""
WARMING = 1.5
"""Seconds that a worker's first run of a method on a task takes longer."""


ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # Memory once taken is kept: the C library's way of giving it back costs large matrices dearly.
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
}
"""Of every worker, whatever its method."""


class Plan:
    """What is to be run, for the command line's options."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.quick: bool = options.quick
        self.names: list[str] = options.task
        self._methods: list[str] | None = options.method

    def about(self, name: str) -> Task:
        """Return a task."""
        return shortened(TASKS[name]) if self.quick else TASKS[name]

    def grids(self, name: str) -> dict[str, tuple[Config, ...]]:
        """Return the methods of a task, each with its grid."""
        task = TASKS[name]
        return {
            method: grid[:2] if self.quick else grid
            for method, grid in GRIDS[task.kind].items()
            if method not in task.without and not is_missing(method)
            if self._methods is None or method in self._methods
        }

    def tuning(self, name: str) -> Iterator[Job]:
        """Yield the runs that choose settings."""
        task = self.about(name)
        for method, grid in self.grids(name).items():
            if grid == SHIPPED:
                continue
            for seed in TUNING_SEEDS[: task.tuning_seeds]:
                for config in grid:
                    yield Job("tune", name, method, config, seed, task.tuning, self.quick)

    def best_settings(self, name: str, done: dict[str, Record]) -> dict[str, Config]:
        """Return each method's best settings, by the median over the tuning seeds."""
        scores: dict[str, list[tuple[float, Config]]] = {}
        task = self.about(name)
        seeds = TUNING_SEEDS[: task.tuning_seeds]
        for method, grid in self.grids(name).items():
            for config in grid if grid != SHIPPED else ():
                jobs = (
                    Job("tune", name, method, config, seed, task.tuning, self.quick)
                    for seed in seeds
                )
                middle = statistics.median(score(done[job.key], task) for job in jobs)
                scores.setdefault(method, []).append((middle, config))
        best = {method: min(pairs, key=lambda pair: pair[0])[1] for method, pairs in scores.items()}
        return {method: best.get(method, {}) for method in self.grids(name)}

    def reported(self, name: str, settings: dict[str, Config]) -> Iterator[Job]:
        """Yield the runs that are reported, seed by seed."""
        task = self.about(name)
        budgets = task.budgets or (0.0,)
        for seed in SEEDS[: task.seeds]:
            for method, config in settings.items():
                for seconds in budgets if method in BY_BUDGET else budgets[-1:]:
                    yield Job("report", name, method, config, seed, seconds, self.quick)

    def minutes(self, workers: int) -> dict[str, tuple[int, float]]:
        """Return for every task the number of runs and an estimate of the minutes they take."""
        estimate = {}
        for name in self.names:
            task, methods = self.about(name), self.grids(name)
            jobs = [*self.tuning(name), *self.reported(name, {method: {} for method in methods})]
            measured = task.points if task.steps is None else task.steps
            besides = task.setup + measured * task.evaluation
            steps = sum((job.about.steps or 0) * task.step for job in jobs)
            spent = sum(job.seconds + besides for job in jobs) + steps
            spent += WARMING * workers * len(methods)
            estimate[name] = (len(jobs), spent / 60 / workers)
        return estimate


def read(path: Path) -> dict[str, Record]:
    """Return the runs of a file by their keys, without a line that was cut off."""
    done: dict[str, Record] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            done[record["key"]] = record
    return done


def run_all(jobs: Iterable[Job], pool: ProcessPoolExecutor, path: Path) -> int:
    """Run what has not been run; append every record as it comes; return how many there were."""
    done = read(path)
    todo = [job for job in jobs if job.key not in done]
    if not todo:
        return 0
    futures = [pool.submit(run, job) for job in todo]
    with path.open("a", encoding="utf-8") as file:
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            print(file=file)  # the last line was cut off
        for future in as_completed(futures):
            record = future.result()
            print(json.dumps(record), file=file, flush=True)
            last = record["curve"][-1]
            say(
                f"{record['stage']:6} {record['task']:13} {record['method']:21} "
                f"{json.dumps(record['config'])} seed {record['seed']}: {record['status']}, "
                f"{record['steps']} steps, loss {last['train']:.1e}"
            )
    return len(todo)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three updates a run")
    parser.add_argument("--plan", action="store_true", help="print how long it takes, and stop")
    parser.add_argument("--report", action="store_true", help="only write tables and figures")
    parser.add_argument("--task", nargs="+", choices=TASKS, help="some tasks only")
    parser.add_argument("--method", nargs="+", choices=METHODS, help="some methods only")
    parser.add_argument("--out", type=Path, help="folder of runs, tables and figures")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 2)
    # What depends on other options.
    options = parser.parse_args(words)
    options.task = options.task or list(QUICK if options.quick else TASKS)
    if options.out is None:
        results = Path(__file__).parents[1] / "results" / "training"
        options.out = Path(mkdtemp(prefix="training-")) if options.quick else results
    return options


def main() -> None:
    """Run the plan, task by task, and write the report after each of them."""
    options = arguments()
    logging.basicConfig(format="%(message)s")
    # What is to be run, and how long it takes.
    plan = Plan(options)
    for name, (runs, minutes) in plan.minutes(options.workers).items():
        say(f"{name:13} {runs:4} runs, about {minutes:5.1f} minutes")
    total = sum(minutes for _, minutes in plan.minutes(options.workers).values())
    say(f"{'all':13} about {total:.0f} minutes with {options.workers} workers")
    for method in filter(is_missing, PACKAGES):
        say(f"{method}: not installed, {' and '.join(PACKAGES[method])}")
    if options.plan:
        return
    # Workers of their own, which import torch after the environment is set.
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "runs.jsonl"
    os.environ.update(ENVIRONMENT)
    context = multiprocessing.get_context("spawn")
    new = 0
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        # Task by task: tune, then report with the best settings.
        for name in () if options.report else options.task:
            new += run_all(plan.tuning(name), pool, path)
            settings = plan.best_settings(name, read(path))
            new += run_all(plan.reported(name, settings), pool, path)
            if not options.quick:
                training_tables.write(options.out, read(path))
    training_tables.write(options.out, read(path))
    say(f"{new} new runs; written: {options.out / 'training.md'} and figures beside it")


if __name__ == "__main__":
    main()
