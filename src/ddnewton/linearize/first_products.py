"""Products of the first samples of a batch, which have to be those of these samples alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.inputs.checks import check_derivatives
from ddnewton.linearize.independence import check_independent
from ddnewton.linearize.jacobian_products import Products
from ddnewton.linearize.precision import ramp

MEASURED_SAMPLES = 2
"""On how many samples the size of a graph is measured, and on twice as many."""


def check_products(
    products: Callable[[Sequence[int], slice], Products],
    precise: Float[Tensor, "n ..."],
    leaves: int,
) -> None:
    """Require outputs and derivatives of the first samples to be those of them alone."""
    n = len(precise)
    if n == 1:
        return
    # The first samples among twice as many, and by themselves.
    first = min(n // 2, MEASURED_SAMPLES)
    separate = products(range(leaves), slice(0, first))
    among = products(range(leaves), slice(0, 2 * first))
    size = separate.outputs.abs().amax()
    check_independent(precise[:first], separate.outputs, size, size, "outputs")
    cotangent = ramp(among.outputs).reshape(len(among.outputs), -1)
    cotangent[first:] = 0
    pairs = zip(among.pull(cotangent), separate.pull(cotangent[:first]), strict=True)
    for of_batch, of_samples in pairs:
        check_derivatives(of_batch)
        if of_batch.numel():
            largest = torch.maximum(of_samples.abs().amax(), size.to(of_samples))
            check_independent(of_batch, of_samples, largest, largest, "derivatives")
