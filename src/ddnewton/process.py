"""What all threads of a process share: one of them at a time may change it."""

from __future__ import annotations

from threading import RLock

ONE_THREAD = RLock()
"""Held by a thread while it changes a switch of the process or the state of a user's module.

Switches are those of torch's kernels, and `torch.nn.Module.__call__`, which tracing replaces. A
module changes while it is called, when its parameters are other tensors than its own.
"""
