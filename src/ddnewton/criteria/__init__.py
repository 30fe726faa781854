"""Losses as records of functions: in closed form for torch's, by torch.func for any convex one."""

from ddnewton.criteria.convex import convex
from ddnewton.criteria.empirical import empirical_fisher
from ddnewton.criteria.expand import AnyCriterion, as_loss, expand_batch, joint_loss, losses, weight
from ddnewton.criteria.likelihoods import bce_with_logits, gaussian_nll, poisson_nll
from ddnewton.criteria.loss import Expansion, Loss, slopes_of, spanned
from ddnewton.criteria.monte_carlo import MonteCarlo, monte_carlo
from ddnewton.criteria.regression import huber, mse, smooth_l1
from ddnewton.criteria.softmax import cross_entropy

__all__ = [
    "AnyCriterion",
    "Expansion",
    "Loss",
    "MonteCarlo",
    "as_loss",
    "bce_with_logits",
    "convex",
    "cross_entropy",
    "empirical_fisher",
    "expand_batch",
    "gaussian_nll",
    "huber",
    "joint_loss",
    "losses",
    "monte_carlo",
    "mse",
    "poisson_nll",
    "slopes_of",
    "smooth_l1",
    "spanned",
    "weight",
]
