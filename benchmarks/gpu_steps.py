"""Steps on a GPU: of one peer, or of the floor, on every problem and in its precisions."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch

from benchmarks.bench import difference
from benchmarks.compiled_step import compiled
from benchmarks.floor import floor, rate
from benchmarks.gpu_plan import WITHOUT_TF32, Entry, planned, recorded
from benchmarks.gpu_process import Job, Measurement
from benchmarks.measure import counted, repeated, watch
from benchmarks.peers import PEERS
from benchmarks.recipes import build

REFERENCE = "jacrev"
PATIENCE, SLOW = 0.3, 2.0
"""Seconds to repeat for, and seconds of a run that is not repeated."""
QUICK_SIZE = 256
"""The side of a large matrix, where that is to be quick."""

MAKERS = {name: peer.make for name, peer in PEERS.items()} | {
    "ddnewton-compiled": compiled(),
    "ddnewton-graphs": compiled("reduce-overhead"),
}


def set_precision(precision: str, as_shipped: tuple[bool, bool]) -> torch.dtype:
    """Allow TF32 where torch does by itself, or nowhere; return the dtype."""
    allowed = (False, False) if precision == WITHOUT_TF32 else as_shipped
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed
    return torch.float64 if precision == "float64" else torch.float32


@cache
def rates(device: str, size: int | None) -> dict[str, float]:
    """Return the flops a second of a large matrix product, in all precisions."""
    flops = {}
    for name, dtype in (
        ("float64", torch.float64),
        ("float32", torch.float32),
        ("TF32", torch.float32),
    ):
        set_precision(WITHOUT_TF32, (False, False))
        torch.backends.cuda.matmul.allow_tf32 = name == "TF32"
        flops[name] = rate(torch.zeros((), dtype=dtype, device=device), size)
    torch.backends.cuda.matmul.allow_tf32 = False
    return flops


def measured(job: Job, entry: Entry, as_shipped: tuple[bool, bool]) -> dict[str, Any]:
    """Return seconds, memory, and the distance from the reference in float64."""
    speeds = rates(job.device, QUICK_SIZE if job.quick else None) if job.peer == "floor" else {}
    dtype = set_precision(entry.precision, as_shipped)
    if job.peer == "floor":
        case = build(entry.problem, job.device, dtype, entry.samples)
        parts = floor(case, (entry.quantity,), speeds[entry.precision])[entry.quantity]
        return {"seconds": sum(parts.values()), "parts": parts, "rates": speeds}
    make = MAKERS[str(job.peer)]
    # Imports and first derivatives, then the problem itself.
    if "compiled" not in str(job.peer) and "graphs" not in str(job.peer):
        make(build("tiny-mlp", job.device, dtype), entry.quantity)()
    run = make(build(entry.problem, job.device, dtype, entry.samples), entry.quantity)
    peak = watch(job.device)
    if job.quick:
        answer, times = counted(run, 2)
    else:
        answer, times = repeated(run, PATIENCE, SLOW)
    record = {
        "seconds": statistics.median(times),
        "runs": len(times),
        "peak": peak(),
        "difference": None,
    }
    # The reference leaves its answers for the peers that come after it.
    answer = answer.detach().double().cpu()
    reference = job.folder / f"{entry.stem}.pt"
    if job.peer == REFERENCE and entry.precision == "float64":
        torch.save(answer, reference)
    elif reference.exists():
        record["difference"] = difference(answer, torch.load(reference))
    return record


def measurements(job: Job) -> Iterator[Measurement]:
    """Yield the measurements of a peer."""
    as_shipped = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    peer = str(job.peer)
    for entry in planned(peer, job.device, quick=job.quick):
        yield recorded(entry, peer, {}), partial(measured, job, entry, as_shipped)
