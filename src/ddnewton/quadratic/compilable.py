"""What `torch.compile` makes no graph of, by name: such calls run as they are, behind a break.

A graph has no random generator, no model whose layers are still to be found, and no loop over
batches that somebody else reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from ddnewton.criteria.monte_carlo import generators_of
from ddnewton.errors import sentence
from ddnewton.inputs.batches import Batches
from ddnewton.linearize.structured.traced_model import Prepared
from ddnewton.resampling import Bootstrap

P = ParamSpec("P")
R = TypeVar("R")

RULE = "torch.compile makes a graph of prepared models without random numbers"


def compilable(function: Callable[P, R]) -> Callable[P, R]:
    """Leave a call of a public function alone where `torch.compile` meets an `obstacle` in it."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            found = obstacle(*args, **kwargs)
            if found:
                return left_alone(function, found)(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def left_alone(function: Callable[P, R], reason: str) -> Callable[P, R]:
    """End the graph of `torch.compile`, for a reason, and return a function that it leaves alone.

    With ``fullgraph=True`` that is an error with the reason as its message.
    """
    torch._dynamo.graph_break(msg=reason)
    uncompiled: Callable[P, R] = torch.compiler.disable(function)
    return uncompiled


def obstacle(
    model_fn: Any,
    params: Any = None,
    X: Any = None,
    y: Any = None,
    criterion: Any = None,
    damping: Any = None,
    **options: Any,
) -> str:
    """Return why there is no graph of a call, with the remedy; the empty string if there is one.

    Products alone, and process groups, are refused as everywhere inside of transforms.
    """
    gram = options.get("gram", "auto")
    ways = set(gram.values()) if isinstance(gram, Mapping) else {gram}
    if "free" in ways or options.get("process_group") is not None:
        return ""
    if not all(isinstance(function, Prepared) for function in _parts(model_fn)):
        return sentence(RULE, "another model_fn", "Pass prepare(model_fn, params, X).")
    if "dense" in ways:
        return sentence(RULE, 'gram="dense"', 'Leave gram at "auto".')
    if any(isinstance(batch, Batches) for batch in _parts(X)):
        return sentence(RULE, "Batches as X", "Compile the model that they are passed to.")
    if generators_of(criterion):
        remedy = "Leave the step uncompiled, or pass empirical_fisher or the loss itself."
        return sentence(RULE, "monte_carlo as criterion", remedy)
    rules = [damping, *(group.damping for group in options.get("groups") or ())]
    if any(isinstance(rule, Bootstrap) for rule in rules):
        return sentence(RULE, "bootstrap as damping", "Pass a number, or signal_to_noise().")
    return ""


def _parts(argument: Any) -> list[Any]:
    """Return what is passed for every term."""
    return list(argument.values()) if isinstance(argument, Mapping) else [argument]
