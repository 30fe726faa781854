"""The ranks of a call, and what passes between them.

The first rank of the group leads. What it says to all is `told`; what all send to it is `summed` or
`collected`; and what every rank tells every other, with whatever is wrong on one, is `exchanged`.
A part that fails on a rank never keeps that rank from the transfer that others wait in: its failure
goes along in place of the part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ddnewton.distributed.failures import Failure, error_of, failure_of, on_rank
from ddnewton.distributed.wire import Wire, broadcast, exchange, receive, send, wire_of
from ddnewton.errors import BadValue, sentence
from ddnewton.types import PyTree

T = TypeVar("T")

LEADER = 0
"""The rank that leads, counted in its group."""


class SumFailed(Exception):
    """A sum to which a rank could not contribute, which says why when it is asked."""


class Team:
    """The ranks of a process group, as one of them sees them."""

    def __init__(self, group: dist.ProcessGroup, home: torch.device) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.wire: Wire = wire_of(group, home)
        self.failure: BaseException | None = None  # of this rank's last part
        self.error_of_all: BaseException | None = None  # which every rank raises by itself
        self.call = ""  # which is made by all
        self._refusal: Exception | None = None  # of a call that the leader does not make

    @property
    def leads(self) -> bool:
        """Whether this is the rank that leads."""
        return self.rank == LEADER

    def makes(self, call: str) -> None:
        """Begin a call, which has a name."""
        self.call, self._refusal = call, None

    def checks(self, call: str) -> None:
        """Refuse, in place of a part of this rank, to take part in another call than its own."""
        if call != self.call:
            rule = "all ranks must call the same function"
            got = f"{call.strip('_')} on rank {LEADER}, {self.call.strip('_')} here"
            self._refusal = BadValue(sentence(rule, got, "Call it on every rank, or on none."))

    def exchanged(self, make: Callable[[], T]) -> list[T]:
        """Return the parts of all ranks on every rank; where one raises, raise on all."""
        # A failure goes in place of a part.
        part = self._guarded(make)
        messages = exchange(self.wire, part if self.failure is None else failure_of(self.failure))
        # All ranks see the same messages, and raise the same; but an interrupt stays what it is.
        try:
            self.raise_failures(messages)
        except Exception as error:
            self.shared(self.interrupt or error)
            if self.interrupt is not None:
                raise self.interrupt from None
            raise
        return messages

    @property
    def interrupt(self) -> BaseException | None:
        """What has stopped this rank's last part and is no error, such as a KeyboardInterrupt."""
        return None if isinstance(self.failure, Exception) else self.failure

    def shared(self, error: BaseException) -> BaseException:
        """Return an error that all ranks raise at the same time, so that none is told of it."""
        self.error_of_all = error
        return error

    def told(self, tree: PyTree = None, kind: str = "orders") -> PyTree:
        """Return a tree of the leader's, on all ranks."""
        return broadcast(self.wire, tree, LEADER, kind)

    def summed(
        self, make: Callable[[], Sequence[Tensor]], shapes: Sequence[Sequence[int]], kind: str
    ) -> list[Tensor]:
        """Return sums over all ranks, in float64, on the leader; none on any other."""
        # One vector for all of them, with a place for the number of ranks that failed.
        counts = [torch.Size(shape).numel() for shape in shapes]
        vector = torch.zeros(sum(counts) + 1, dtype=torch.float64, device=self.wire.device)
        places = vector[:-1].split(counts)

        def write() -> None:
            for place, part in zip(places, make(), strict=False):
                place.copy_(part.reshape(-1))

        self._guarded(write)
        vector[-1] = float(self.failure is not None)
        dist.reduce(vector, group_dst=LEADER, group=self.wire.group)
        if not self.leads:
            self.wire.traffic[kind] += vector.nbytes
            return []
        if float(vector[-1]) > 0:
            raise SumFailed
        pairs = zip(places, shapes, strict=True)
        return [part.reshape(tuple(shape)).to(self.wire.home) for part, shape in pairs]

    def collected(self, make: Callable[[], PyTree], kind: str) -> list[PyTree]:
        """Return the parts of all ranks, trees of tensors, on the leader; none on any other."""
        part = self._guarded(make)
        message = part if self.failure is None else failure_of(self.failure)
        if not self.leads:
            send(self.wire, message, LEADER, kind)
            return []
        messages = [message, *(receive(self.wire, rank) for rank in range(1, self.size))]
        self.raise_failures(messages)
        return messages

    def streamed(self, make: Callable[[], list[T]], kind: str) -> Iterator[T]:
        """Yield what every rank makes one by one, on the leader; nothing on any other."""
        parts = self._guarded(make)
        message = len(parts) if parts is not None else failure_of(self.failure or AssertionError())
        if self.leads:
            return self._arriving(parts or [], message)
        for part in [message, *(parts or [])]:
            send(self.wire, part, LEADER, kind)
        return iter(())

    def _arriving(self, parts: list[T], message: int | Failure) -> Iterator[T]:
        """Yield the parts of this rank and of all others; they all arrive, whatever happens."""
        messages: list[Any] = [message]

        def of_others() -> Iterator[T]:
            for rank in range(1, self.size):
                messages.append(receive(self.wire, rank))
                if not isinstance(messages[-1], Failure):
                    yield from (receive(self.wire, rank) for _ in range(messages[-1]))

        arrivals = of_others()
        try:
            yield from parts
            for part in arrivals:  # noqa: UP028 - `yield from` would close them with this one
                yield part
        finally:
            for _ in arrivals:
                pass
        self.raise_failures(messages)

    def scattered(self, trees: Sequence[PyTree], kind: str) -> PyTree:
        """Return the tree that the leader has for this rank; only the leader passes them."""
        if not self.leads:
            return receive(self.wire, LEADER)
        for rank in range(1, self.size):
            send(self.wire, trees[rank], rank, kind)
        return trees[LEADER]

    def reported(self) -> None:
        """Raise, on the leader, what failed in the parts that the ranks made last."""
        failure = self.failure

        def reason() -> None:
            if failure is not None:
                raise failure

        self.collected(reason, "reports")

    def raise_failures(self, messages: Sequence[Any]) -> None:
        """Raise the first failure among the messages of all ranks."""
        failures = [x if isinstance(x, Failure) else None for x in messages]
        for rank, failure in enumerate(failures):
            if failure is not None:
                everywhere = all(x == failure for x in failures)
                raise error_of(failure if everywhere else on_rank(rank, failure)) from self.failure

    def _guarded(self, make: Callable[[], T]) -> T | None:
        """Return the part of this rank, None where it fails: see `failure`."""
        self.failure = self._refusal
        if self._refusal is not None:
            return None
        try:
            return make()
        except BaseException as error:  # noqa: BLE001 - it is raised when all have been told
            self.failure = error
            return None
