"""What a rank of a pool does: it waits for tasks, runs each in a new gloo group, and answers.

Tasks and answers are bytes of plain pickle. A connection that pickles by itself would share the
memory of tensors through file descriptors, which hangs where a process dies.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed

# So much longer than its task may take does a rank live that nobody stops.
ORPHANED_SECONDS = 10.0


class Outcome(NamedTuple):
    """What a task came to on one rank.

    ``error`` is the name of its type and the message: of an exception, or ``Dead`` for a process
    that ended, or ``Timeout`` for one that did not answer. ``traceback`` tells where.
    """

    value: Any = None
    error: tuple[str, str] | None = None
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    traceback: str = ""


class Group(NamedTuple):
    """How a rank meets those of its group: the file must not exist before they do."""

    file: Path
    rank: int
    size: int
    seconds: float


class Task(NamedTuple):
    """What a rank is asked for; it has ended in ``seconds``, or is stopped."""

    group: Group
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    seconds: float


def serve(connection: Connection, log: Path) -> None:
    """Answer tasks until the connection is closed; what is printed goes to the log."""
    torch.set_num_threads(1)
    # Appended to, so that the text of a task can be cut off when the next begins.
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # A crash writes its stack to the log, and so does a rank that is asked where it is.
    faulthandler.enable(descriptor)
    faulthandler.register(signal.SIGUSR1, descriptor)
    connection.send_bytes(b"ready")
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        os.truncate(log, 0)
        connection.send_bytes(_answer(message, descriptor))


def _answer(message: bytes, log: int) -> bytes:
    """Run the task of a message; an answer that cannot be pickled is an error, too."""
    outcome = _outcome(message, log)
    try:
        return pickle.dumps(outcome)
    except Exception as error:  # noqa: BLE001 - pickle raises what the objects in it do
        return pickle.dumps(outcome._replace(value=None, **_told(error)))


def _outcome(message: bytes, log: int) -> Outcome:
    """Run the task of a message in a group of its own, from the same random numbers."""
    value, told = None, {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        started = time.perf_counter()
        try:
            task = pickle.loads(message)
            # The process that waits for the answer may itself be gone.
            faulthandler.dump_traceback_later(task.seconds + ORPHANED_SECONDS, exit=True, file=log)
            _meet(task.group)
            torch.manual_seed(0)
            started = time.perf_counter()
            value = task.function(task.group.rank, *task.arguments)
        except BaseException as error:  # noqa: BLE001 - a test that exits leaves the rank running
            told = _told(error)
        seconds = time.perf_counter() - started
        faulthandler.cancel_dump_traceback_later()
    texts = tuple(f"{warning.category.__name__}: {warning.message}" for warning in caught)
    return Outcome(value, seconds=seconds, warnings=texts, **told)


def _meet(group: Group) -> None:
    """Leave the group of the last task, in which a collective may be pending; meet in a new one."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
    timeout = timedelta(seconds=group.seconds)
    store = distributed.FileStore(str(group.file), group.size)
    store.set_timeout(timeout)
    distributed.init_process_group(
        "gloo", store=store, rank=group.rank, world_size=group.size, timeout=timeout
    )
    # A rank whose task ends it at once must not leave while others are still on their way.
    if store.add("met", 1) == group.size:
        store.set("all met", "")
    store.wait(["all met"])


def _told(error: BaseException) -> dict[str, Any]:
    """Put an exception into words, which can be pickled whatever it holds."""
    text = "".join(traceback.format_exception(error))
    return {"error": (type(error).__name__, str(error)), "traceback": text}
