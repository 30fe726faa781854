"""Functions among the arguments: how many arguments they take, and where they belong.

Targets and criterion stand side by side in every signature, and are easily swapped.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from ddnewton.inputs.batches import BATCHES_REMEDY, Batches
from ddnewton.types import PyTree

ORDER = "the order is model_fn, params, X, y, criterion."
"""The order of the arguments, for messages."""

CRITERION_REMEDY = (
    f"If it is the criterion, pass it after y: {ORDER} (An optimizer takes it when it is made.)"
)


def accepts_arguments(function: Callable[..., object], count: int) -> bool:
    """Return whether a function can be called with this many arguments; true if it cannot be told.

    A function built into C may have no signature.
    """
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # it has no signature
        return True
    return True


def accepts_updates(function: Callable[..., object]) -> bool:
    """Return whether a function can be called with the number of updates, as points of a fit are.

    A module is judged by its forward. A class, such as that of a loss, is no such function.
    """
    if isinstance(function, type):
        return False
    return accepts_arguments(function.forward if isinstance(function, nn.Module) else function, 1)


def is_function(value: Any) -> bool:
    """Return whether a value is a function, or a record of functions as a `Loss` is."""
    return callable(value) or (_is_record(value) and any(map(is_function, value)))


def not_samples(name: str, tree: PyTree, path: str, leaf: object) -> tuple[str, str]:
    """Return the name of a leaf that stands where samples should, and a remedy, for messages.

    ``leaf`` is the leaf at ``path`` of the argument ``tree``; a record of functions is named as a
    whole.
    """
    # What there is, by its name; a function of two arguments is most likely the criterion.
    value, place = (tree, "") if callable(leaf) and _is_record(tree) else (leaf, path)
    got = f"{name}{place}: {getattr(value, '__name__', type(value).__name__)}"
    if isinstance(leaf, Batches):
        return got, BATCHES_REMEDY
    if not callable(leaf):
        return got, "Convert it with torch.as_tensor."
    if not accepts_updates(leaf) and accepts_arguments(leaf, 2):
        return got, CRITERION_REMEDY
    return (
        got,
        f"Pass what it returns, or, to fit alone, a function such as {name}=lambda t: draw(t).",
    )


def _is_record(value: Any) -> bool:
    """Return whether a value is a NamedTuple."""
    return isinstance(value, tuple) and hasattr(value, "_fields")
