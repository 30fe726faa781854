"""The noise of the targets, as the criteria and the residuals of a batch tell it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.criteria import weight
from ddnewton.criteria.noise import check_squares, is_curved
from ddnewton.errors import BadValue, sentence
from ddnewton.inputs.term_names import about_term
from ddnewton.quadratic.quadratic_model import QuadraticModel
from ddnewton.quadratic.term import Term


class Noise(NamedTuple):
    """The information that a batch has: A diag(w) Aᵀ / variance."""

    weights: Float[Tensor, " i"]
    variance: Float[Tensor, ""]


def noise_of_residuals(model: QuadraticModel, absolute_sigma: bool) -> Noise:
    """Return the information of a batch, of all its terms together."""
    kinds = [_is_of_squares(term) for term in model.terms]
    if any(kinds) and not all(kinds):
        rule = "the terms of a covariance must all be sums of squares, or all likelihoods"
        remedy = "Of squares with a known variance pass gaussian_nll(var=…)."
        raise BadValue(sentence(rule, model.names, remedy))
    unit_variance = torch.ones_like(model.loss)
    # Likelihoods: the sum over all samples, where the loss is divided by d.
    if not all(kinds):
        counts = [_denominator(term) * term.curvature_weights.reshape(-1) for term in model.terms]
        return Noise(torch.cat(counts), unit_variance)
    # Squares, which have twice the curvature of the likelihood of noise 1.
    if absolute_sigma:
        halves = [
            _information_factor(term) * term.curvature_weights.reshape(-1) for term in model.terms
        ]
        return Noise(torch.cat(halves), unit_variance)
    # Squares whose noise is estimated, so that any factor of the loss cancels.
    residuals = torch.stack([is_curved(term.h).sum() for term in model.terms]).sum()
    spare = residuals - sum(model.sizes)
    variance = torch.where(spare > 0, 2 * model.loss / spare, torch.inf)
    return Noise(model.curvature_weights, variance)


def _is_of_squares(term: Term) -> bool:
    """Return whether a term is a sum of squares; of a function, what its values on a batch say."""
    if term.objective.loss.squares is None:
        with about_term(term.objective.term):
            check_squares(term.objective.criterion_name, term.losses, term.z, term.h)
    return term.objective.loss.squares is not False


def _denominator(term: Term) -> float | Tensor:
    """Return the number d by which the loss divides the sum over all samples."""
    objective, linearization = term.objective, term.linearization
    scale = weight(objective.loss, linearization.outputs, linearization.precise, objective.y)
    return len(term.losses) / scale


def _information_factor(term: Term) -> float | Tensor:
    """Return the factor that turns the curvature of squares into their information."""
    if term.objective.loss.squares is None:
        rule = "absolute_sigma needs a criterion that says what its weights are"
        remedy = "Pass ddnewton.criteria.mse(weight=1 / sigma**2)."
        got = f"the function {term.objective.criterion_name}"
        raise BadValue(sentence(rule, got, remedy))
    return _denominator(term) / 2
