"""One run: a task, a method, its settings and a seed in; a record with its curves out."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from itertools import count
from time import perf_counter, process_time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.training.competitors import COMPETITORS
from benchmarks.training.damped_newton import DAMPED_NEWTON
from benchmarks.training.data import fashion_folder
from benchmarks.training.grids import Config
from benchmarks.training.instances import Instance, Params, batches
from benchmarks.training.tasks import TASKS, Task, shortened
from benchmarks.training.updates import Finished, Start, Update

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
        """Return the task; where steps count, with those of the stage."""
        task = shortened(TASKS[self.task]) if self.quick else TASKS[self.task]
        if self.stage == "tune" and task.tuning_steps is not None:
            return task._replace(steps=task.tuning_steps)
        return task


class Clock:
    """The CPU seconds that updates took, and nothing else; ``last`` is how long the last took."""

    def __init__(self) -> None:
        self.seconds = self.last = 0.0
        self._started = 0.0

    def __enter__(self) -> None:
        self._started = process_time()

    def __exit__(self, *_: object) -> None:
        self.last = process_time() - self._started
        self.seconds += self.last


def times(task: Task, seconds: float) -> list[float]:
    """Return when to measure, ascending: at geometric distances, and at every budget."""
    start = math.log10(seconds) - task.decades
    spaced = torch.logspace(start, math.log10(seconds), task.points, dtype=torch.float64)
    budgets = {budget for budget in task.budgets if budget <= seconds} | {seconds}
    return sorted({float(t) for t in spaced[:-1]} | budgets)


def stops(steps: int, points: int) -> set[int]:
    """Return after which steps to measure: all of a few, and else at geometric distances."""
    if steps <= points:
        return set(range(steps + 1))
    return {round(steps ** (i / (points - 1))) for i in range(points)} | {steps // 2, steps // 4}


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
    measured = stops(task.steps, task.points) if task.steps is not None else set()

    def ask(steps: int) -> tuple[bool, bool, float]:
        if task.steps is not None:
            return steps in measured, steps >= task.steps, steps / task.steps
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


class Attempt(NamedTuple):
    """The parameters after an update, its steps, and "ok", "finished" or how it failed."""

    params: Params
    steps: int
    status: str


def attempted(
    update: Update, params: Params, batch: tuple[Tensor, Tensor], progress: float, clock: Clock
) -> Attempt:
    """Make an update on the clock; the parameters stay where there is none."""
    try:
        with torch.enable_grad(), clock:
            return Attempt(*update(*batch, progress), "ok")
    except Finished:
        return Attempt(params, 0, "finished")
    except (RuntimeError, ValueError, ArithmeticError) as error:
        words = str(error).splitlines()[0][:120] if str(error) else ""
        return Attempt(params, 0, f"failed: {type(error).__name__}: {words}")


@torch.no_grad()
def follow(job: Job, instance: Instance, start: Start) -> Record:
    """Return the curve of one run, how it ended, and when it had nothing left to do."""
    # What a method prepares is on the clock too.
    task, clock = job.about, Clock()
    with clock:
        update: Update = start(instance, **job.config)
    clock.last = 0.0
    ask, draws = on_schedule(task, clock, job.seconds), batches(instance, job.seed)
    reached: Record = dict.fromkeys(("valid", "test") if task.level is not None else ())
    params, steps, status = instance.problem.params, 0, "ok"
    curve = [{"seconds": 0.0, "steps": 0} | instance.measure(params)]
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
        params, more, status = attempted(update, params, next(draws), progress, clock)
        if status != "ok":
            break
        steps += more
    # A run that has nothing left to do stays where it is for as long as the others go on.
    finished = clock.seconds if status == "finished" else None
    if finished is not None:
        status = "ok"
        place = {"seconds": max(job.seconds, finished), "steps": steps}
        curve.append(place | instance.measure(params))
    # A run that ends far above its start has failed as well.
    if status == "ok" and curve[-1]["train"] > 10 * curve[0]["train"]:
        status = "diverged"
    return {
        "status": status,
        "steps": steps,
        "curve": curve,
        "reached": reached,
        "finished": finished,
    }


def sized(instance: Instance, config: Config) -> tuple[Instance, Config]:
    """Return the instance with batches as large as settings ask for, and all other settings.

    ``batches`` is how many of the task's there are in one; without it, one.
    """
    settings = dict(config)
    count = settings.pop("batches", 1)
    return instance._replace(batch=instance.batch and count * instance.batch), settings


_warm: set[tuple[str, str]] = set()


def warm_up(job: Job) -> None:
    """Make a few updates on another seed's data, in another shape, once in a process."""
    if (job.task, job.method) in _warm:
        return
    _warm.add((job.task, job.method))
    instance, settings = sized(instance_of(job.task, WARM_SEED), job.config)
    problem = instance.problem
    if instance.draw is None:  # points that are drawn are as many in every step
        X, y = (part[: len(part) * 3 // 4] for part in (problem.X, problem.y))
        batch = None if instance.batch is None else instance.batch // 2
        instance = instance._replace(problem=problem._replace(X=X, y=y), batch=batch)
    try:
        update = METHODS[job.method](instance, **settings)
        updates = 1 if job.quick else WARM_UP
        for _, (X, y) in zip(range(updates), batches(instance, 0), strict=False):
            update(X, y, 0.5)
    except (Finished, RuntimeError, ValueError, ArithmeticError):
        pass  # it will be told of when it happens in a run


def run(job: Job) -> Record:
    """Run a job; return its description and what came of it, ready for JSON."""
    torch.set_num_threads(1)
    began = perf_counter()
    warm_up(job)
    instance, settings = sized(instance_of(job.task, job.seed), job.config)
    curve = follow(job._replace(config=settings), instance, METHODS[job.method])
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
