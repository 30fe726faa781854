"""Directionally damped Newton steps for PyTorch, as pure functions on torch.func."""

from ddnewton.newton import NewtonInfo, newton_step, newton_step_and_info
from ddnewton.select import above, energy, top_k
from ddnewton.structured.prepare import prepare
from ddnewton.structured.prepared import Prepared

__all__ = [
    "NewtonInfo",
    "Prepared",
    "above",
    "energy",
    "newton_step",
    "newton_step_and_info",
    "prepare",
    "top_k",
]
