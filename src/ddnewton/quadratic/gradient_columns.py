"""The gradient as a sum of columns: of those of the curvature, and of its own.

Where the gradient is of samples that give no directions, or L does not span it, gradients of single
samples are columns of their own. Where these make up all of it, and nobody asks for the slopes of
single samples, their sum may stand for all of them: a column of weight 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.columns.factors import Jacobian
from ddnewton.criteria.loss import Expansion, slopes_of
from ddnewton.inputs.samples import Samples, rows_among
from ddnewton.linearize.model import Linearization


class GradientColumns(NamedTuple):
    """The weights of the columns that make up the gradient, its own columns, and its rows of γ.

    They are ``complete`` where all that it is made of are columns of its own.
    """

    of_curvature: Float[Tensor, "m n"]  # z / N, 0 for samples not of the gradient
    further: Float[Tensor, " _"]
    columns: Jacobian | None
    rows: Int[Tensor, " _"] | None
    complete: bool


def no_gradient(z: Float[Tensor, "m n"]) -> GradientColumns:
    """Return the weights of columns where nobody asks for the gradient."""
    return GradientColumns(z / z.shape[1], z.new_zeros(0), None, None, complete=False)


def gradient_columns(
    linearization: Linearization,
    expansion: Expansion,
    of_directions: Expansion,
    samples: Samples,
    *,
    by_sample: bool,
) -> GradientColumns:
    """Return the columns that make up the gradient.

    Its own are those of every sample ``by_sample``, or else their sum where that takes less time.
    """
    n, count = len(expansion.value), len(of_directions.value)
    wanted, device = samples.slopes, of_directions.value.device
    if expansion.R.shape[2] == 0:
        rows, own_samples = rows_among(wanted, samples.directions, n)
    else:  # the columns of the curvature do not span the gradient
        own_samples = torch.arange(n, device=device) if wanted is None else wanted
        rows = torch.arange(count, count + len(own_samples), device=device)
    # z of the samples that give directions and belong to the gradient; 1 for a column of its own.
    z = of_directions.z.T
    if rows is not None:
        length = count + (0 if own_samples is None else len(own_samples))
        z = z * z.new_zeros(length).index_fill(0, rows, 1)[:count]
    total = n if wanted is None else len(wanted)
    if own_samples is None or rows is None:
        return GradientColumns(z / total, z.new_zeros(0), None, rows, complete=False)
    # The columns of its own, or their sum.
    complete = len(own_samples) == total
    slopes = slopes_of(expansion)[own_samples, :, None]
    pulled_samples = None if wanted is None and complete else own_samples
    if complete and not by_sample and linearization.summed is not None:
        column = linearization.summed(slopes / total, pulled_samples)
        return GradientColumns(z / total, z.new_ones(1), column, rows[:1], complete=True)
    columns = linearization.jacobian(slopes, pulled_samples)
    further = z.new_ones(len(own_samples)) / total
    return GradientColumns(z / total, further, columns, rows, complete)
