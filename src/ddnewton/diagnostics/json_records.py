"""Records as JSON has them, and back: what it has no word for is nan and the infinities."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    """Return a NamedTuple of tensors as what JSON takes: numbers, booleans, and lists of them.

    nan becomes None, ∞ becomes ``"inf"``, and −∞ ``"-inf"``.

    Raises
    ------
    TypeError
        If this is no NamedTuple, or holds what is no real number.

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
    """Return the summaries in a line of a run: one for each group, or none if there are none.

    Raises
    ------
    ValueError
        If they are not as `append` writes them.
    """
    try:
        return [_restored(fields) for fields in line.get("directions", [])]
    except (KeyError, TypeError, ValueError) as error:
        rule = "directions must hold the fields of a Summary"
        raise BadValue(sentence(rule, repr(error), "Write them with append.")) from error


def as_plain(info: object) -> dict[str, Any]:
    """Return what `plain` does, for the functions that write it."""
    if not isinstance(info, tuple) or not hasattr(info, "_asdict"):
        rule, got = "info must be a NamedTuple of tensors", type(info).__name__
        raise BadType(sentence(rule, got, "Pass what a step or an update returned."))
    return {name: written(name, value) for name, value in info._asdict().items()}


def written(name: str, value: object) -> Any:
    """Return numbers as JSON has them."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, list):
        return [written(name, each) for each in value]
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if not isinstance(value, Real):
        raise BadType(sentence(f"{name} must be a number", repr(value), "Pass a real number."))
    number = float(value)
    return None if math.isnan(number) else number if math.isfinite(number) else str(number)


def unwritten(value: Any) -> Any:
    """Return what was written, with the numbers that JSON has no word for."""
    if isinstance(value, list):
        return [unwritten(each) for each in value]
    if isinstance(value, dict):
        return {name: unwritten(each) for name, each in value.items()}
    return math.nan if value is None else float(value) if value in {"inf", "-inf"} else value


def _restored(fields: Mapping[str, Any]) -> Summary:
    known = {name: unwritten(fields[name]) for name in Summary._fields}
    kinds = {name: torch.int64 if name in COUNT_FIELDS else torch.float64 for name in known}
    return Summary(
        **{name: torch.tensor(value, dtype=kinds[name]) for name, value in known.items()}
    )
