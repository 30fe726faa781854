"""Records as values that JSON can hold, and back; it has no nan and no infinities."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ddnewton.diagnostics.direction_summary import Summary
from ddnewton.errors import BadType, BadValue, public, sentence

COUNT_FIELDS = ("rank", "samples", "curvature_samples")
"""The fields of a `Summary` that are integers."""


@public
def plain(info: tuple[Any, ...]) -> dict[str, Any]:
    """Return a NamedTuple of tensors as a dict of numbers, booleans, and lists of them, for JSON.

    nan becomes None, ∞ becomes ``"inf"``, and −∞ ``"-inf"``.

    Raises
    ------
    TypeError
        If ``info`` is not a NamedTuple, or a field of it is not a real number.

    Examples
    --------
    >>> import torch
    >>> from typing import NamedTuple
    >>> class Told(NamedTuple):
    ...     ratio: torch.Tensor
    ...     dampings: torch.Tensor
    >>> plain(Told(torch.tensor(torch.nan), torch.tensor([0.5, torch.inf])))
    {'ratio': None, 'dampings': [0.5, 'inf']}
    """
    return as_plain(info)


@public
def summaries(line: Mapping[str, Any]) -> list[Summary]:
    """Return the summaries in a line of a run, one for each group; [] where none were logged.

    Raises
    ------
    ValueError
        If they were not written by `append`.
    """
    try:
        return [_restored(fields) for fields in line.get("directions", [])]
    except (KeyError, TypeError, ValueError) as error:
        rule = "directions must hold the fields of a Summary"
        raise BadValue(sentence(rule, repr(error), "Write them with append.")) from error


def as_plain(info: object) -> dict[str, Any]:
    """Return `plain` of a record; errors are named after the public function that called this."""
    if not isinstance(info, tuple) or not hasattr(info, "_asdict"):
        rule, got = "info must be a NamedTuple of tensors", type(info).__name__
        raise BadType(sentence(rule, got, "Pass what a step or an update returned."))
    return {name: to_json(name, value) for name, value in info._asdict().items()}


def to_json(name: str, value: object) -> Any:
    """Return a number, a tensor, or a list of them, as JSON can hold it; ``name`` is for errors."""
    # Tensors are nested lists, or one number.
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, list):
        return [to_json(name, item) for item in value]
    # The losses of terms are a dict of numbers.
    if isinstance(value, dict) and name == "losses":
        return {str(key): to_json(f"{name}[{key!r}]", item) for key, item in value.items()}
    # Booleans before integers, which they are too.
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if not isinstance(value, Real):
        raise BadType(sentence(f"{name} must be a number", repr(value), "Pass a real number."))
    # nan as None, ∞ as "inf".
    number = float(value)
    return None if math.isnan(number) else number if math.isfinite(number) else str(number)


def from_json(value: Any) -> Any:
    """Return a value that was read from JSON, with nan and the infinities as numbers again."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if isinstance(value, dict):
        return {name: from_json(item) for name, item in value.items()}
    return math.nan if value is None else float(value) if value in {"inf", "-inf"} else value


def _restored(fields: Mapping[str, Any]) -> Summary:
    """Return the summary whose fields were written as `plain` numbers."""
    fields = {"flat_share": None, **fields}  # which older runs lack
    values = {name: from_json(fields[name]) for name in Summary._fields}
    dtypes = {name: torch.int64 if name in COUNT_FIELDS else torch.float64 for name in values}
    on_host = partial(torch.tensor, device="cpu")
    return Summary(**{name: on_host(value, dtype=dtypes[name]) for name, value in values.items()})
