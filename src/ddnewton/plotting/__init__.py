"""Figures of one step, and of training with many; each function draws on given Axes.

Directions are numbered from the leading one, k = 1. They have unit length, so a slope is a loss
per length in parameter space, and a curvature a loss per length squared.
"""

try:
    import matplotlib as mpl  # noqa: F401 - before a module below does
except ImportError as missing:
    _message = "ddnewton.plotting needs matplotlib: python -m pip install 'ddnewton[plot]'"
    raise ImportError(_message, name=missing.name) from missing

from ddnewton.plotting.run_figures import decreases, history, overview, training
from ddnewton.plotting.step_figures import (
    budget,
    curvature_bias,
    curvatures,
    signal_to_noise,
    slopes,
    spectrum,
)
from ddnewton.plotting.style import COLORS, panels

__all__ = [
    "COLORS",
    "budget",
    "curvature_bias",
    "curvatures",
    "decreases",
    "history",
    "overview",
    "panels",
    "signal_to_noise",
    "slopes",
    "spectrum",
    "training",
]
