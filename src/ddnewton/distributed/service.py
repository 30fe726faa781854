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

from ddnewton.distributed.failures import Failure, RankError, error_of, failure_of, on_rank
from ddnewton.distributed.team import SumFailed, Team
from ddnewton.types import PyTree

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Order(NamedTuple):
    """What every rank is to do in a call: the name of a method, and its arguments."""

    call: str
    method: str
    arguments: PyTree


class Ended(NamedTuple):
    """What a call comes to on every rank: what it returns, or its failure.

    ``draws`` is what the leader has drawn random numbers up to, so that all ranks go on from there.
    """

    result: Any
    failure: Failure | None
    draws: PyTree


class Leader(NamedTuple):
    """The leader's side of a call: its team, and what it serves itself."""

    team: Team
    servant: Any

    def order(self, method: str, *arguments: Any, **for_leader: Any) -> Any:
        """Have every rank call a method; return what it returns here."""
        self.team.told(Order(self.team.call, method, arguments))
        try:
            return getattr(self.servant, method)(*arguments, **for_leader)
        except SumFailed:
            self.team.told(Order(self.team.call, "reported", ()))
            self.team.reported()
            raise


def served(team: Team, servant: Any, lead: Callable[[Leader], T]) -> T:
    """Return the result of the leader on every rank; the others follow its orders until then."""
    try:
        return _led(Leader(team, servant), lead) if team.leads else _followed(team, servant)
    except Exception:
        # An interrupt of this rank alone is an error on the others, and stays what it is here.
        if team.interrupt is not None:
            raise team.interrupt from None
        raise
    finally:
        sent = ", ".join(f"{kind} {count}" for kind, count in sorted(team.wire.traffic.items()))
        logger.info("rank %d of %d sent bytes: %s", team.rank, team.size, sent or "none")


def _led(leader: Leader, lead: Callable[[Leader], T]) -> T:
    """Lead a call, and tell its result or its error, which is of the same kind on every rank."""
    team, servant = leader
    try:
        result = lead(leader)
        team.told(Ended(result, None, servant.draws()), "results")
    except BaseException as error:
        failure = failure_of(error)
        foreign = failure.kind == RankError.__name__ and not isinstance(error, RankError)
        failure = on_rank(team.rank, failure) if foreign else failure
        # Where a rank is gone there may be nobody to tell; this error is what counts.
        with suppress(RuntimeError):
            team.told(Ended(None, failure, servant.draws()))
        if foreign and isinstance(error, Exception):
            raise error_of(failure) from error
        raise
    return result


def _followed(team: Team, servant: Any) -> Any:
    """Follow the orders of a call until it ends."""
    while True:
        order = team.told()
        # Its end, on all ranks at once.
        if isinstance(order, Ended):
            servant.drawn(order.draws)
            if order.failure is not None:
                raise error_of(order.failure) from team.failure
            return order.result
        # Something to be done.
        team.checks(order.call)
        if order.method == "reported":
            team.reported()
        else:
            getattr(servant, order.method)(*order.arguments)
