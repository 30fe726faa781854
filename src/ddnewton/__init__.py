"""Directionally damped Newton steps for PyTorch, as pure functions on torch.func."""

from ddnewton.criteria import (
    clipped,
    empirical_fisher,
    fisher,
    majorized,
    monte_carlo,
    weighted,
    with_curvature,
)
from ddnewton.curvature import directional_derivatives, ggn_eigh, ggn_eigvalsh, gram_matrix
from ddnewton.inputs.batches import Batches
from ddnewton.inputs.groups import Group, per_layer, per_parameter
from ddnewton.inputs.module_function import as_function
from ddnewton.linearize.structured.prepare import prepare
from ddnewton.linearize.structured.traced_model import Prepared
from ddnewton.newton import newton_step, newton_step_and_info
from ddnewton.optim.adaptation import fixed, held_out, levenberg_marquardt, spring, trust_region
from ddnewton.optim.fit import fit
from ddnewton.optim.fit_record import Fit, History
from ddnewton.optim.functional import FunctionalOptimizer, directional_newton
from ddnewton.optim.state import State, UpdateInfo
from ddnewton.quadratic.info import NewtonInfo
from ddnewton.select import above, energy, top_k
from ddnewton.uncertainty import covariance, standard_errors

__version__ = "0.1.0"

__all__ = [
    "Batches",
    "Fit",
    "FunctionalOptimizer",
    "Group",
    "History",
    "NewtonInfo",
    "Prepared",
    "State",
    "UpdateInfo",
    "above",
    "as_function",
    "clipped",
    "covariance",
    "directional_derivatives",
    "directional_newton",
    "empirical_fisher",
    "energy",
    "fisher",
    "fit",
    "fixed",
    "ggn_eigh",
    "ggn_eigvalsh",
    "gram_matrix",
    "held_out",
    "levenberg_marquardt",
    "majorized",
    "monte_carlo",
    "newton_step",
    "newton_step_and_info",
    "per_layer",
    "per_parameter",
    "prepare",
    "spring",
    "standard_errors",
    "top_k",
    "trust_region",
    "weighted",
    "with_curvature",
]
