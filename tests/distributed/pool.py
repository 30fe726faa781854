"""Few, long-lived processes that are the ranks of a gloo group, for tests of several processes.

    pool.run(function, *args, each=[(…), …])      # an Outcome for each rank, errors too
    pool.results(function, *args)                 # the values; AssertionError if a rank failed

calls ``function(rank, *args, *each[rank])`` on all ranks, whose default group is new for each task:
a collective that a failed task left pending concerns no other. The function is one of a module,
since it is pickled by its name; its asserts have no values in their messages, so let it return what
is to be compared. The ranks are forked from a server that has imported what they need, so that they
start in milliseconds once it runs, and share no thread or import hook with pytest.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple, Self
from unittest import mock

from tests.distributed.outcomes import Group, Outcome, Task, serve

# The two inside torch are what the first derivative imports, for seconds, in every process.
PRELOADED = [
    "torch",
    "torch._dynamo",
    "torch._decomp.decompositions_for_jvp",
    "ddnewton",
    "pytest",
    "tests.distributed.outcomes",
]
START_SECONDS = 120.0
END_SECONDS = 2.0
LOST = ("Dead", "Timeout")


class Rank(NamedTuple):
    """A process and what is shared with it."""

    process: ForkServerProcess
    connection: Connection
    log: Path


class Pool:
    """Ranks that start with the first task, and anew after a task that one did not survive.

    A collective that waits longer than ``group_seconds`` raises on the ranks that wait: give few
    where a rank is to fail before one, since not all of the others are told at once.
    """

    def __init__(self, size: int, group_seconds: float = 20.0) -> None:
        self.size = size
        self.group_seconds = group_seconds
        self._ranks: list[Rank] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._tasks = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def processes(self) -> list[int]:
        """The numbers of the processes, none before the first task."""
        return [rank.process.pid for rank in self._ranks]

    def results(self, function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        """Run a task that has to succeed; the values by rank."""
        __tracebackhide__ = True
        outcomes = self.run(function, *args, **options)
        failures = [
            f"rank {rank} of {self.size}: {': '.join(outcome.error)}\n{outcome.traceback}"
            for rank, outcome in enumerate(outcomes)
            if outcome.error
        ]
        if failures:
            raise AssertionError("\n".join(failures))
        return [outcome.value for outcome in outcomes]

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        each: Sequence[tuple[Any, ...]] | None = None,
        timeout: float = 60.0,
    ) -> list[Outcome]:
        """Run ``function(rank, *args, *each[rank])`` on all ranks; the outcomes by rank."""
        each = [()] * self.size if each is None else each
        if len(each) != self.size:
            raise ValueError(f"each has {len(each)} entries for {self.size} ranks")
        # Between tasks nothing is to be read, but the end of the connection of a dead process.
        if any(rank.connection.poll() or not rank.process.is_alive() for rank in self._ranks):
            self.close(0.0)
        if not self._ranks:
            self._start()
        # All tasks are pickled before the first is sent, so that no rank waits for one that failed.
        self._tasks += 1
        file = Path(self._folder.name) / f"group{self._tasks}"
        groups = [Group(file, rank, self.size, self.group_seconds) for rank in range(self.size)]
        messages = [
            pickle.dumps(Task(group, function, (*args, *own), timeout))
            for group, own in zip(groups, each, strict=True)
        ]
        # Ranks that are lost end now, and so do all if this is interrupted: answers would be late.
        lost = True
        try:
            for rank, message in zip(self._ranks, messages, strict=True):
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    rank.connection.send_bytes(message)
            outcomes = self._outcomes(timeout)
            lost = any(outcome.error and outcome.error[0] in LOST for outcome in outcomes)
        finally:
            if lost:
                self.close(0.0)
        return outcomes

    def close(self, patience: float = END_SECONDS) -> None:
        """End the processes: by asking, then terminated, then killed."""
        for rank in self._ranks:
            rank.connection.close()
        _join(self._ranks, patience)
        for stop in (ForkServerProcess.terminate, ForkServerProcess.kill):
            alive = [rank for rank in self._ranks if rank.process.is_alive()]
            for rank in alive:
                stop(rank.process)
            _join(alive, END_SECONDS)
        for rank in self._ranks:
            rank.process.close()
        self._ranks = []
        if self._folder:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        """Start the processes, and wait until all are ready."""
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        # The server, which starts with the first process, hands its environment down.
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
            for rank in range(self.size):
                connection, distant = context.Pipe()
                log = Path(self._folder.name) / f"log{rank}"
                process = context.Process(target=serve, args=(distant, log), daemon=True)
                process.start()
                # It has the distant end, so that the connection ends where the process does.
                distant.close()
                self._ranks.append(Rank(process, connection, log))
        for number, rank in enumerate(self._ranks):
            if not rank.connection.poll(START_SECONDS):
                self.close(0.0)
                raise TimeoutError(f"rank {number} did not start in {START_SECONDS:g} seconds")
            rank.connection.recv_bytes()

    def _outcomes(self, timeout: float) -> list[Outcome]:
        """Wait for the answers; ranks that end or do not answer have an outcome, too."""
        started = time.monotonic()
        outcomes: dict[int, Outcome] = {}
        while len(outcomes) < self.size:
            # A process that has ended shows on its connection, unless a child of it lives on.
            waiting = [number for number in range(self.size) if number not in outcomes]
            ends = {
                end: number
                for number in waiting
                for end in (self._ranks[number].connection, self._ranks[number].process.sentinel)
            }
            ready = wait(list(ends), max(0.0, started + timeout - time.monotonic()))
            numbers = {ends[end] for end in ready}
            seconds = time.monotonic() - started
            if numbers:
                outcomes |= {number: _received(self._ranks[number], seconds) for number in numbers}
            else:
                outcomes |= {number: _timeout(self._ranks[number], seconds) for number in waiting}
        return [outcomes[number] for number in range(self.size)]


def _join(ranks: Sequence[Rank], seconds: float) -> None:
    """Wait until processes have ended, for so long in all."""
    end = time.monotonic() + seconds
    for rank in ranks:
        rank.process.join(max(0.0, end - time.monotonic()))


def _received(rank: Rank, seconds: float) -> Outcome:
    """Read the answer of a rank that has sent one or ended."""
    try:
        if rank.connection.poll():
            return pickle.loads(rank.connection.recv_bytes())
    except (EOFError, ConnectionResetError):
        pass
    rank.process.join(END_SECONDS)
    message = f"the process ended with exit code {rank.process.exitcode}"
    return Outcome(error=("Dead", message), seconds=seconds, traceback=_logged(rank))


def _timeout(rank: Rank, seconds: float) -> Outcome:
    """Ask a rank that has not answered where it is."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(rank.process.pid, signal.SIGUSR1)
    time.sleep(0.2)
    message = f"no answer in {seconds:.1f} seconds"
    return Outcome(error=("Timeout", message), seconds=seconds, traceback=_logged(rank))


def _logged(rank: Rank) -> str:
    """What a rank has printed in its last task: the end of it."""
    return rank.log.read_text(encoding="utf-8", errors="replace")[-8000:]
