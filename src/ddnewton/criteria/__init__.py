"""Losses as records of functions: closed forms for torch's, torch.func for any other convex one."""

from ddnewton.criteria.batch import as_loss, expand_batch
from ddnewton.criteria.closed import bce_with_logits, cross_entropy, mse
from ddnewton.criteria.convex import convex
from ddnewton.criteria.record import Expansion, Loss

__all__ = [
    "Expansion",
    "Loss",
    "as_loss",
    "bce_with_logits",
    "convex",
    "cross_entropy",
    "expand_batch",
    "mse",
]
