"""Products of large float32 matrices on a CPU, by the library of torch that is fastest there.

torch multiplies float32 matrices by MKL, which makes no use of AVX-512 on processors that are not
Intel's: there oneDNN, by which torch computes convolutions, takes half the time, and small matrices
alone take longer. Its product is an operation of torch that knows neither derivatives nor
``vmap``, and only ``torch.compile`` calls it by itself.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad

from ddnewton.transforms import is_transformed

MULTIPLICATIONS = 2**21
"""From how many multiplications on a product counts as large."""


def is_large(left: Float[Tensor, "*n i d"], right: Float[Tensor, "*n j d"]) -> bool:
    """Return whether left rightᵀ is of large float32 matrices, and faster by oneDNN."""
    return (
        not is_transformed()
        and left.is_cpu
        and left.dtype == torch.float32
        and left.shape[-2] * right.shape[-2] * right.shape[-1] >= MULTIPLICATIONS
        and is_plain(left)
        and is_plain(right)
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor has no derivative, of either mode, and is no subclass."""
    tangent = forward_ad.unpack_dual(tensor).tangent if forward_ad._current_level >= 0 else None
    with_graph = tensor.requires_grad and torch.is_grad_enabled()
    return tangent is None and not with_graph and type(tensor) is Tensor


def product_of_rows(
    left: Float[Tensor, "i d"], right: Float[Tensor, "j d"]
) -> Float[Tensor, "i j"]:
    """Return left rightᵀ by whichever way is faster."""
    return _by_onednn(left, right) if is_large(left, right) else left @ right.mT


def product_by_sample(
    left: Float[Tensor, "n i d"], right: Float[Tensor, "n d j"]
) -> Float[Tensor, "n i j"]:
    """Return left right of every sample, large ones one by one."""
    if not is_large(left, right.mT):
        return left @ right
    products = left.new_empty(*left.shape[:2], right.shape[2])
    for sample, rows in enumerate(left):
        products[sample] = _by_onednn(rows, right[sample].mT)
    return products


def _by_onednn(left: Float[Tensor, "i d"], right: Float[Tensor, "j d"]) -> Float[Tensor, "i j"]:
    """Return left rightᵀ."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return product
