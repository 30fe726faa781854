"""The model of a fit, with its layers found once where that is soon worth the time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ddnewton.criteria.monte_carlo import check_criterion
from ddnewton.errors import warn
from ddnewton.inputs.term_names import Name, about_term, one_or_several
from ddnewton.inputs.terms import TermArguments
from ddnewton.linearize.linearization import dense_flops
from ddnewton.linearize.structured.traced_model import Prepared
from ddnewton.optim.modules import output_count, with_layers
from ddnewton.trees import parameter_count
from ddnewton.types import AnyModelFn, GramWay, GramWays, ModelFn, PyTree

LEAST_FLOPS_TO_TRACE = 5e7
"""From how many flops of dense products an update a trace pays for itself within ten updates."""


class FittedModel(NamedTuple):
    """A model for many updates, and how the Gram matrix of it is formed."""

    model_fn: AnyModelFn
    gram: GramWays


def fitted_model(terms: Sequence[TermArguments], params: PyTree) -> FittedModel:
    """Return the model with its layers found, term by term, where that is worth the time.

    What cannot be traced is said once, and not tried again in every update. Criteria that no step
    takes are refused.
    """
    # Refuse what breaks a rule before any model is run.
    for term in terms:
        with about_term(term.name):
            check_criterion(term.criterion)
    functions: dict[Name, ModelFn] = {}
    ways: dict[Name, GramWay] = {}
    for term in terms:
        with about_term(term.name):
            functions[term.name], ways[term.name] = _of_term(term, params)
    return FittedModel(one_or_several(functions), one_or_several(ways))


def _of_term(term: TermArguments, params: PyTree) -> tuple[ModelFn, GramWay]:
    """Return the function of a term, with layers or as it is, and how its columns are formed."""
    function: ModelFn = term.model_fn
    if term.gram in ("dense", "free") or isinstance(function, Prepared):
        return function, term.gram
    # Dense products of so few numbers are done before a trace would be.
    flops = dense_flops(output_count(function, params, term.X), parameter_count(params))
    if term.gram == "auto" and flops < LEAST_FLOPS_TO_TRACE:
        return function, term.gram
    # The layers, or columns without them.
    traced, slow = with_layers(function, params, term.X)
    if slow is None or term.gram == "structured":
        return traced, term.gram
    if slow:
        warn(slow)
    return traced, "dense"
