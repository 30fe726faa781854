r"""Weight decay that differs inside a block: the damping is a diagonal matrix D = diag(w) + δI.

It differs where leaves have decays of their own, and where decay is in units of the parameters and
damping is not. In coordinates scaled by its root the damping is 1 along all directions,

    (G + D)⁻¹ = D^{-1/2} (G̃ + I)⁻¹ D^{-1/2},        G̃ = D^{-1/2} G D^{-1/2},

and the columns are D^{-1/2} A. Their inner products are formed anew for every δ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.errors import BadValue, sentence
from ddnewton.inputs.groups import Block
from ddnewton.quadratic.gauss_newton import GaussNewton
from ddnewton.quadratic.matrices import rescaled
from ddnewton.quadratic.proximal import Centre, ProximalBlock, different
from ddnewton.quadratic.quadratic_model import QuadraticModel
from ddnewton.transforms import any_known
from ddnewton.trees import joined


class HasBlocks(Protocol):
    """What is asked of a model about its options."""

    @property
    def blocks(self) -> Sequence[Block]:
        """The blocks."""

    @property
    def has_curvature_samples(self) -> bool:
        """Whether curvatures are asked for of samples other than those of the directions."""


def is_leafwise(pulls: Sequence[ProximalBlock]) -> bool:
    """Return whether weight decay differs inside a block."""
    return any(isinstance(pull.decay, Tensor) and pull.decay.ndim for pull in pulls)


def check_leafwise(
    model: HasBlocks, decays: Sequence[float | Tensor], complement: object, *, scaled: bool
) -> None:
    """Require one damping of all directions of a block inside which decays differ."""
    differs = "weight_decay that differs inside a block needs one damping of all its directions"
    by_scale = "weight_decay with a scale of the parameters needs one damping of all directions"
    for block in model.blocks:
        of_block = different([decays[leaf] for leaf in block.leaves])
        rule, remedy = by_scale, "Leave that out, or pass scale=None."
        if len(of_block) > 1:
            rule = differs
            remedy = "Leave that out, or make a group of the leaves with one weight_decay each."
        elif not (scaled and any_decayed(of_block)):
            continue
        # All that a diagonal damping does not allow.
        asked = {
            "a damping rule": callable(block.damping),
            "select": block.select is not None,
            "a number as complement": complement not in (None, "damping"),
            "subsampling_curvature": model.has_curvature_samples,
        }
        for name, given in asked.items():
            if given:
                raise BadValue(sentence(rule, name, remedy))


def any_decayed(decays: Sequence[float | Tensor]) -> bool:
    """Return whether there is any weight decay."""
    return any(isinstance(decay, Tensor) or decay > 0 for decay in decays)


def metric_of(pull: ProximalBlock, delta: Float[Tensor, ""]) -> Float[Tensor, " d"]:
    """Return D of a block."""
    metric = (delta + pull.decay).expand(pull.vectors.shape[1])
    if any_known(metric <= 0):
        rule = "leaves without weight_decay need a damping above 0 beside others that have one"
        raise BadValue(sentence(rule, "0", "Pass a number above 0 as damping."))
    return metric


def in_metrics(
    model: QuadraticModel,
    matrices: Sequence[GaussNewton],
    metrics: Sequence[Float[Tensor, " _"]],
) -> tuple[QuadraticModel, list[GaussNewton]]:
    """Return model and matrices in the coordinates in which D is 1."""
    roots = [metric.rsqrt() for metric in metrics]
    return rescaled(model, matrices, joined(roots, model.leaves, model.sizes))


def centre_in_metric(
    pull: ProximalBlock,
    matrix: GaussNewton,
    metric: Float[Tensor, " d"],
    momentum: float | Tensor,
) -> Centre:
    """Return the centre c = D⁻¹ (δ μ s' − w θ) of a block, for the damping of 1 of D^{1/2} s."""
    before, params = pull.vectors.split(list(pull.counts))
    pulled = momentum * (metric - pull.decay) * before.sum(0) - pull.decay * params.sum(0)
    vector = pulled / metric
    slopes = matrix.columns.rmatmat(vector[:, None])[: len(matrix.weights), 0]
    return Centre(vector, slopes, torch.zeros_like(slopes), torch.ones_like(metric[0]))
