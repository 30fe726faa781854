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


def is_large(like: Tensor, multiplications: int) -> bool:
    """Return whether a product of float32 matrices like one of them is faster by oneDNN."""
    return (
        multiplications >= MULTIPLICATIONS
        and like.is_cpu
        and like.dtype == torch.float32
        and not is_transformed()
        and is_plain(like)
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor has no derivative, of either mode, and is no subclass."""
    tangent = forward_ad.unpack_dual(tensor).tangent if forward_ad._current_level >= 0 else None
    with_graph = tensor.requires_grad and torch.is_grad_enabled()
    return tangent is None and not with_graph and type(tensor) is Tensor


def large_product(left: Float[Tensor, "i d"], right: Float[Tensor, "j d"]) -> Float[Tensor, "i j"]:
    """Return left rightᵀ of two large matrices."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return product


def product_of_rows(
    left: Float[Tensor, "i d"], right: Float[Tensor, "j d"]
) -> Float[Tensor, "i j"]:
    """Return left rightᵀ by whichever way is faster."""
    if is_large(left, left.shape[0] * right.numel()) and is_plain(right):
        return large_product(left, right)
    return left @ right.mT


def product_by_sample(
    left: Float[Tensor, "n i d"], right: Float[Tensor, "n d j"]
) -> Float[Tensor, "n i j"]:
    """Return left right of every sample, large ones one by one."""
    n, i, _ = left.shape
    if not (is_large(left, i * right[0].numel()) and is_plain(right)) if n else True:
        return left @ right
    products = left.new_empty(n, i, right.shape[2])
    for sample in range(n):
        products[sample] = large_product(left[sample], right[sample].mT)
    return products
