"""The products of a batch with its losses' Hessians, checked and on the scale of the batch."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.criteria.expand import (
    CONVEXITY_TOLERANCE,
    check_finite,
    checked_expansion,
    differentiated,
    not_convex,
)
from ddnewton.criteria.hessian_blocks import HESSIAN_ROUNDINGS
from ddnewton.criteria.loss import Loss, slopes_of
from ddnewton.criteria.root import Root, Rows, dense_root, scaled_root, squares_over
from ddnewton.linearize.precision import ramp
from ddnewton.transforms import any_known, unwrapped
from ddnewton.types import PyTree


def root_of_batch(
    loss: Loss, outputs: Float[Tensor, "n ..."], precise: Float[Tensor, "n ..."], y: PyTree
) -> Root:
    """Return the root of all samples, scaled so that the batch's loss is their values' mean.

    It is the counterpart of `expand_batch`: at the ``precise`` outputs in float64, or at
    ``outputs`` if the loss refuses, and after the same checks. A loss that has no products of its
    own is expanded. Where only products tell whether the loss is convex, each one is looked at.

    Raises
    ------
    ValueError
        Where the batch does not fit the loss, this is not finite, or not convex.
    """
    loss.check(outputs, y)
    root, root_of = None, loss.root
    if root_of is not None:
        (root, eps), denominator = differentiated(
            lambda f: (root_of(f, y), torch.finfo(f.dtype).eps), loss, outputs, precise, y
        )
    if root is None:
        expansion = checked_expansion(loss, outputs, precise, y)
        value, basis, z, h, R = expansion
        squares, spans = squares_over(z, h), R.numel() == 0
        return dense_root(
            value, slopes_of(expansion), basis, h, spans=spans, squares=squares if spans else None
        )
    # One product tells whether the Hessian is finite, and how large it is.
    scale = outputs.shape[0] / denominator
    root = scaled_root(root, scale)
    probe = ramp(root.gradient)
    image = root.product(probe)
    check_finite(root.value, root.gradient, image)
    if root.times is not None:
        return root
    # Curvature counts as zero within the rounding of the gradient, or of that at the origin.
    size = torch.as_tensor(scale, dtype=probe.dtype, device=probe.device)
    size = size.maximum(root.gradient.abs().amax())
    least = HESSIAN_ROUNDINGS * eps * probe.shape[1] * size
    return _if_convex(root, loss, (outputs, y), _largest(probe, image), least)


def _if_convex(
    root: Root,
    loss: Loss,
    batch: tuple[Tensor, PyTree],
    largest: Float[Tensor, ""],
    least: Float[Tensor, ""],
) -> Root:
    """Return a root whose products raise where they find negative curvature.

    It is negative beyond rounding, ``least``, and beside the largest curvature there is.
    """

    # vᵀHv / vᵀv of every sample lies between the extreme eigenvalues of its Hessian.
    def product(v: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        image = root.product(v)
        squares = v.square().sum(1)
        curvatures = (v * image).sum(1) / torch.where(squares == 0, 1, squares)
        scale = torch.maximum(largest, _largest(v, image))
        if any_known(curvatures < -CONVEXITY_TOLERANCE * scale - least):
            lowest = unwrapped(curvatures).min().item()
            raise not_convex(loss, *batch, f"a curvature of {lowest:.3g} along a vector")
        return image

    def at(samples: Rows) -> Root:
        return _if_convex(root.at(samples), loss, batch, largest, least)

    return root._replace(product=product, at=at)


def _largest(v: Float[Tensor, "n c"], image: Float[Tensor, "n c"]) -> Float[Tensor, ""]:
    """Return the largest ‖H_n v_n‖ / ‖v_n‖ of all samples."""
    norms = v.norm(dim=1)
    largest: Tensor = (image.norm(dim=1) / torch.where(norms == 0, 1, norms)).amax()
    return largest
