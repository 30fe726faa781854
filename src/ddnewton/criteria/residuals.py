"""Losses of residuals: which part of y the outputs are compared with, and what a term looks like.

A term ρ(r) of one output depends on outputs and y by r = f − t alone. Whether a loss is a sum of
such terms is measured on the batch, by its gradient ψ = ρ′ at a few points.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad

from ddnewton.criteria.loss import Loss, value_and_gradient
from ddnewton.errors import BadValue, sentence
from ddnewton.linearize.precision import loss_in_float64
from ddnewton.transforms import any_known, first_member
from ddnewton.trees import tree_flatten, tree_leaves, tree_map, tree_unflatten
from ddnewton.types import PyTree

SLOPE_AGREEMENT = 1e-6
"""Relative tolerance to which gradients that should be the same may differ."""

LEAST_RESIDUAL = 1e-4
"""How small a residual is tried, relative to the largest target, or to 1 if that is larger."""

RESIDUAL_RULE = "criterion must be a sum of terms, each of one residual, outputs − y"


class Residuals(NamedTuple):
    """A loss at a batch as a function of its residuals."""

    loss: Loss
    target: Float[Tensor, "n ..."]  # t
    y: PyTree

    def psi(self, f: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        """Return ψ, the derivative of every term, at outputs f."""
        return value_and_gradient(self.loss, f, self.y)[1].reshape(f.shape)

    def psi_slope(self, f: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        """Return ψ′ at outputs f."""
        slope: Tensor = grad(lambda x: self.psi(x).sum())(f)
        return slope


def residuals_of(loss: Loss, f: Float[Tensor, "n ..."], y: PyTree) -> Residuals:
    """Return a loss as one of residuals, by the part of y that the outputs are compared with.

    It is the part whose gradient is minus that of the outputs, at these and at shifted ones; of
    outputs [n, 1] it may have the shape [n].
    """
    candidates = [
        index
        for index, leaf in enumerate(tree_leaves(y))
        if leaf.is_floating_point() and leaf.shape in (f.shape, _without_last_one(f.shape))
    ]
    if torch.compiler.is_compiling() and candidates:
        return _compared_with(loss, f, y, candidates[0])
    point, targets = first_member(f), tree_map(first_member, y)
    for index in candidates:
        if _is_compared_with(_compared_with(loss, point, targets, index), point, index):
            return _compared_with(loss, f, y, index)
    got = "one whose gradients in the outputs and in y are not opposite"
    remedy = (
        "majorized takes HuberLoss, SmoothL1Loss, L1Loss and functions of outputs − y, with y "
        "floating-point and as many numbers as outputs; clipped takes any that is twice "
        "differentiable."
    )
    raise BadValue(sentence(RESIDUAL_RULE, got, remedy))


def check_residuals(loss: Loss, f: Float[Tensor, "n ..."], y: PyTree) -> None:
    """Require terms of one residual each, symmetric but for a linear part, and concave in r²."""
    f, y = first_member(f), tree_map(first_member, y)
    residuals = residuals_of(loss, f, y)
    # Residuals r, −r, 2r and −2r, none so small beside t that rounding would change them.
    t = residuals.target
    r = torch.where(f < t, -1, 1) * (f - t).abs().clamp(min=least_residual(t))
    points = [t + times * r for times in (1, -1, 2, -2)]
    psi, psi_mirror, psi_away, psi_across = map(residuals.psi, points)
    size = psi.abs().amax()
    # A term that depends on its own residual alone does not see what its neighbours do.
    near = _ramp(f) > 0
    mixed = residuals.psi(torch.where(near, points[0], points[3]))
    if _differ(mixed, torch.where(near, psi, psi_across), size):
        got = "one whose terms depend on other residuals too"
        raise BadValue(
            sentence(RESIDUAL_RULE, got, "Sum over outputs and samples, and let none interact.")
        )
    if _differ(psi + psi_mirror, psi_away + psi_across, size):
        rule = "criterion must treat residuals of either sign alike, but for a linear part"
        remedy = "Pass the criterion itself, or clipped(criterion): its Hessian is a curvature."
        raise BadValue(sentence(rule, "one that does not", remedy))
    # ψ′(r) ≤ (ψ(r) − ψ(−r)) / 2r, and no less than 0.
    rise, slack = torch.sign(r) * (psi - psi_mirror), _tolerance(f) * size
    bends = residuals.psi_slope(points[0]) * 2 * r.abs() > rise + slack
    if any_known(bends | (rise < -slack)):
        rule = "majorized needs terms that rise with the residual r and are concave in r²"
        got = "one that bends upwards in r²" if any_known(bends) else "one that falls"
        remedy = "Pass the criterion itself where it is convex, or clipped(criterion)."
        raise BadValue(sentence(rule, got, remedy))


def is_robust(loss: Loss, f: Float[Tensor, "n ..."], y: PyTree) -> bool:
    """Return whether `majorized` takes a loss at this batch."""
    try:
        loss_in_float64(lambda outputs: check_residuals(loss, outputs, y), f, f)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: BLE001 - it was never asked to be a function of residuals
        return False
    return True


def least_residual(t: Float[Tensor, "n ..."]) -> Float[Tensor, ""]:
    """Return from which size on residuals of these targets are more than rounding."""
    return LEAST_RESIDUAL * t.abs().amax().clamp(min=1)


def _compared_with(loss: Loss, f: Tensor, y: PyTree, index: int) -> Residuals:
    """Return a loss as one of the outputs minus the leaf of y with this index."""
    leaves, spec = tree_flatten(y)
    leaves[index] = leaves[index].to(f.dtype)
    target = leaves[index].reshape(f.shape)
    # A target that is missing, as nan, is left out by the loss: no residual, and no curvature.
    target = torch.where(target.isnan(), f, target)
    return Residuals(loss, target, tree_unflatten(leaves, spec))


def _without_last_one(shape: torch.Size) -> torch.Size:
    """Return a shape without its last axis, if that has a length of 1 and is not the only one."""
    return shape[:-1] if len(shape) > 1 and shape[-1] == 1 else shape


def _is_compared_with(residuals: Residuals, f: Tensor, index: int) -> bool:
    """Return whether the gradient in this leaf of y is minus that in the outputs."""
    loss, target, y = residuals
    leaves, spec = tree_flatten(y)

    def of_target(t: Tensor, point: Tensor) -> Tensor:
        # A missing target stays missing.
        shifted = torch.where(leaves[index].isnan(), torch.nan, t.reshape(leaves[index].shape))
        parts = [shifted if i == index else x for i, x in enumerate(leaves)]
        return value_and_gradient(loss, point, tree_unflatten(parts, spec))[0].sum()

    for point in (f, f + (1 + f.abs()) * _ramp(f) / 64):
        psi = residuals.psi(point)
        if _differ(grad(of_target)(target, point), -psi, psi.abs().amax()):
            return False
    return True


def _ramp(f: Tensor) -> Tensor:
    """Return numbers from −1 to 1 in no order, one for each output."""
    return torch.arange(1, f.numel() + 1, dtype=f.dtype, device=f.device).sin().reshape(f.shape)


def _differ(left: Tensor, right: Tensor, size: Tensor) -> bool:
    """Return whether two tensors differ by more than rounding, beside a size; nan is no matter."""
    return any_known((left - right).abs() > _tolerance(left) * size)


def _tolerance(x: Tensor) -> float:
    """Return the relative tolerance for gradients in this dtype."""
    return max(SLOPE_AGREEMENT, math.sqrt(torch.finfo(x.dtype).eps))
