"""The one record of a problem: of the benchmarks, of the training runs and of the tests."""

from __future__ import annotations

from typing import Any, NamedTuple


class Problem(NamedTuple):
    """A model, its parameters, a batch and a loss, in the order of `ddnewton.newton_step`."""

    model_fn: Any
    params: Any
    X: Any
    y: Any
    criterion: Any
