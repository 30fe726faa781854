"""One process of the benchmark: one peer on one problem, timed, its memory watched.

Started by `benchmarks.bench`, on Linux. Every quantity leaves a record ``NAME.json`` and the answer
``NAME.pt`` in the folder; what went wrong is left in ``error.txt``.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from benchmarks.floor import floor
from benchmarks.peers import PEERS, dense, prepared
from benchmarks.recipes import Case, build

RUNS = 25
DENSE_PRODUCTS = 3e11
"""Up to how many products the truth comes from dense Jacobians, not from the structured Gram."""


def status(field: str) -> int:
    """Return an entry of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def watch(device: str) -> Callable[[], int]:
    """Return a function that tells how much memory was taken at most from now on, in bytes."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return lambda: torch.cuda.max_memory_allocated() - before
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts afresh
    return lambda: max(status("VmHWM") - before, 0)


def timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Return an answer and its seconds."""
    start = time.perf_counter()
    answer = run()
    if answer.is_cuda:
        torch.cuda.synchronize()
    return answer, time.perf_counter() - start


def counted(run: Callable[[], Tensor], runs: int) -> tuple[Tensor, list[float]]:
    """Return an answer and the seconds of so many runs after the first."""
    answer, _ = timed(run)
    times = []
    for _ in range(runs):
        del answer
        answer, seconds = timed(run)
        times.append(seconds)
    return answer, times


def repeated(run: Callable[[], Tensor], patience: float, slow: float) -> tuple[Tensor, list[float]]:
    """Return an answer and the seconds of every run after the first; of that one if it is slow.

    Runs go on for as long as patience lasts, three times as long until there are three of them.
    """
    answer, first = timed(run)
    if first > slow:
        return answer, [first]
    times: list[float] = []
    while len(times) < RUNS and sum(times) < patience * (3 if len(times) < 3 else 1):
        del answer
        answer, seconds = timed(run)
        times.append(seconds)
    return answer, times


def truth(case: Case, quantity: str) -> Tensor:
    """Return the float64 answer that the others are compared with."""
    problem = case.problem
    outputs = problem.model_fn(problem.params, problem.X).numel()
    products = outputs**2 * sum(p.numel() for p in problem.params.values())
    make = dense if products < DENSE_PRODUCTS else prepared
    return make(case, quantity)()


def measured(options: argparse.Namespace, quantity: str) -> dict[str, object]:
    """Leave a peer's answer in the folder and return its record; the truth is run once."""
    file = options.folder / f"{quantity}.pt"
    if options.peer == "truth":
        case = build(options.problem, options.device, torch.float64, options.samples)
        torch.save(truth(case, quantity).cpu(), file)
        return {}
    make = PEERS[options.peer].make
    make(build("tiny-mlp", options.device), quantity)()  # imports and first derivatives
    run = make(build(options.problem, options.device, samples=options.samples), quantity)
    peak = watch(options.device)
    if options.runs is None:
        answer, times = repeated(run, options.patience, options.slow)
    else:
        answer, times = counted(run, options.runs)
    record = {"seconds": statistics.median(times), "runs": len(times), "peak": peak()}
    torch.save(answer.detach().double().cpu(), file)
    return record


def records(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield every quantity and its record."""
    if options.peer != "floor":
        for quantity in options.quantity:
            yield quantity, measured(options, quantity)
        return
    case = build(options.problem, options.device, samples=options.samples)
    for quantity, parts in floor(case, options.quantity).items():
        yield quantity, {"seconds": sum(parts.values()), "parts": parts}


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("problem")
    parser.add_argument("peer")
    parser.add_argument("quantity", nargs="+")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", type=int, help="bytes that the process may take")
    parser.add_argument("--patience", type=float, default=5.0, help="seconds to repeat for")
    parser.add_argument("--slow", type=float, default=15.0, help="seconds of an only run")
    parser.add_argument("--runs", type=int, help="so many runs, in place of patience")
    options = parser.parse_args()

    # What went wrong is left in a file.
    def explain(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
        text = f"{kind.__name__}: {str(error).strip() or 'no message'}"
        (options.folder / "error.txt").write_text(text, encoding="utf-8")

    sys.excepthook = explain
    # The limits of this process, then its measurements.
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.memory is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (options.memory, options.memory))
    for quantity, record in records(options):
        (options.folder / f"{quantity}.json").write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main()
