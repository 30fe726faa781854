r"""The expansion of a loss of a whole batch whose Hessian is block-diagonal over the samples.

For a loss L(f) of all outputs f [n, c] together, whatever it divides by, the expansions are

    r_n = N ∂L/∂f_n,        H_n = N ∂²L/∂f_n∂f_n,

whose means over the samples are the derivatives of L. Where ∇²L has no entries between samples, one
product with it gives a column of every block at once:

    (∇²L (1 ⊗ e_c))_n = ∂²L/∂f_n∂f_n e_c.

So c products give all blocks, or fewer where the outputs of a sample do not all interact: one where
none do, V for logits [n, t, V] of tokens (Curtis, Powell, Reid, "On the estimation of sparse
Jacobian matrices", IMA J. Appl. Math. 1974: columns without common rows from one difference). One
more, with numbers no two of which are the same, tells whether the blocks are all there is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.func import grad_and_value

from ddnewton.criteria.loss import Expansion, spanned
from ddnewton.errors import BadValue, sentence
from ddnewton.linearize.precision import ramp
from ddnewton.transforms import any_known, linear_map
from ddnewton.trees import chunks

logger = logging.getLogger(__name__)

HESSIAN_ROUNDINGS = 16.0
"""Eigenvalues of a loss Hessian up to this many of its roundings count as zero."""

PRODUCT_ENTRIES = 2**22
"""How many numbers the products with the Hessian that are taken at once may have."""


class Derivatives(NamedTuple):
    """A loss of all outputs, N times its gradient, and products with N times its Hessian."""

    value: Float[Tensor, ""]
    slopes: Float[Tensor, "n ..."]
    product: Callable[[Float[Tensor, "k n ..."]], Float[Tensor, "k n ..."]]


class Blocks(NamedTuple):
    """The blocks of a Hessian, at every position of a sample that interacts with no other."""

    axes: Sequence[int]  # of the outputs, which interact
    entries: Float[Tensor, "n p b b"]


def joint_expansion(loss: Callable[[Tensor], Tensor], outputs: Float[Tensor, "n ..."]) -> Expansion:
    """Return the expansions of all samples, every value that of the batch.

    Raises
    ------
    ValueError
        Where samples interact in the loss.
    """
    n, c = outputs.shape[0], outputs[0].numel()
    derivatives = derivatives_of(loss, outputs)
    size = torch.maximum(_size(derivatives.slopes), _size_at_origin(loss, outputs))
    axes, H = _blocks(derivatives, outputs, size)
    value = derivatives.value.double().expand(n)
    r = _by_position(derivatives.slopes, axes)
    # An eigenvalue within the rounding of its sample's Hessian is zero, as a flat direction must
    # be; one that is not finite is left for the check of the whole expansion.
    size = torch.maximum(size, _size(H))[:, None, None]
    rounding = HESSIAN_ROUNDINGS * torch.finfo(H.dtype).eps * c * size
    finite = H.isfinite().all(-1).all(-1, keepdim=True)
    if not axes:  # no outputs interact, so that L = I
        h = torch.where(H[..., 0].abs() <= rounding, 0, H[..., 0]).double()
        identity = torch.eye(c, dtype=h.dtype, device=h.device)
        z = r.double().reshape(n, c)
        return spanned(value, identity.expand(n, c, c), z, h.reshape(n, c))
    # H = Q diag(h) Qᵀ at every position; then L = Q and z = Qᵀr.
    h, Q = torch.linalg.eigh(H.nan_to_num(0, 0, 0))
    h = torch.where(finite, torch.where(h.abs() <= rounding, 0, h), torch.nan)
    z = torch.einsum("npbm,npb->npm", Q, r)
    basis = _in_order_of_outputs(Q, axes, outputs.shape)
    return spanned(value, basis.double(), z.double().flatten(1), h.double().flatten(1))


def derivatives_of(
    loss: Callable[[Tensor], Tensor], outputs: Float[Tensor, "n ..."]
) -> Derivatives:
    """Differentiate a loss, and its gradient once more by reverse mode: ∇²L is symmetric."""
    n = outputs.shape[0]
    gradient, pullback, value = linear_map(grad_and_value(loss), outputs)

    def product(vectors: Float[Tensor, "k n ..."]) -> Float[Tensor, "k n ..."]:
        size = max(1, PRODUCT_ENTRIES // max(1, outputs.numel()))
        parts = [vectors[chunk] for chunk in chunks(vectors.shape[0], size)]
        products: Tensor = n * torch.cat([pullback(part)[0] for part in parts])
        return products

    return Derivatives(value, n * gradient, product)


def _blocks(
    derivatives: Derivatives, outputs: Float[Tensor, "n ..."], size: Float[Tensor, " n"]
) -> Blocks:
    """Return the smallest blocks that are all there is of the Hessian."""
    probe = ramp(outputs)
    image = derivatives.product(probe[None])[0]
    eps, c = torch.finfo(outputs.dtype).eps, outputs[0].numel()
    *smaller, all_axes = _interacting_axes(outputs.ndim)
    if torch.compiler.is_compiling():  # which cannot choose by values
        smaller = []
    for axes in (*smaller, all_axes):
        H = _blocks_over(derivatives, outputs, axes)
        products = torch.einsum("npbm,npm->npb", H, _by_position(probe, axes))
        distance = _size(products - _by_position(image, axes))
        # Blocks that are too small must not lose a digit; what is left of the largest may be what
        # another sample's rounding leaves.
        largest = torch.maximum(size, _size(H))
        rounding = HESSIAN_ROUNDINGS * eps * c * largest
        if axes == all_axes:
            rounding = eps**0.5 * largest + rounding.amax()
        within = ~(distance > rounding)  # nan is left for the check of the whole expansion
        if torch.compiler.is_compiling():  # but raises when it runs
            torch._assert_async(within.all(), interaction_message())
        if not any_known(~within):
            return Blocks(axes, H)
    raise BadValue(interaction_message())


def _interacting_axes(ndim: int) -> list[Sequence[int]]:
    """Return sets of axes along which outputs may interact: none, the last, any other, all."""
    single = [(axis,) for axis in (ndim - 1, *range(1, ndim - 1))] if ndim > 2 else []
    return [(), *single, tuple(range(1, ndim))] if ndim > 1 else [()]


def _blocks_over(
    derivatives: Derivatives, outputs: Float[Tensor, "n ..."], axes: Sequence[int]
) -> Float[Tensor, "n p b b"]:
    """Return the blocks over some axes, from as many products as a block has columns."""
    shape = [outputs.shape[axis] if axis in axes else 1 for axis in range(outputs.ndim)]
    b = torch.Size(shape).numel()
    identity = torch.eye(b, dtype=outputs.dtype, device=outputs.device)
    columns = identity.reshape(b, *shape).expand(b, *outputs.shape)
    products = derivatives.product(columns).movedim(0, -1)
    return _by_position(products, [*axes, outputs.ndim]).reshape(outputs.shape[0], -1, b, b)


def _by_position(x: Shaped[Tensor, "n ..."], axes: Sequence[int]) -> Shaped[Tensor, "n p b"]:
    """Return numbers of all outputs by sample, position, and place along the axes of a block."""
    positions = [axis for axis in range(1, x.ndim) if axis not in axes]
    block = torch.Size([x.shape[axis] for axis in axes]).numel()
    return x.permute(0, *positions, *axes).reshape(x.shape[0], -1, block)


def _in_order_of_outputs(
    Q: Float[Tensor, "n p b m"], axes: Sequence[int], shape: torch.Size
) -> Float[Tensor, "n c p*m"]:
    """Return the columns of all positions as one matrix, its rows in the order of the outputs."""
    n, p, b, m = Q.shape
    identity = torch.eye(p, dtype=Q.dtype, device=Q.device)[:, None, :, None]
    columns = (Q[:, :, :, None] * identity).reshape(n, p * b, p * m)
    # Rows by position and block; the inverse permutation sorts them.
    order = _by_position(torch.arange(p * b, device=Q.device).reshape(1, *shape[1:]), axes)
    return columns[:, order.flatten().argsort()]


def _size(x: Float[Tensor, "n ..."]) -> Float[Tensor, " n"]:
    """Return every sample's largest entry."""
    return x.reshape(x.shape[0], -1).abs().amax(1)


def _size_at_origin(
    loss: Callable[[Tensor], Tensor], outputs: Float[Tensor, "n ..."]
) -> Float[Tensor, " n"]:
    """Return the size of every sample's curvature at outputs of 0, where no net is certain.

    It counts up to 1 a sample, and for nothing where the loss does not take such outputs.
    """
    n, origin = outputs.shape[0], torch.zeros_like(outputs)
    try:
        image = derivatives_of(loss, origin).product(ramp(origin)[None])[0]
    except torch.OutOfMemoryError:
        raise
    except Exception as reason:  # noqa: BLE001 - the user's loss may refuse a 0
        logger.info("the loss has no curvature at the origin: %s", reason)
        return origin.reshape(n, -1)[:, 0]
    return _size(image.nan_to_num(0, 0, 0)).clamp(max=n)


def interaction_message() -> str:
    """Return the message for a loss in which samples interact."""
    rule = "criterion must have a Hessian without entries between samples"
    remedy = (
        "A sum of one loss a sample works, whatever it is divided by: for tokens CrossEntropyLoss "
        "with the classes on axis 1 and ignore_index, weights in y. A root or a logarithm of such "
        "a sum does not, nor do products of samples."
    )
    return sentence(rule, "a criterion in which samples interact", remedy)
