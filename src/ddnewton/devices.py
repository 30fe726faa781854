"""What devices compute fast, and that float32 has all its digits while the library computes.

torch's kernels may round float32 to 10 digits inside of products (TF32, on GPUs) or to 7 (bfloat16,
on CPUs): convolutions do by default, products of matrices by switches of the process. Steps that
are right to 1e-5 cannot bear it. There is no other way to tell a kernel, so that the switches are
put to full float32 for the time of a public call, and back at its end, errors or not. They are of
the process: what other threads compute meanwhile is in full float32 as well, and what they switch
meanwhile is undone. While torch compiles nothing is switched, as that would break its graphs: a
compiled step has what the switches say at the time it is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from threading import Lock
from typing import NamedTuple, ParamSpec, TypeVar

import torch

# By their own names: frames that name torch would be compiled by `torch.compile`, which cannot.
from torch import get_float32_matmul_precision, set_float32_matmul_precision
from torch._C import (
    _get_cudnn_allow_tf32,
    _get_fp32_precision_getter,
    _set_cudnn_allow_tf32,
    _set_fp32_precision_setter,
)

P = ParamSpec("P")
R = TypeVar("R")

FAST_FLOAT64 = frozenset({(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)})
"""The compute capabilities of GPUs that take at most twice as long in float64 as in float32: P100,
V100, A100, H100 and B200. All others, GeForce, RTX, T4, A10, L4, L40 and B300, take 32 or 64 times
as long."""

KERNELS = tuple((b, k) for b in ("cuda", "mkldnn") for k in ("matmul", "conv", "rnn"))
"""The kernels that may round, by torch's names of a library and an operation."""

DEFAULTS = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"))
"""The switches of all kernels, and of all of a library: of those that have none of their own."""

CONVOLUTIONS = KERNELS.index(("cuda", "conv"))


class Switches(NamedTuple):
    """How kernels round float32."""

    kernels: Sequence[str]
    defaults: Sequence[str]
    convolutions_in_tf32: bool  # the older names of two, which must not contradict the others
    matmul: str


class Calls:
    """The calls that are under way, of all threads, and the switches before the first of them."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.count = 0
        self.before: Switches | None = None


CALLS = Calls()
"""Those of this process, as the switches are."""


def is_float64_fast(capability: tuple[int, int]) -> bool:
    """Return whether GPUs of a compute capability are made for float64."""
    return capability in FAST_FLOAT64


def has_fast_float64(device: torch.device) -> bool:
    """Return whether a device takes about as long in float64 as in float32."""
    if device.type != "cuda":
        return True
    properties = torch.cuda.get_device_properties(device)
    return is_float64_fast((properties.major, properties.minor))


def in_full_float32(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function during which no kernel rounds float32 to fewer digits."""

    @wraps(function)
    def full(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        with full_float32():
            return function(*args, **kwargs)

    return full


@contextmanager
def full_float32() -> Iterator[None]:
    """Let no kernel round float32; the last of several calls to end puts the switches back."""
    # The first call to begin switches.
    with CALLS.lock:
        if not CALLS.count and any(rounding in ("tf32", "bf16") for rounding in _read(KERNELS)):
            CALLS.before = _switches()
            _switch(Switches(["ieee"] * len(KERNELS), ["none"] * len(DEFAULTS), False, "highest"))
        CALLS.count += 1
    try:
        yield
    finally:
        # The last one to end switches back.
        with CALLS.lock:
            CALLS.count -= 1
            if not CALLS.count and CALLS.before is not None:
                _switch(CALLS.before)
                CALLS.before = None


def _switches() -> Switches:
    """Return the switches as they are, those of the kernels left without their defaults."""
    # The older names raise where only newer ones have been used since torch was imported.
    try:
        convolutions = _get_cudnn_allow_tf32()
    except RuntimeError:
        convolutions = _read(KERNELS)[CONVOLUTIONS] != "tf32"
    try:
        matmul = get_float32_matmul_precision()
    except RuntimeError:
        matmul = "highest"
    # A switch that says nothing reads as its default: take that away, and then look.
    defaults = []
    for name in DEFAULTS:
        defaults += _read([name])
        _write([name], ["none"])
    return Switches(_read(KERNELS), defaults, convolutions, matmul)


def _switch(switches: Switches) -> None:
    """Set all switches."""
    # By the older names first, which write to the newer ones too.
    _set_cudnn_allow_tf32(switches.convolutions_in_tf32)
    set_float32_matmul_precision(switches.matmul)
    _write(KERNELS, switches.kernels)
    _write(DEFAULTS, switches.defaults)


def _read(names: Iterable[tuple[str, str]]) -> list[str]:
    """Return switches by their newer names."""
    return [_get_fp32_precision_getter(*name) for name in names]


def _write(names: Iterable[tuple[str, str]], values: Sequence[str]) -> None:
    """Set switches by their newer names."""
    for name, value in zip(names, values, strict=True):
        _set_fp32_precision_setter(*name, value)
