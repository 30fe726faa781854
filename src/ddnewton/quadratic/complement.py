"""The part of the gradient that the kept directions leave out.

The gradient is A z / N, and z / N are the weights of its columns. Its live part lies along the live
directions of the spectrum. A part outside these comes from columns without curvature, which are
those of losses that are flat but not level, of samples that a net is certain of and wrong about,
and of samples that the curvature is not taken of; and from faint directions.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ddnewton.quadratic.kept import Directions
from ddnewton.quadratic.spectrum import COLUMN_ROUNDINGS, Spectrum
from ddnewton.scalars import scalar_like
from ddnewton.transforms import any_possible


def outside(
    spectrum: Spectrum, gradient_weights: Float[Tensor, " a"], kept: Directions
) -> Float[Tensor, " j"]:
    """Return the part of the gradient outside the kept directions, g − Pg."""
    left_out = torch.where(kept.left_out, spectrum.column_slopes.mT @ gradient_weights, 0)
    return spectrum.vectors @ left_out + outside_live(spectrum, gradient_weights)


def vanishing(
    spectrum: Spectrum,
    gradient_weights: Float[Tensor, " a"],
    curved: Bool[Tensor, " a"],
    delta: float | Tensor,
) -> Float[Tensor, " j"]:
    """Return −s along the directions whose curvature is positive but too small to resolve, λ → 0.

    One damping of all directions damps these as well: where a net is certain and wrong, or where
    two samples that are almost the same have different targets, the curvature vanishes and the
    slope does not. Zero where δ is lost in the rounding of curvatures, as in the pseudo-inverse.
    """
    part = outside_live(spectrum, torch.where(curved, gradient_weights, 0))
    delta = scalar_like(delta, part)
    return torch.where(delta > spectrum.rounding, part / delta, 0)


def outside_live(spectrum: Spectrum, gradient_weights: Float[Tensor, " a"]) -> Float[Tensor, " j"]:
    """Return the part of the gradient outside the live directions; most often there is none.

    A part no longer than the rounding of a sum of columns counts as none.
    """
    flat = ~spectrum.resolved & (gradient_weights != 0)
    if not (any_possible(spectrum.faint) or any_possible(flat)):
        return spectrum.vectors.new_zeros(spectrum.vectors.shape[0])
    part = spectrum.outside_live(gradient_weights)
    size = spectrum.to_parameters(part[None]).norm()
    terms = gradient_weights[: len(spectrum.sizes)] * spectrum.sizes
    noise = terms.norm() * torch.finfo(part.dtype).eps
    return torch.where(size > COLUMN_ROUNDINGS * noise, part, 0)
