"""The batch of a step, given as such or by a closure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ddnewton.errors import BadType, sentence
from ddnewton.types import PyTree


def batch_of_step(X: PyTree, y: PyTree, closure: Callable[[], Any] | None) -> tuple[PyTree, PyTree]:
    """Return inputs and targets, calling the closure if there is one.

    Where ``X`` is given too, the closure is called and its result is not used.
    """
    # ``step(closure)``, as other optimizers are called: the function stands in the place of X.
    if callable(X) and y is None and closure is None:
        X, closure = None, X
    if closure is not None:
        returned = closure()
        if X is None:
            if not (isinstance(returned, (tuple, list)) and len(returned) == 2):
                rule = "step: closure must return the batch, (X, y)"
                remedy = "There is no backward: pass X and y, or a function that returns them."
                raise BadType(sentence(rule, type(returned).__name__, remedy))
            X, y = returned
    if X is None or y is None:
        rule, remedy = "step: a step needs a batch", "Pass step(X, y), or a closure returning both."
        raise BadType(sentence(rule, "none" if X is None else "X without y", remedy))
    return X, y
