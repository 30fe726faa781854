"""One process of the GPU benchmark: one peer, on every problem and in every precision.

Started by `benchmarks.gpu`. Every measurement that ends is a line of JSON in the file, so that
nothing is lost where the process is; what goes wrong is a line too.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench import difference
from benchmarks.gpu_plan import TIME_WAS_UP, WITHOUT_TF32, Entry, planned, recorded
from benchmarks.measure import counted, repeated, watch
from benchmarks.peers import PEERS
from benchmarks.processes import in_words
from benchmarks.recipes import build

REFERENCE = "jacrev"
PATIENCE, SLOW = 0.5, 4.0
"""Seconds to repeat for, and seconds of a run that is not repeated."""


def set_precision(precision: str, as_shipped: tuple[bool, bool]) -> torch.dtype:
    """Allow TF32 where torch does by itself, or nowhere; return the dtype."""
    allowed = (False, False) if precision == WITHOUT_TF32 else as_shipped
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed
    return torch.float64 if precision == "float64" else torch.float32


def measured(
    options: argparse.Namespace, entry: Entry, as_shipped: tuple[bool, bool]
) -> dict[str, Any]:
    """Return seconds, memory, and the distance from the reference in float64."""
    dtype = set_precision(entry.precision, as_shipped)
    make = PEERS[options.peer].make
    # Imports and first derivatives, then the problem itself.
    make(build("tiny-mlp", options.device, dtype), entry.quantity)()
    run = make(build(entry.problem, options.device, dtype, entry.samples), entry.quantity)
    peak = watch(options.device)
    if options.quick:
        answer, times = counted(run, 2)
    else:
        answer, times = repeated(run, PATIENCE, SLOW)
    record = {
        "status": "ok",
        "seconds": statistics.median(times),
        "runs": len(times),
        "peak": peak(),
        "difference": None,
    }
    # The reference leaves its answers for the peers that come after it.
    answer = answer.detach().double().cpu()
    reference = options.folder / f"{entry.stem}.pt"
    if options.peer == REFERENCE and entry.precision == "float64":
        torch.save(answer, reference)
    elif reference.exists():
        record["difference"] = difference(answer, torch.load(reference))
    return record


def outcome(
    options: argparse.Namespace, entry: Entry, as_shipped: tuple[bool, bool]
) -> dict[str, Any]:
    """Return a measurement, or in words what went wrong."""
    if time.monotonic() > options.deadline:
        return {"status": TIME_WAS_UP}
    try:
        return measured(options, entry, as_shipped)
    except Exception as error:  # noqa: BLE001 - however a peer fails, that is its entry
        return {"status": in_words(f"{type(error).__name__}: {str(error).strip() or 'no message'}")}


def main() -> None:
    """Measure one peer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--deadline", type=float, help="on the clock of time.monotonic")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    as_shipped = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with (options.folder / f"{options.peer}.jsonl").open("w", encoding="utf-8") as file:
        for entry in planned(options.peer, options.device, quick=options.quick):
            record = recorded(entry, options.peer, outcome(options, entry, as_shipped))
            print(json.dumps(record), file=file, flush=True)
            # What an error held is given back, so that the next measurement has all memory.
            gc.collect()
            if options.device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
