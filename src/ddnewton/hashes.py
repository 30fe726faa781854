"""Numbers that tell one tensor from another, bit by bit."""

from __future__ import annotations

import torch
from jaxtyping import UInt8
from torch import Tensor

MULTIPLIER = 0x9E3779B1
"""An odd number, the golden ratio times 2³²: neighbouring multiples of it differ in most bits."""


def hashed(leaf: Tensor) -> int:
    """Return a hash of the bytes of a tensor: multiples of them, summed modulo 2⁶⁴."""
    octets = octets_of(leaf)
    # As many as there are whole words of, and what is left of them.
    whole = octets.numel() // 8 * 8
    words = [octets[:whole].clone().view(torch.int64), octets[whole:].long()]
    total = torch.zeros((), dtype=torch.int64, device=leaf.device)
    for part in words:
        # Odd factors, no two the same; upper bits, which products push out, count below as well.
        factors = torch.arange(part.numel(), device=leaf.device).mul_(2 * MULTIPLIER).add_(1)
        total = total * MULTIPLIER + factors.mul_(part ^ (part >> 29)).sum()
    return int(total)


def octets_of(leaf: Tensor) -> UInt8[Tensor, " _"]:
    """Return the bytes of a tensor, in the order of its entries."""
    leaf = leaf.detach()
    leaf = leaf if leaf.layout == torch.strided else leaf.to_dense()
    return leaf.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
