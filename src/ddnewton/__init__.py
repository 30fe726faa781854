"""Directionally damped Newton steps for PyTorch, as pure functions on torch.func."""

from ddnewton.adaptation import fixed, held_out, levenberg_marquardt, trust_region
from ddnewton.criteria import empirical_fisher, monte_carlo
from ddnewton.curvature import directional_derivatives, ggn_eigh, ggn_eigvalsh, gram_matrix
from ddnewton.groups import Group, per_layer, per_parameter
from ddnewton.info import NewtonInfo
from ddnewton.newton import newton_step, newton_step_and_info
from ddnewton.select import above, energy, top_k
from ddnewton.structured.prepare import prepare
from ddnewton.structured.prepared import Prepared
from ddnewton.training import FunctionalOptimizer, directional_newton
from ddnewton.updates import State, UpdateInfo

__all__ = [
    "FunctionalOptimizer",
    "Group",
    "NewtonInfo",
    "Prepared",
    "State",
    "UpdateInfo",
    "above",
    "directional_derivatives",
    "directional_newton",
    "empirical_fisher",
    "energy",
    "fixed",
    "ggn_eigh",
    "ggn_eigvalsh",
    "gram_matrix",
    "held_out",
    "levenberg_marquardt",
    "monte_carlo",
    "newton_step",
    "newton_step_and_info",
    "per_layer",
    "per_parameter",
    "prepare",
    "top_k",
    "trust_region",
]
