"""Where a function waits for the device, or on a CPU, where it reads a value on the host."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import ddnewton

LIBRARY = Path(ddnewton.__file__).parent

READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")
"""Operations whose results Python has to have."""


def place(frame: FrameType | None) -> str:
    """Return file and function of the first frame inside the library, or of the first outside."""
    outside = None
    while frame is not None:
        path, function = Path(frame.f_code.co_filename), frame.f_code.co_name
        if path.is_relative_to(LIBRARY):
            return f"{path.relative_to(LIBRARY)}:{function}"
        if outside is None and path.name not in {"warnings.py", Path(__file__).name}:
            outside = f"outside, {path.name}:{function}"
        frame = frame.f_back
    return outside or "outside"


class Reads(TorchDispatchMode):
    """Counts the operations that read a value on the host, by where they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count a call, and make it."""
        if func.overloadpacket.__name__ in READS:
            self.places[place(sys._getframe(1))] += 1
        return func(*args, **(kwargs or {}))


def reads_of(run: Callable[[], object]) -> dict[str, int]:
    """Return how often values are read on the host, and where."""
    with Reads() as reads:
        run()
    return dict(reads.places)


def waits_of(run: Callable[[], object]) -> dict[str, int]:
    """Return how often the host waits for a CUDA device, and where, as torch warns of it."""
    places: Counter[str] = Counter()

    def count(message: Warning | str, *_: object, **__: object) -> None:
        if "synchroniz" in str(message):
            places[place(sys._getframe(1))] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return dict(places)


COUNTED = {
    "copies to the host": ("Memcpy DtoH",),
    "copies to the device": ("Memcpy HtoD",),
    "waits for a stream": ("cudaStreamSynchronize",),
    "waits for the device": ("cudaDeviceSynchronize",),
    "launches": ("cudaLaunchKernel", "cuLaunchKernel"),
    "graphs": ("cudaGraphLaunch",),
    "calls of torch": ("aten::",),
}
"""What the profiler tells, by the beginnings of the names that it gives."""


def profiled(run: Callable[[], object], device: str) -> dict[str, float]:
    """Return counts of what the profiler sees, kernels and their seconds on the device."""
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device == "cuda" else []
    with profile(activities=activities) as profiler:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    # The profiler's own wait at the end is one of the device.
    averages = profiler.key_averages()
    counts: dict[str, float] = {
        words: sum(row.count for row in averages if row.key.startswith(names))
        for words, names in COUNTED.items()
    }
    kernels = [
        event
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))
        and not event.is_user_annotation  # as regions of what is compiled are
    ]
    return counts | {
        "kernels": len(kernels),
        "device seconds": sum(event.device_time for event in kernels) / 1e6,
    }
