"""A check that products with J and with Jᵀ are of one matrix.

J v is a derivative of the derivative Jᵀu. Where torch takes a first derivative for a constant, as
that of some operations which move tensors between ranks, J v is wrong, and nothing shows it.
"""

from __future__ import annotations

import torch

from ddnewton.errors import BadValue, sentence
from ddnewton.linearize.first_products import MEASURED_SAMPLES
from ddnewton.linearize.free_linearization import FreeLinearization
from ddnewton.linearize.precision import ramp


def check_adjoint(linearization: FreeLinearization) -> None:
    """Require products of the first samples with J and with Jᵀ that are of one matrix."""
    leaves, n = linearization.leaves, len(linearization.outputs)
    products = linearization.products(range(len(leaves)), slice(0, min(n, MEASURED_SAMPLES)))
    # uᵀ(J v) = (Jᵀu)ᵀv, for all the leaves at once.
    u, v = ramp(products.outputs).flatten(1), list(map(ramp, leaves))
    pushed, pulled = products.push(v), products.pull(u)
    left, right = pushed * u, torch.cat([(p * x).flatten() for p, x in zip(pulled, v, strict=True)])
    scale, eps = left.norm() + right.norm(), linearization.eps
    if not bool((left.sum() - right.sum()).abs() <= eps**0.5 * scale):
        rule = "model_fn must have two derivatives along params"
        got = f"uᵀ(J v) = {float(left.sum()):.6g} beside (Jᵀu)ᵀv = {float(right.sum()):.6g}"
        remedy = (
            "torch differentiates what moves tensors between ranks once only: leave that to "
            "DTensors, and compute no derivatives inside."
        )
        raise BadValue(sentence(rule, got, remedy))
