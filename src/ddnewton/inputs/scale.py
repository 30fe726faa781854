"""The scale of the parameters, as callers say it: damping acts on the step over its scale."""

from __future__ import annotations

from numbers import Real
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.inputs.checks import check_positive
from ddnewton.scalars import scalar_like
from ddnewton.transforms import any_known
from ddnewton.trees import leaf_paths, real_count, tree_flatten
from ddnewton.types import PyTree

Scale: TypeAlias = Literal["jac"] | float | Tensor | PyTree | None
"""None; a positive number; a pytree like the parameters of positive numbers or tensors that can be
broadcast to the leaves; or "jac", the inverse of the sizes of the columns of the Jacobian."""

SCALE_REMEDY = 'Pass a positive number, a pytree of them like params, "jac" or None.'


def check_scale(scale: Scale) -> None:
    """Require something that may be a scale, before the parameters are known."""
    if isinstance(scale, str) and scale != "jac":
        raise BadValue(
            sentence('scale must be positive numbers, "jac" or None', scale, SCALE_REMEDY)
        )
    if isinstance(scale, Real):
        check_positive("scale", scale)


def scale_of(scale: Scale, params: PyTree) -> Float[Tensor, " d"] | None:
    """Return the scale of every parameter, None where none is given or columns tell.

    A complex parameter counts as a pair of reals of one scale.
    """
    check_scale(scale)
    if scale is None or isinstance(scale, str):
        return None
    leaves, structure = tree_flatten(params)
    # One number for all, or something for every leaf.
    every = isinstance(scale, Real) or (isinstance(scale, Tensor) and scale.ndim == 0)
    try:
        given: list[Any] = [scale] * len(leaves) if every else structure.flatten_up_to(scale)
    except ValueError as error:
        rule = "scale must be a number, or have the structure of params"
        raise BadValue(sentence(rule, "other keys, lengths or types", SCALE_REMEDY)) from error
    paths = leaf_paths(params)
    return torch.cat(list(map(_of_leaf, given, leaves, paths)))


def _of_leaf(numbers: object, leaf: Tensor, path: str) -> Float[Tensor, " _"]:
    """Return the scale of every real of a leaf."""
    where = f"scale of {path}" if path else "scale"
    if not isinstance(numbers, (Real, Tensor)) or isinstance(numbers, bool):
        rule = f"{where} must be a number or a tensor"
        raise BadType(sentence(rule, type(numbers).__name__, SCALE_REMEDY))
    # As many numbers as the leaf has.
    number_or_tensor = numbers if isinstance(numbers, Tensor) else float(numbers)
    tensor = scalar_like(number_or_tensor, leaf, torch.float64)
    try:
        tensor = tensor.expand(leaf.shape)
    except RuntimeError as error:
        rule = f"{where} must have a shape that can be broadcast to {list(leaf.shape)}"
        raise BadValue(sentence(rule, list(tensor.shape), SCALE_REMEDY)) from error
    # All of them positive, twice where the leaf is complex.
    if any_known(~((tensor > 0) & tensor.isfinite())):
        rule, got = f"{where} must be positive and finite", "a number that is not"
        raise BadValue(sentence(rule, got, SCALE_REMEDY))
    repeats = real_count(leaf) // max(1, leaf.numel())
    return tensor.reshape(-1).repeat_interleave(max(1, repeats))
