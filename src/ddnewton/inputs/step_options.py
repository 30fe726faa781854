"""Checks of the options of a step, made before any work."""

from __future__ import annotations

from collections.abc import Mapping

from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.inputs.checks import check_damping, check_positive
from ddnewton.transforms import any_known

GRAM_OPTIONS = ("auto", "structured", "dense", "free")
"""The values of the option ``gram``."""

PRECISIONS = ("auto", "float64", "model")
"""The values of the option ``precision``."""


def check_options(
    damping: object,
    complement: object,
    gram: object,
    chunk_size: object,
    tol: object,
    precision: object,
) -> None:
    """Require sensible values of the options, as far as the data do not matter."""
    # Damping and complement are dampings ≥ 0; gram is one of some words; a chunk has samples.
    check_damping("damping", damping)
    if complement is not None:
        check_positive("complement", complement)
    ways = list(gram.values()) if isinstance(gram, Mapping) else [gram]
    if "free" in ways and set(ways) != {"free"}:
        rule = 'gram must be "free" for all terms or for none'
        raise BadValue(sentence(rule, ways, 'Pass gram="free" alone.'))
    for way in ways:
        if way not in GRAM_OPTIONS:
            rule = f"gram must be one of {', '.join(map(repr, GRAM_OPTIONS))}"
            raise BadValue(sentence(rule, repr(way), 'Leave it at "auto".'))
    if chunk_size is not None:
        remedy = "Pass a number of samples."
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
            rule, got = "chunk_size must be an integer or None", type(chunk_size).__name__
            raise BadType(sentence(rule, got, remedy))
        if chunk_size < 1:
            raise BadValue(sentence("chunk_size must be at least 1", chunk_size, remedy))
    # A share of the decrease; and a word.
    check_positive("tol", tol)
    if any_known(tol >= 1):  # type: ignore[operator]
        raise BadValue(sentence("tol must be below 1", tol, "Pass a share, such as 1e-2."))
    if precision not in PRECISIONS:
        rule = f"precision must be one of {', '.join(map(repr, PRECISIONS))}"
        raise BadValue(sentence(rule, repr(precision), 'Leave it at "auto".'))
