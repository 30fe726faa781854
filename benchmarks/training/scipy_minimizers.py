"""SciPy's BFGS and L-BFGS-B, their loss and gradient by torch, an iteration at a time.

SciPy's functions return at the end. Here each runs in a thread that waits in its callback, so that
the benchmark can measure in between; the seconds of updates are those of the process. Where a run
ends for want of precision it is begun anew from there, and it is finished where that gains nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.training.instances import Instance, Params
from benchmarks.training.updates import Finished, Start, Update, flat, objective, unflat

Function = Callable[[np.ndarray], tuple[float, np.ndarray]]
MOST_ITERATIONS = 10**7


Minimize = Callable[[Callable[[np.ndarray], None]], None]


class ClosedError(Exception):
    """Nobody waits for a further iterate."""


class Exchange(NamedTuple):
    """Between a thread that minimizes and the one that measures: whether to go on, and iterates.

    An iterate is followed by others, by what was raised, or by None at the end.
    """

    due: SimpleQueue[bool]
    made: SimpleQueue[np.ndarray | Exception | None]


def work(minimize: Minimize, exchange: Exchange) -> None:
    """Minimize in a thread: hand on every iterate, and wait until the next is due."""

    def callback(x: np.ndarray) -> None:
        exchange.made.put(np.array(x, copy=True))
        if not exchange.due.get():
            raise ClosedError  # SciPy would take a StopIteration for its own

    if exchange.due.get():
        try:
            minimize(callback)
        except ClosedError:
            return
        except Exception as error:  # noqa: BLE001  # handed on to whoever waits
            exchange.made.put(error)
        exchange.made.put(None)


def iterations(minimize: Minimize) -> Iterator[np.ndarray]:
    """Yield every iterate that ``minimize`` hands to its callback; it waits for the next to be due.

    What it raises is raised here. A generator that is closed ends it.
    """
    exchange = Exchange(SimpleQueue(), SimpleQueue())
    thread = Thread(target=work, args=(minimize, exchange), daemon=True)
    thread.start()
    try:
        while True:
            exchange.due.put(True)
            iterate = exchange.made.get()
            if iterate is None:
                return
            if isinstance(iterate, Exception):
                raise iterate
            yield iterate
    finally:
        exchange.due.put(False)
        thread.join()


def repeated(function: Function, x: np.ndarray, method: str, options: dict[str, Any]) -> Minimize:
    """Return a minimization for `iterations`, begun anew for as long as that lowers the loss."""
    from scipy.optimize import minimize  # noqa: PLC0415  # no other method needs it

    def run(callback: Callable[[np.ndarray], None]) -> None:
        begin, value = x, np.inf
        while True:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of precision: the run is begun anew
                answer = minimize(
                    function, begin, jac=True, method=method, callback=callback, options=options
                )
            if not answer.fun < value:
                return
            begin, value = answer.x, answer.fun

    return run


def start_scipy(
    instance: Instance, *, method: str, transform: str = "none", **options: Any
) -> Update:
    """Start one of SciPy's minimizers without limits of its own; an update is an iteration."""
    problem = instance.problem
    begin = flat(problem.params).detach()
    evaluate = objective(problem, problem.X, problem.y, transform)

    def function(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = evaluate(torch.from_numpy(x))
        return value, gradient.numpy()

    # No tolerance ends a run, no number of iterations either.
    limits = {"BFGS": {"gtol": 0.0}, "L-BFGS-B": {"gtol": 0.0, "ftol": 0.0}}[method]
    if method == "L-BFGS-B":
        limits |= {"maxfun": MOST_ITERATIONS, "maxls": 50}
    limits |= {"maxiter": MOST_ITERATIONS} | options
    iterates = iterations(repeated(function, begin.numpy().copy(), method, limits))

    def update(X: Tensor, y: Tensor, progress: float) -> tuple[Params, int]:
        try:
            x = next(iterates)
        except StopIteration:
            raise Finished from None
        return unflat(torch.from_numpy(x), problem.params), 1

    return update


SCIPY: dict[str, Start] = {
    "SciPy BFGS": partial(start_scipy, method="BFGS"),
    "SciPy L-BFGS-B": partial(start_scipy, method="L-BFGS-B"),
}
