"""Products with G: their type, their rounding, and what none may be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor

from ddnewton.errors import BadValue, NotFinite, sentence

Product: TypeAlias = Callable[[Float[Tensor, " side"]], Float[Tensor, " side"]]
"""v ↦ G v, or v ↦ P⁻¹v."""

BlockProduct: TypeAlias = Callable[[Float[Tensor, "side b"]], Float[Tensor, "side b"]]
"""V ↦ G V, for some columns at once."""

FLOAT64_ROUNDING = 2.0**-52
"""No product is taken for more precise than this."""

NEGATIVE_CURVATURE_ROUNDINGS = 100.0
"""From how many roundings of a product on a negative curvature is one of the matrix."""


def finite(image: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
    """Return a product, refusing nan and inf."""
    if not image.isfinite().all():
        remedy = "Check the inputs, the parameters and the model."
        raise NotFinite(sentence("the derivatives must be finite", "nan or inf", remedy))
    return image


def checked_curvature(
    measured: list[float], norm: float, rounding: float
) -> tuple[float, float, float]:
    """Return pᵀG p, pᵀp and the norm of G as far as it is known; refuse a negative curvature."""
    curvature, length, squared = measured
    norm = max(norm, math.sqrt(squared / length)) if length > 0 else norm
    if curvature < -NEGATIVE_CURVATURE_ROUNDINGS * rounding * norm * length:
        rule = "the Gauss-Newton matrix must be positive semidefinite"
        remedy = "Pass a criterion that is convex in the outputs."
        raise BadValue(sentence(rule, f"a curvature of {curvature / length:.3g}", remedy))
    return max(curvature, 0.0), length, norm
