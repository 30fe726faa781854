"""Directionally damped Newton steps for PyTorch, as pure functions on torch.func."""

from ddnewton.criteria import empirical_fisher, monte_carlo
from ddnewton.curvature import directional_derivatives, ggn_eigh, ggn_eigvalsh, gram_matrix
from ddnewton.groups import Group, per_layer, per_parameter
from ddnewton.info import NewtonInfo
from ddnewton.newton import newton_step, newton_step_and_info
from ddnewton.select import above, energy, top_k
from ddnewton.structured.prepare import prepare
from ddnewton.structured.prepared import Prepared

__all__ = [
    "Group",
    "NewtonInfo",
    "Prepared",
    "above",
    "directional_derivatives",
    "empirical_fisher",
    "energy",
    "ggn_eigh",
    "ggn_eigvalsh",
    "gram_matrix",
    "monte_carlo",
    "newton_step",
    "newton_step_and_info",
    "per_layer",
    "per_parameter",
    "prepare",
    "top_k",
]
