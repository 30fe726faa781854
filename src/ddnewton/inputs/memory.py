"""What fits into the memory at hand, told before the work begins.

Without this the allocator would fail in the middle of a step with a number of bytes and no reason,
or, where a system promises more memory than it has, end the process.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from ddnewton.errors import TooLarge, sentence

try:
    import resource
except ImportError:  # not a Unix
    resource = None  # type: ignore[assignment]

NEVER_ASKED_BYTES = 2**27
"""Up to how many bytes nobody asks what is free: every machine has them."""

CHUNK_BYTES, CHUNK_SHARE = 2**28, 16
"""How large the temporaries of a chunk of samples are, or, beside a matrix that is larger by far,
which share of that: more of them at once are no faster."""

WHOLE_BYTES, WHOLE_SHARE = 2**30, 8
"""How large those of a whole batch may be, and which share of the memory, where chunks would be
visited more than once."""

UNKNOWN_BYTES = 2**33
"""The memory of a system that does not tell."""

GROUP_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)
"""Where Linux says what a container may use, and what it uses."""


def check_fits(size: int, what: str, remedy: str, device: torch.device) -> None:
    """Require something of a step to fit into what is free of the memory."""
    # What is compiled knows nothing of the system.
    if torch.compiler.is_compiling() or size <= NEVER_ASKED_BYTES:
        return
    free = free_bytes(device)
    if size > free:
        got = f"{what}: {size / 1e9:.3g} GB, where {free / 1e9:.3g} GB are free"
        raise TooLarge(sentence("a step must fit into the memory at hand", got, remedy))


def samples_at_once(
    n: int, sample_bytes: int, side: int, device: torch.device, *, revisited: bool = False
) -> int:
    """Return so many of n samples that they fill a chunk, beside a matrix of a side in float64.

    A chunk is at most a quarter of the memory; on a GPU it is that, as a few large kernels take
    less time than many small ones. Where chunks are ``revisited``, a batch of moderate size is one.
    """
    if n * sample_bytes <= NEVER_ASKED_BYTES:
        return n
    memory = memory_bytes(device)
    if revisited and n * sample_bytes <= min(WHOLE_BYTES, memory // WHOLE_SHARE):
        return n
    size = max(CHUNK_BYTES, side**2 * torch.float64.itemsize // CHUNK_SHARE)
    size = memory // 4 if device.type == "cuda" else min(size, memory // 4)
    return max(1, min(n, size // sample_bytes))


def memory_bytes(device: torch.device) -> int:
    """Return the memory of a device in bytes: what is free on a GPU, all of it elsewhere.

    Free is also what torch keeps of memory that tensors have had, and gives to the next ones.
    """
    if torch.compiler.is_compiling():  # which knows nothing of the system
        return UNKNOWN_BYTES
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + kept
    limits = [limit for limit, _ in _limits()]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=UNKNOWN_BYTES)


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device in bytes."""
    if device.type == "cuda":
        return memory_bytes(device)
    free = [limit - used for limit, used in _limits()]
    available = re.findall(r"MemAvailable: *(\d+)", _text("/proc/meminfo"))
    free += [1024 * int(kilobytes) for kilobytes in available]
    return max(0, min(free, default=memory_bytes(device)))


def _limits() -> list[tuple[int, int]]:
    """Return the limits of this process and of its container, and what is used of each."""
    # The container's.
    limits = []
    for limit_file, used_file in GROUP_LIMITS:
        limit, used = _text(limit_file).strip(), _text(used_file).strip()
        if limit.isdigit() and used.isdigit():
            limits.append((int(limit), int(used)))
    # The address space of the process, on a Unix.
    if resource is None:
        return limits
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _text("/proc/self/statm").split()[:1]
    if address_space != resource.RLIM_INFINITY and pages:
        limits.append((address_space, int(pages[0]) * resource.getpagesize()))
    return limits


def _text(path: str) -> str:
    """Return the text of a file of the system, nothing where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
