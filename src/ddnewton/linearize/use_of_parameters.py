"""Whether a model uses its parameters at all."""

from __future__ import annotations

import torch

from ddnewton.linearize.free_linearization import FreeLinearization
from ddnewton.linearize.model import Linearization
from ddnewton.transforms import is_batched


def depends_on_parameters(linearization: Linearization | FreeLinearization) -> bool:
    """Return whether the first sample's outputs depend on a parameter, by the graph of autograd.

    Under ``vmap`` it cannot be told, nor where autograd fails: they count as dependent.
    """
    if is_batched(linearization.outputs):
        return True
    if linearization.depends is not None:
        return linearization.depends()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [leaf.detach().clone().requires_grad_() for leaf in linearization.leaves]
            first = torch.arange(1, device=linearization.outputs.device)
            outputs = linearization.function(leaves, first)
            if not outputs.requires_grad:
                return False
            grads = torch.autograd.grad(outputs.sum(), leaves, allow_unused=True)
    except Exception:  # noqa: BLE001 - the model was never asked to run so
        return True
    return any(grad is not None for grad in grads)
