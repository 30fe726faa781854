"""What the kept directions leave of the gradient.

The gradient is A z / N. Its live part lies along the live directions of the spectrum; what strays
from them comes from columns without a curvature of their own: of losses that are flat but not
level, and of samples the net is certain of, and wrong about.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ddnewton.select import Directions
from ddnewton.spectrum import Spectrum
from ddnewton.transforms import possibly


def outside(
    spectrum: Spectrum, gradient: Float[Tensor, " i"], kept: Directions
) -> Float[Tensor, " j"]:
    """Return the part of the gradient outside the kept directions, g − Pg."""
    rest = torch.where(kept.rest, spectrum.slopes.mT @ gradient, 0)
    return spectrum.span @ rest + stray(spectrum, gradient)


def vanishing(
    spectrum: Spectrum,
    gradient: Float[Tensor, " i"],
    curved: Bool[Tensor, " i"],
    delta: float | Tensor,
) -> Float[Tensor, " j"]:
    """Return −s along directions whose curvature is positive but too small to resolve, λ → 0.

    All directions means these too: where a net is certain and wrong, the curvature of a softmax
    vanishes and its slope does not. Zero for δ = 0, where the pseudo-inverse leaves them out.
    """
    part = stray(spectrum, torch.where(curved, gradient, 0))
    delta = torch.as_tensor(delta, dtype=part.dtype, device=part.device)
    return torch.where(delta > 0, part / delta, 0)


def stray(spectrum: Spectrum, gradient: Float[Tensor, " i"]) -> Float[Tensor, " j"]:
    """Return what the columns without resolved curvature add outside the live directions."""
    if not possibly(~spectrum.resolved & (gradient != 0)):
        return spectrum.span.new_zeros(spectrum.span.shape[0])
    return spectrum.stray(torch.where(spectrum.resolved, 0, gradient))
