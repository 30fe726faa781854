"""Adaptations: how the damping of the next step follows from the outcome of the last one."""

from ddnewton.optim.adaptation.adaptation import (
    Adaptation,
    Choice,
    Curvature,
    LearningRate,
    Outcome,
)
from ddnewton.optim.adaptation.deterministic import levenberg_marquardt, trust_region
from ddnewton.optim.adaptation.fixed import SMALLEST_DAMPING, as_adaptation, fixed
from ddnewton.optim.adaptation.stochastic import held_out, spring

__all__ = [
    "SMALLEST_DAMPING",
    "Adaptation",
    "Choice",
    "Curvature",
    "LearningRate",
    "Outcome",
    "as_adaptation",
    "fixed",
    "held_out",
    "levenberg_marquardt",
    "spring",
    "trust_region",
]
