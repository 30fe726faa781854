"""The processes of the benchmark of several processes: all of them make the same steps in turns.

Started by `benchmarks.several_processes`. In every round the first process makes a step by itself,
while the others wait; then all make the same step together, each with its share of the samples. So
both are measured in the same minutes, by processes that are equally warm.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.floor import contraction, visited
from benchmarks.ranks_model import Net, Speeds, bytes_of, seconds_of, visit_flops
from benchmarks.recipes import Case, build
from ddnewton import newton_step, prepare, top_k
from ddnewton.linearize.precision import CHEAP_FLOPS

Record = dict[str, Any]


class Task(NamedTuple):
    """A step: of which problem of `benchmarks.recipes`, at how many samples, and which way."""

    problem: str
    samples: int
    quantity: str
    prepared: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """The options of `newton_step`."""
        return QUANTITIES[self.quantity]


QUANTITIES: dict[str, dict[str, Any]] = {
    "one δ": {},
    "top 10": {"select": top_k(10)},
    "free": {"gram": "free"},
}


class Turn(NamedTuple):
    """A step, with its wall-clock time and the CPU time of this process."""

    step: Any
    seconds: float
    cpu: float


class Traffic(logging.Handler):
    """What the log tells of the bytes that this rank has sent, by what they were."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Read the line of a call."""
        words = str(record.args[2]) if isinstance(record.args, tuple) else "none"
        pairs = [word.split() for word in words.split(", ") if word != "none"]
        self.sent = {kind: int(count) for kind, count in pairs}


def serve(rank: int, size: int, folder: str, tasks: list[Task], rounds: int) -> None:
    """Measure all tasks; the first process leaves a record of each in the folder."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size)
    try:
        for number, task in enumerate(tasks):
            record = measured(task, rounds)
            if rank == 0:
                # Written under another name first, so that nobody reads half of it.
                file = Path(folder) / f"{number}.json"
                draft = file.with_suffix(".draft")
                draft.write_text(json.dumps(record), encoding="utf-8")
                draft.rename(file)
            dist.barrier()  # so that nobody is gone before all is told
    finally:
        dist.destroy_process_group()


def measured(task: Task, rounds: int) -> Record:
    """Return what one process and all of them take for a step, and what they send."""
    # The step by this process, and by all of them.
    rank, size = dist.get_rank(), dist.get_world_size()
    case = build(task.problem, samples=task.samples)
    shares = [round(r * task.samples / size) for r in range(size + 1)]
    share = slice(shares[rank], shares[rank + 1])
    of_one = step_of(case, task, slice(0, task.samples))
    of_all = step_of(case, task, share, process_group=dist.group.WORLD)
    # A first time of each warms up, and tells what is sent and how far the steps differ.
    reference = of_one().step if rank == 0 else None
    traffic, step = watched(of_all)
    turns_of_one: list[Turn] = []
    turns_of_all: list[Turn] = []
    for _ in range(rounds):
        dist.barrier()
        if rank == 0:
            turns_of_one.append(timed(of_one))
        dist.barrier()
        turns_of_all.append(timed(of_all))
    # What every rank has seen, on all of them.
    told: list[Any] = [None] * size
    dist.all_gather_object(told, (traffic, [(t.seconds, t.cpu) for t in turns_of_all]))
    if rank > 0:
        return {}
    return record_of(task, case, turns_of_one, told) | {"difference": distance(step, reference)}


def record_of(task: Task, case: Case, turns: list[Turn], told: list[Any]) -> Record:
    """Return the record of a task, from the turns of one process and of all ranks."""
    size, rounds = len(told), range(len(turns))
    sent: dict[str, int] = {}
    for traffic, _ in told:
        for kind, count in traffic.items():
            sent[kind] = sent.get(kind, 0) + count
    # A round is over when its last rank is; its work is that of the busiest one.
    walls = [max(times[r][0] for _, times in told) for r in rounds]
    works = [max(times[r][1] for _, times in told) for r in rounds]
    record: Record = {"problem": task.problem, "samples": task.samples, "quantity": task.quantity}
    record |= {"prepared": task.prepared, "ranks": size, "runs": len(turns), "sent": sent}
    record |= {
        "seconds": statistics.median(turn.seconds for turn in turns),
        "cpu": statistics.median(turn.cpu for turn in turns),
        "seconds_of_ranks": statistics.median(walls),
        "cpu_of_busiest": statistics.median(works),
    }
    return record | in_the_model(task, case, size)


def in_the_model(task: Task, case: Case, size: int) -> Record:
    """Return what the model on paper says of a task, at the speeds of this process."""
    if case.module is None or task.quantity != "one δ":
        return {}
    net = net_of(case)
    speeds = speeds_of(min(task.samples * net.columns, net.parameters), net)
    one, all_ranks = (seconds_of(net, task.samples, p, speeds) for p in (1, size))
    return {
        "model_sent": bytes_of(net, task.samples, size),
        "model_seconds": sum(one.values()),
        "model_seconds_of_ranks": sum(all_ranks.values()),
    }


def speeds_of(side: int, net: Net) -> Speeds:
    """Return the flops of a CPU second: of large products, and of a factorization of some side."""
    A = torch.randn(1536, 1536, dtype=torch.float64 if net.entry == 8 else torch.float32)
    K = torch.eye(side, dtype=torch.float64) + 1e-3
    product = min(cpu_seconds(lambda: A @ A) for _ in range(4))
    factorization = min(cpu_seconds(lambda: torch.linalg.cholesky(K)) for _ in range(2))
    return Speeds(flops=2 * len(A) ** 3 / product, factorization=side**3 / 3 / factorization)


def cpu_seconds(run: Callable[[], object]) -> float:
    """Return the CPU time of a function."""
    start = time.process_time()
    run()
    return time.process_time() - start


def net_of(case: Case) -> Net:
    """Return the sizes of a problem's net, as the model on paper counts them."""
    problem, module = case.problem, case.module
    assert module is not None
    values, _, layers = visited(module, problem.X[:1])
    outputs = values[0].numel()
    net = Net(
        layers=layers,
        parameters=sum(p.numel() for p in problem.params.values()),
        outputs=outputs,
        columns=outputs - isinstance(problem.criterion, nn.CrossEntropyLoss),
    )
    # What takes few flops is evaluated in float64.
    N = len(problem.X)
    flops = N * visit_flops(net) + sum(contraction(x, N, net.columns) for x in net.layers)
    return net._replace(entry=8 if flops < CHEAP_FLOPS else 4)


def step_of(case: Case, task: Task, samples: slice, **options: Any) -> Callable[[], Turn]:
    """Return a function that makes a step of some samples."""
    model_fn, params, X, y, criterion = case.problem
    X, y = X[samples], y[samples]
    if task.prepared and task.quantity != "free":
        model_fn = prepare(model_fn, params, X)
    arguments = (model_fn, params, X, y, criterion, case.damping)

    def step() -> Turn:
        start, cpu = time.perf_counter(), time.process_time()
        made = newton_step(*arguments, **task.options, **options)
        return Turn(made, time.perf_counter() - start, time.process_time() - cpu)

    return step


def timed(step: Callable[[], Turn]) -> Turn:
    """Return a turn without its step, so that memory is free for the next."""
    return step()._replace(step=None)


def watched(step: Callable[[], Turn]) -> tuple[dict[str, int], Any]:
    """Return the bytes that this rank sends for a step, and the step."""
    logger, traffic = logging.getLogger("ddnewton.distributed.service"), Traffic()
    level = logger.level
    logger.addHandler(traffic)
    logger.setLevel(logging.INFO)
    made = step().step
    logger.removeHandler(traffic)
    logger.setLevel(level)
    return traffic.sent, made


def distance(step: Any, reference: Any) -> float:
    """Return how far a step is from another, relative to that."""
    a, b = (flat(tree) for tree in (step, reference))
    return float((a - b).norm() / b.norm())


def flat(tree: Any) -> Tensor:
    """Return all entries of a tree in float64."""
    return torch.cat([leaf.reshape(-1).double() for leaf in tree_leaves(tree)])
