"""One process of the GPU benchmark: a section, or one peer of the steps.

Started by `benchmarks.gpu`, ahead of its time: it imports, wakes the device, and waits for a line
on its standard input that says until when it may measure. Every measurement that ends is a line of
JSON in the file, so that nothing is lost where the process is; what goes wrong is a line too.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu_plan import PEERS, SECTIONS, TIME_WAS_UP, Task
from benchmarks.processes import in_words

Measurement = tuple[dict[str, Any], Callable[[], dict[str, Any]]]
"""What is measured, in words, and the function that measures it."""


class Job(NamedTuple):
    """What a process is told; ``deadline`` is on the clock of `time.monotonic`."""

    folder: Path
    device: str
    quick: bool
    peer: str | None
    deadline: float

    def left(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - time.monotonic()


def outcome(job: Job, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a measurement, or in words what went wrong, and where in the library."""
    if job.left() < 0:
        return {"status": TIME_WAS_UP}
    try:
        return {"status": "ok"} | measure()
    except Exception as error:  # noqa: BLE001 - however a peer fails, that is its entry
        words = in_words(f"{type(error).__name__}: {str(error).strip() or 'no message'}")
        frames = traceback.extract_tb(error.__traceback__)
        places = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "ddnewton" in f.filename]
        return {"status": words, "where": places[-1] if places else None}


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Return the seconds of one run, until the device is done."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def told() -> Job:
    """Return what the command line says, and what standard input says when it is time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peer", choices=PEERS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    # The device wakes up while another process measures.
    importlib.import_module(module_of(options.section))
    torch.ones(64, 64, device=options.device).mm(torch.ones(64, 64, device=options.device)).sum()
    synchronize(options.device)
    deadline = float(sys.stdin.readline())
    return Job(options.folder, options.device, options.quick, options.peer, deadline)


def module_of(section: str) -> str:
    """Return the name of the module that measures a section."""
    return f"benchmarks.gpu_{section}"


def main() -> None:
    """Measure everything of a section that there is time for."""
    warnings.simplefilter("ignore")
    job = told()
    section = sys.argv[1]
    measurements: Iterator[Measurement] = importlib.import_module(module_of(section)).measurements(
        job
    )
    file = job.folder / f"{Task(section, job.peer).name}.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for about, measure in measurements:
            print(json.dumps(about | outcome(job, measure)), file=lines, flush=True)
            # What an error held is given back, so that the next measurement has all memory.
            gc.collect()
            if job.device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
