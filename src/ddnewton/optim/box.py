r"""Bounds on the parameters: projected steps with an active set.

A parameter at a bound whose slope points outwards is held there: no step can lower the loss along
it. The others make a step as if there were no bounds, which is then cut to the box,

    s = P(θ + s_free) − θ,        P(θ)_j = min(max(θ_j, l_j), u_j),

and is judged by the ratio of what the loss falls to what the quadratic model promises of s itself.
With more damping s turns into a short step along the projected gradient, which lowers the loss
wherever θ is no solution; where it is one, no free parameter has a slope. A parameter that is cut
is at its bound exactly, and is held or set free anew in every update.

Sources: Bertsekas, "Projected Newton methods for optimization problems with simple constraints",
SIAM J. Control Optim. 20, 1982; Kanzow, Yamashita, Fukushima, "Levenberg-Marquardt methods with
strong local convergence properties for solving nonlinear equations with convex constraints", J.
Comput. Appl. Math. 172, 2004.
"""

from __future__ import annotations

from numbers import Real
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.trees import (
    flattened,
    named_leaves,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
)
from ddnewton.types import PyTree

Bounds: TypeAlias = tuple[PyTree, PyTree]
"""Lower and upper ones: each a number, or a pytree like the parameters of numbers or tensors."""

FORM = "bounds must be a pair (lower, upper), each a number or a pytree like params"
FORM_REMEDY = "Pass ({'rate': 0.0, 'height': -inf}, inf), say, with the names of your parameters."


class Box(NamedTuple):
    """Lower and upper bounds, each like the parameters."""

    lower: PyTree
    upper: PyTree


def box_of(bounds: object, params: PyTree) -> Box:
    """Return bounds as trees like the parameters, which must lie inside them."""
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise BadType(sentence(FORM, repr(bounds), FORM_REMEDY))
    for path, leaf in named_leaves(params):
        if leaf.is_complex():
            rule, got = "bounds are of real parameters", f"params{path}: {leaf.dtype}"
            remedy = "Let params be torch.view_as_real of them, and model_fn view_as_complex them."
            raise BadType(sentence(rule, got, remedy))
    box = Box(
        *(_like(params, side, bound) for side, bound in zip(Box._fields, bounds, strict=True))
    )
    _check_order(box, params)
    return box


def clipped_to(box: Box | None, params: PyTree) -> PyTree:
    """Return parameters cut to a box, the same where there is none."""
    return params if box is None else tree_map(torch.clamp, params, box.lower, box.upper)


def step_inside(box: Box | None, params: PyTree, step: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """Return a step from parameters, cut to a box."""
    if box is None:
        return step
    theta, lower, upper = map(flattened, (params, box.lower, box.upper))
    return torch.minimum(torch.maximum(step, lower - theta), upper - theta)


def is_free(box: Box, params: PyTree, slopes: Float[Tensor, " d"]) -> Bool[Tensor, " d"]:
    """Return a mask of the parameters that no bound holds, given the slopes along all of them."""
    theta, lower, upper = map(flattened, (params, box.lower, box.upper))
    held_at_bound = ((theta <= lower) & (slopes > 0)) | ((theta >= upper) & (slopes < 0))
    return ~(held_at_bound | (lower == upper))


def _like(params: PyTree, side: str, bound: Any) -> PyTree:
    """Return the bounds of one side as tensors like the parameters."""
    # One for all, or one for every leaf.
    leaves, spec = tree_flatten(params)
    if isinstance(bound, Real) or (isinstance(bound, Tensor) and bound.ndim == 0):
        bounds = [bound] * len(leaves)
    else:
        try:
            bounds = spec.flatten_up_to(bound)
        except ValueError as error:
            got = f"a {side} of other keys, lengths or types: {bound!r}"
            raise BadValue(sentence(FORM, got, FORM_REMEDY)) from error
    # Numbers, in the dtype of their leaf.
    named = zip(named_leaves(params), bounds, strict=True)
    return tree_unflatten([_of_leaf(f"{side}{path}", leaf, x) for (path, leaf), x in named], spec)


def _of_leaf(name: str, leaf: Tensor, bound: Any) -> Tensor:
    """Return the bounds of a leaf in its shape, dtype and device."""
    # Numbers, also of lists and arrays: a single tensor as params is written so.
    rule = f"bounds: {name} must be a number, or numbers of the shape {list(leaf.shape)}"
    dtype = None if isinstance(bound, Tensor) else leaf.dtype  # of a float it would be float32
    try:
        tensor = torch.as_tensor(bound, dtype=dtype, device=leaf.device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        remedy = "Pass inf or -inf where there is no bound."
        raise BadType(sentence(rule, repr(bound), remedy)) from error
    if isinstance(bound, bool) or tensor.dtype == torch.bool or tensor.is_complex():
        raise BadType(sentence(rule, repr(bound), "Pass real numbers."))
    if tensor.ndim and tensor.shape != leaf.shape:
        raise BadValue(sentence(rule, list(tensor.shape), "Nothing is broadcast."))
    if tensor.isnan().any():
        raise BadValue(sentence(rule, "nan", "Pass inf or -inf where there is no bound."))
    return tensor.to(leaf.dtype).expand(leaf.shape)


def _check_order(box: Box, params: PyTree) -> None:
    """Require lower bounds that are not above the upper ones, and parameters inside of them."""
    pairs = zip(named_leaves(params), *map(tree_leaves, box), strict=True)
    for (path, leaf), lower, upper in pairs:
        # Both of one number hold a parameter where it is.
        crossed = lower > upper
        if crossed.any():
            rule = f"bounds: lower{path} must not be above upper{path}"
            got = f"{lower[crossed][0]:g} and {upper[crossed][0]:g}"
            raise BadValue(sentence(rule, got, "Pass (lower, upper) in this order."))
        # A number that is none is not inside either.
        outside = ~((leaf >= lower) & (leaf <= upper))
        if outside.any():
            rule = f"params{path} must lie inside its bounds"
            values = (float(part[outside][0]) for part in (leaf, lower, upper))
            got = "{:g}, which is not in [{:g}, {:g}]".format(*values)
            raise BadValue(sentence(rule, got, "Start inside: torch.clamp(params, lower, upper)."))
