"""Numbers as tensors without axes, made where they are needed."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def scalar_like(
    number: float | Tensor, like: Tensor, dtype: torch.dtype | None = None
) -> Float[Tensor, "..."]:
    """Return a number on the device of a tensor, in its dtype or another.

    `torch.as_tensor` would make it on the host first: on a GPU a copy that waits for what is under
    way, and that no CUDA graph can hold.
    """
    if isinstance(number, Tensor):
        return number.to(like.device, dtype or like.dtype)
    return torch.full((), number, dtype=dtype or like.dtype, device=like.device)
