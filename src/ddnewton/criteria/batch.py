"""From whatever the user calls a criterion to the expansions of a batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ddnewton.criteria.closed import bce_with_logits, cross_entropy, mse
from ddnewton.criteria.convex import convex
from ddnewton.criteria.record import Expansion, Loss, check_reduction
from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.transforms import bare, surely
from ddnewton.types import Criterion, PyTree

CLOSED_FORMS: list[tuple[type[nn.Module], Callable[..., Tensor], Callable[..., Loss]]] = [
    (nn.MSELoss, F.mse_loss, mse),
    (nn.CrossEntropyLoss, F.cross_entropy, cross_entropy),
    (nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits, bce_with_logits),
]

DEFAULTS = {"weight": None, "pos_weight": None, "ignore_index": -100, "label_smoothing": 0.0}
"""The options a closed form knows nothing of, and the values at which they change nothing."""

CONVEXITY = 1e-6
"""How negative, relative to the largest, an eigenvalue of a loss Hessian may come out."""


def as_loss(criterion: Criterion | Loss) -> Loss:
    """Return the record of a criterion: in closed form for a torch loss, by torch.func else."""
    if isinstance(criterion, Loss):
        return criterion
    if not callable(criterion) or isinstance(criterion, type):
        rule = "criterion must be a loss function"
        remedy = "Pass a loss module such as torch.nn.MSELoss(), a function, or a Loss record."
        raise BadType(sentence(rule, repr(criterion), remedy))
    kind, options = _torch_loss(criterion)
    reduction = options.pop("reduction", "mean")
    if isinstance(criterion, nn.Module) and reduction == "none":
        check_reduction(reduction)
    plain = all(k in DEFAULTS and _same(v, DEFAULTS[k]) for k, v in options.items())
    for module, function, factory in CLOSED_FORMS:
        if plain and (kind is module or kind is function):
            return factory(reduction)
    return convex(criterion)


def expand_batch(
    loss: Loss, outputs: Float[Tensor, "n ..."], precise: Float[Tensor, "n ..."], y: PyTree
) -> Expansion:
    """Return the expansions of all samples, scaled so that the loss is the mean of the values.

    They are taken at the precise outputs where the loss can be, else at the outputs themselves.
    """
    loss.check(outputs, y)
    try:
        expansion = loss.expand(precise.double(), y)
        denominator = loss.denominator(precise.double(), y)
    except (torch.OutOfMemoryError, BadType, BadValue):
        raise
    except Exception:  # noqa: BLE001 - the loss was never asked to take float64
        expansion = loss.expand(outputs, y)
        denominator = loss.denominator(outputs, y)
    _check_expansion(expansion)
    scale = outputs.shape[0] / denominator
    return Expansion(
        value=scale * expansion.value,
        basis=expansion.basis,
        slopes=scale * expansion.slopes,
        curvatures=scale * expansion.curvatures.clamp(min=0),
        rest=scale * expansion.rest,
    )


def _torch_loss(criterion: Criterion) -> tuple[object, dict[str, Any]]:
    """Return what a callable is an instance or a partial of, and its options."""
    if isinstance(criterion, partial) and not criterion.args:
        return criterion.func, dict(criterion.keywords)
    if isinstance(criterion, nn.Module):
        names = ("reduction", *DEFAULTS)
        return type(criterion), {k: getattr(criterion, k) for k in names if hasattr(criterion, k)}
    return criterion, {}


def _same(value: object, default: object) -> bool:
    return value is default if default is None else value == default


def _check_expansion(expansion: Expansion) -> None:
    """Require a finite loss and Hessians without negative eigenvalues."""
    if any(surely(~part.isfinite()) for part in expansion):
        got = "nan or inf in the loss or its derivatives"
        raise BadValue(sentence("the loss must be finite", got, "Check the outputs and y."))
    curvatures = expansion.curvatures
    if surely(curvatures < -CONVEXITY * bare(curvatures).abs().amax()):
        curvatures = bare(curvatures)
        rule = "criterion must be convex in the outputs"
        got = f"a Hessian eigenvalue of {curvatures.min().item():.3g}"
        remedy = "The Gauss-Newton matrix needs a convex loss: move what bends it into the model."
        raise BadValue(sentence(rule, got, remedy))
