"""One run: a task, a method, its settings and a seed in; a record with its curves out."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from itertools import count
from time import perf_counter
from typing import Any, NamedTuple

import torch

from benchmarks.training.competitors import COMPETITORS, Start, Update
from benchmarks.training.damped_newton import DAMPED_NEWTON
from benchmarks.training.data import fashion_folder
from benchmarks.training.grids import Config
from benchmarks.training.instances import Instance, batches
from benchmarks.training.tasks import TASKS, Task, shortened

METHODS = COMPETITORS | DAMPED_NEWTON
Record = dict[str, Any]

WARM_SEED = 999
WARM_UP = 3
"""Updates before the clock starts: torch's first calls cost seconds, whatever the method."""


class Job(NamedTuple):
    """What a run is of; ``seconds`` on the clock, 0 where the task counts steps."""

    stage: str
    task: str
    method: str
    config: Config
    seed: int
    seconds: float
    quick: bool = False

    @property
    def key(self) -> str:
        """Return what tells this run from all others."""
        return json.dumps(self, sort_keys=True)

    @property
    def about(self) -> Task:
        """Return the task."""
        return shortened(TASKS[self.task]) if self.quick else TASKS[self.task]


class Clock:
    """The seconds that updates took, and nothing else; ``last`` is how long the last took."""

    def __init__(self) -> None:
        self.seconds = self.last = 0.0
        self._started = 0.0

    def __enter__(self) -> None:
        self._started = perf_counter()

    def __exit__(self, *_: object) -> None:
        self.last = perf_counter() - self._started
        self.seconds += self.last


def times(task: Task, seconds: float) -> list[float]:
    """Return when to measure, ascending: at geometric distances, and at every budget."""
    start = math.log10(seconds) - task.decades
    spaced = torch.logspace(start, math.log10(seconds), task.points, dtype=torch.float64)
    budgets = {budget for budget in task.budgets if budget <= seconds} | {seconds}
    return sorted({float(t) for t in spaced[:-1]} | budgets)


@lru_cache(2)
def instance_of(name: str, seed: int) -> Instance:
    """Return a task's instance; several methods in a row share a seed's."""
    return TASKS[name].build(seed)


def on_schedule(task: Task, clock: Clock, seconds: float) -> Any:
    """Return a function of the steps so far that tells whether to measure and whether to end.

    The third is the progress. A run is measured where it is nearest to the time, half an update
    early or late.
    """
    due = times(task, seconds) if task.steps is None else []

    def ask(steps: int) -> tuple[bool, bool, float]:
        if task.steps is not None:
            return True, steps >= task.steps, steps / task.steps
        if not steps:  # however short the time, a run has an update
            return False, False, 0.0
        passed = [t for t in due if clock.seconds + clock.last / 2 >= t]
        del due[: len(passed)]
        return bool(passed), not due, clock.seconds / seconds

    return ask


def look(reached: Record, level: float | None, point: Record) -> None:
    """Note the first step and second at which the accuracy has reached a level."""
    for part, before in reached.items():
        if before is None and point[f"{part}_accuracy"] >= level:
            reached[part] = (point["steps"], point["seconds"])


@torch.no_grad()
def follow(job: Job, instance: Instance, start: Start) -> Record:
    """Return the curve of one run, and how it ended."""
    # What a method prepares is on the clock too.
    task, clock = job.about, Clock()
    with clock:
        update: Update = start(instance, **job.config)
    clock.last = 0.0
    ask = on_schedule(task, clock, job.seconds)
    reached: Record = dict.fromkeys(("valid", "test") if task.level is not None else ())
    params, steps, status = instance.problem.params, 0, "ok"
    curve = [{"seconds": 0.0, "steps": 0} | instance.measure(params)]
    draws = batches(instance, job.seed)
    # Measure where it is due, then update.
    for made in count():
        now, ended, progress = ask(made)
        if made and (now or (task.every_step and None in reached.values())):
            point = {"seconds": clock.seconds, "steps": steps} | instance.measure(params)
            look(reached, task.level, point)
            curve += [point] if now else []
            if not math.isfinite(point["train"]):
                status = "diverged"
                break
        if ended:
            break
        X, y = next(draws)
        try:
            with torch.enable_grad(), clock:
                params, more = update(X, y, progress)
        except (RuntimeError, ValueError, ArithmeticError) as error:
            status = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
            break
        steps += more
    # A run that ends far above its start has failed as well.
    if status == "ok" and curve[-1]["train"] > 10 * curve[0]["train"]:
        status = "diverged"
    return {"status": status, "steps": steps, "curve": curve, "reached": reached}


_warm: set[tuple[str, str]] = set()


def warm_up(job: Job) -> None:
    """Make a few updates on another seed's data, in another shape, once in a process."""
    if (job.task, job.method) in _warm:
        return
    _warm.add((job.task, job.method))
    instance = instance_of(job.task, WARM_SEED)
    problem = instance.problem
    X, y = (part[: len(part) * 3 // 4] for part in (problem.X, problem.y))
    batch = None if instance.batch is None else instance.batch // 2
    instance = Instance(problem._replace(X=X, y=y), batch, instance.measure)
    try:
        update = METHODS[job.method](instance, **job.config)
        for _, (X, y) in zip(range(WARM_UP), batches(instance, 0), strict=False):
            update(X, y, 0.5)
    except (RuntimeError, ValueError, ArithmeticError):
        pass  # it will be told of when it happens in a run


def run(job: Job) -> Record:
    """Run a job; return its description and what came of it, ready for JSON."""
    torch.set_num_threads(1)
    began = perf_counter()
    warm_up(job)
    curve = follow(job, instance_of(job.task, job.seed), METHODS[job.method])
    spent = {"elapsed": perf_counter() - began}
    if job.task.startswith("fashion") or job.task.endswith("fashion"):
        spent["data"] = "digits, enlarged" if fashion_folder() is None else "Fashion-MNIST"
    return {"key": job.key} | job._asdict() | spent | curve


def score(record: Record, task: Task) -> float:
    """Return what tuning minimises: infinite where a run has failed."""
    if record["status"] != "ok":
        return math.inf
    last = record["curve"][-1]
    if task.tuned != "seconds to level":
        return last[task.tuned]
    reached = record["reached"]["valid"]
    best = max(point["valid_accuracy"] for point in record["curve"])
    return reached[1] if reached else record["seconds"] * (2 - best)
