"""A root of the covariance of fitted parameters, and a warning where there is none."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ddnewton.criteria.noise import about_noise
from ddnewton.errors import warn
from ddnewton.quadratic.arguments import Arguments
from ddnewton.quadratic.flat import check_outputs_depend
from ddnewton.quadratic.inverse_root import inverse_root
from ddnewton.quadratic.matrices import in_float64
from ddnewton.quadratic.quadratic_model import quadratic_model
from ddnewton.quadratic.residual_noise import Noise, noise_of_residuals
from ddnewton.transforms import any_known, unwrapped
from ddnewton.trees import named_leaves
from ddnewton.types import PyTree

NAMED = 4
"""How many parameters a warning names."""


class Uncertainty(NamedTuple):
    """A root W of a covariance W Wᵀ, infinite where there is none."""

    root: Float[Tensor, "d k"]
    finite: Bool[Tensor, ""]


def uncertainty_of(arguments: Arguments, *, absolute_sigma: bool) -> Uncertainty:
    """Return the root of the covariance of fitted parameters."""
    # The rows of the residuals, and what these leave undetermined.
    with about_noise(), quadratic_model(arguments) as expanded:
        model = in_float64(expanded)
        noise = noise_of_residuals(model, absolute_sigma)
        root, undetermined = inverse_root(model.curvature_jacobians, noise.weights)
        check_outputs_depend(model, [torch.diag(~undetermined).double()])
    _warn_of(undetermined, noise, arguments.params)
    finite = ~undetermined.any() & noise.variance.isfinite()
    return Uncertainty(noise.variance.sqrt() * root, finite)


def _warn_of(undetermined: Bool[Tensor, " d"], noise: Noise, params: PyTree) -> None:
    """Warn of a covariance that is infinite, and say why."""
    if any_known(undetermined):
        names = _names(params)
        mask = unwrapped(undetermined).reshape(-1, len(names)).any(0)
        named = [name for name, given in zip(names, mask.tolist(), strict=True) if given]
        more = ", …" if len(named) > NAMED else ""
        warn(
            f"the covariance is infinite, as the data do not determine {', '.join(named[:NAMED])}"
            f"{more}: a change of these changes no output. Fix one in model_fn, or add data."
        )
    elif any_known(~noise.variance.isfinite()):
        warn(
            "the covariance is infinite, as no more residuals than parameters leave nothing to "
            "estimate the noise from. Pass absolute_sigma=True if its variance is known."
        )


def _names(params: PyTree) -> list[str]:
    """Return a name for every number in the parameters."""
    return [
        f"params{path}{list(place) if place else ''}"
        for path, leaf in named_leaves(params)
        for place in product(*map(range, leaf.shape))
    ]
