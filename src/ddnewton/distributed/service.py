"""One rank leads and all serve: the leader makes the step, every rank what is asked of its samples.

The leader runs a call from top to bottom, as a process by itself does. Where that needs the samples
it gives an order, the name of a method, which every rank follows with its own ones. So nothing is
decided but on the leader, from figures of all ranks; what comes out is told to all, the same to the
bit; and what goes wrong anywhere ends the call everywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

from ddnewton.distributed.failures import Failure, RankError, error_of, failure_of
from ddnewton.distributed.team import SumFailed, Team
from ddnewton.types import PyTree

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Order(NamedTuple):
    """What every rank is to do: the name of a method, and its arguments."""

    method: str
    arguments: PyTree


class Result(NamedTuple):
    """What a call returns, on every rank."""

    value: Any


class Leader(NamedTuple):
    """The leader's side of a call: its team, and what it serves itself."""

    team: Team
    servant: Any

    def order(self, method: str, *arguments: Any, **for_leader: Any) -> Any:
        """Have every rank call a method; return what it returns here."""
        self.team.told(Order(method, arguments))
        try:
            return getattr(self.servant, method)(*arguments, **for_leader)
        except SumFailed:
            self.team.told(Order("reported", ()))
            self.team.reported()
            raise


def served(team: Team, servant: Any, lead: Callable[[Leader], T]) -> T:
    """Return the result of the leader on every rank; the others follow its orders until then."""
    try:
        return _led(Leader(team, servant), lead) if team.leads else _followed(team, servant)
    finally:
        sent = ", ".join(f"{kind} {count}" for kind, count in sorted(team.wire.traffic.items()))
        logger.info("rank %d of %d sent bytes: %s", team.rank, team.size, sent or "none")


def _led(leader: Leader, lead: Callable[[Leader], T]) -> T:
    """Lead a call, and tell its result or its error."""
    try:
        result = lead(leader)
    except BaseException as error:
        stopped = RankError(f"the first rank has stopped: {type(error).__name__}")
        # Where a rank is gone there may be nobody to tell; this error is what counts.
        with suppress(RuntimeError):
            leader.team.told(failure_of(error if isinstance(error, Exception) else stopped))
        raise
    leader.team.told(Result(result), "results")
    return result


def _followed(team: Team, servant: Any) -> Any:
    """Follow the orders of a call until it ends."""
    while True:
        order = team.told()
        if isinstance(order, Result):
            return order.value
        if isinstance(order, Failure):
            raise error_of(order) from team.failure
        if order.method == "reported":
            team.reported()
        else:
            getattr(servant, order.method)(*order.arguments)
