"""The model of a fit, with its layers found once where that is soon worth the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from ddnewton.criteria.monte_carlo import check_criterion
from ddnewton.distributed.team import Team
from ddnewton.errors import warn
from ddnewton.inputs.term_names import Name, about_term, one_or_several
from ddnewton.inputs.terms import TermArguments, terms_of
from ddnewton.linearize.structured.costs import dense_flops
from ddnewton.linearize.structured.traced_model import Prepared
from ddnewton.optim.agreed_layers import Layers, Traced, agreed_layers
from ddnewton.optim.modules import output_count, with_layers
from ddnewton.optim.pure_functions import Update
from ddnewton.trees import parameter_count, sample_count
from ddnewton.types import ModelFn, PyTree

LEAST_FLOPS_TO_TRACE = 5e7
"""From how many flops of dense products an update a trace pays for itself within ten updates."""


def with_fitted_model(
    plan: Update, params: PyTree, X: PyTree, y: PyTree, *, team: Team | None
) -> Update:
    """Return an update whose model has its layers found at these samples, where that soon pays."""
    options = plan.arguments.keywords
    samples = {
        "subsampling_grad": plan.subsampling_grad,
        "subsampling_ggn": plan.subsampling_ggn,
        "subsampling_curvature": options["subsampling_curvature"],
    }
    of_call = plan.arguments.args[0], X, y, options["criterion"], options["gram"], samples
    model = fitted_model(terms_of(*of_call, team=team), params, team)
    arguments = partial(plan.arguments.func, model.model_fn, **options | {"gram": model.gram})
    return replace(plan, arguments=arguments)


def fitted_model(terms: Sequence[TermArguments], params: PyTree, team: Team | None) -> Layers:
    """Return the model with its layers found, term by term, where that is worth the time.

    What cannot be traced is said once, and not tried again in every update: on any rank that holds
    samples of it. Criteria that no step takes are refused.
    """
    # Refuse what breaks a rule before any model is run.
    for term in terms:
        with about_term(term.name):
            check_criterion(term.criterion)
    traced: dict[Name, Traced] = {}
    for term in terms:
        with about_term(term.name):
            traced[term.name] = _of_term(term, params)
    # What has no layers on one rank goes without them on all.
    gram = {term.name: term.gram for term in terms}
    layers = agreed_layers(traced, one_or_several(gram), team)
    for reason in layers.slow:
        warn(reason)
    return layers


def _of_term(term: TermArguments, params: PyTree) -> Traced:
    """Return the function of a term, with layers or as it is, and why it has none.

    A rank without samples of it has nothing to look at.
    """
    function: ModelFn = term.model_fn
    settled = term.gram in ("dense", "free") or isinstance(function, Prepared)
    if settled or not sample_count(term.X):
        return Traced(function, None)
    # Dense products of so few numbers are done before a trace would be.
    n = sample_count(term.X) if term.shards is None else term.shards[-1].stop
    flops = dense_flops(output_count(function, params, term.X, n), parameter_count(params))
    if term.gram == "auto" and flops < LEAST_FLOPS_TO_TRACE:
        return Traced(function, None)
    return Traced(*with_layers(function, params, term.X, n))
