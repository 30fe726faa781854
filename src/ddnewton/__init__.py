"""Directionally damped Newton steps for PyTorch, as pure functions on torch.func."""

from ddnewton.newton import NewtonInfo, newton_step, newton_step_and_info
from ddnewton.select import above, energy, top_k

__all__ = ["NewtonInfo", "above", "energy", "newton_step", "newton_step_and_info", "top_k"]
