"""How damping follows what steps do."""

from ddnewton.adaptation.mini_batches import held_out
from ddnewton.adaptation.record import Adaptation, Choice, Curvature, LearningRate, Outcome
from ddnewton.adaptation.steady import as_adaptation, fixed
from ddnewton.adaptation.without_noise import SLACK, levenberg_marquardt, trust_region

__all__ = [
    "SLACK",
    "Adaptation",
    "Choice",
    "Curvature",
    "LearningRate",
    "Outcome",
    "as_adaptation",
    "fixed",
    "held_out",
    "levenberg_marquardt",
    "trust_region",
]
