"""Losses as records of functions: in closed form for torch's, by torch.func for any convex one."""

from ddnewton.criteria.batch_root import root_of_batch
from ddnewton.criteria.clipped import clipped
from ddnewton.criteria.convex import convex
from ddnewton.criteria.empirical import empirical_fisher
from ddnewton.criteria.expand import as_loss, expand_batch, joint_loss, losses, weight
from ddnewton.criteria.fisher import fisher
from ddnewton.criteria.heteroscedastic import heteroscedastic_nll
from ddnewton.criteria.likelihoods import bce_with_logits, gaussian_nll, poisson_nll
from ddnewton.criteria.loss import Expansion, Loss, slopes_of, spanned
from ddnewton.criteria.majorized import majorized
from ddnewton.criteria.monte_carlo import (
    AnyCriterion,
    Criteria,
    MonteCarlo,
    monte_carlo,
)
from ddnewton.criteria.regression import huber, mse, smooth_l1
from ddnewton.criteria.root import PositionScores, Root
from ddnewton.criteria.softmax import cross_entropy
from ddnewton.criteria.weighted import weighted
from ddnewton.criteria.with_curvature import with_curvature

__all__ = [
    "AnyCriterion",
    "Criteria",
    "Expansion",
    "Loss",
    "MonteCarlo",
    "PositionScores",
    "Root",
    "as_loss",
    "bce_with_logits",
    "clipped",
    "convex",
    "cross_entropy",
    "empirical_fisher",
    "expand_batch",
    "fisher",
    "gaussian_nll",
    "heteroscedastic_nll",
    "huber",
    "joint_loss",
    "losses",
    "majorized",
    "monte_carlo",
    "mse",
    "poisson_nll",
    "root_of_batch",
    "slopes_of",
    "smooth_l1",
    "spanned",
    "weight",
    "weighted",
    "with_curvature",
]
