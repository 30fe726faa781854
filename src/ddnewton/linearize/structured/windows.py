"""What a convolution multiplies: the pixels of an image, and the patches under its kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Num
from torch import Tensor


class Windows(NamedTuple):
    """The places at which the kernel of a convolution lies; one number an axis of space."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    kernel: Sequence[int]
    counts: Sequence[int]  # of windows
    groups: int


def per_axis(option: Sequence[int], axes: int) -> Sequence[int]:
    """Return an option of a convolution, written once for all axes perhaps, for every axis."""
    return list(option) * (axes if len(option) == 1 else 1)


def pixels(x: Num[Tensor, "..."], windows: Windows) -> Num[Tensor, "... g c t"]:
    """Return the values [... batch channels *space] of every channel, in groups."""
    channels = x.ndim - len(windows.kernel) - 1
    x = x.unflatten(channels, (windows.groups, -1))
    return x.movedim(channels - 1, channels + 1).flatten(channels + 1)


def patches(x: Num[Tensor, "..."], windows: Windows) -> Num[Tensor, "... g t p"]:
    """Return the patch of [... batch channels *space] under the kernel at each of its places."""
    # Pad, and cut into windows along every axis of space, gaps of a dilation left out.
    axes = len(windows.kernel)
    batch = x.ndim - axes - 2
    x = F.pad(x, [width for p in reversed(windows.padding) for width in (p, p)])
    for i in range(axes):
        gap, axis = windows.dilation[i], batch + 2 + i
        x = x.unfold(axis, (windows.kernel[i] - 1) * gap + 1, windows.stride[i])[..., ::gap]
        x = x.narrow(axis, 0, windows.counts[i])
    # Put the axes in the order of groups, entries p of a kernel, and positions t, so that rows of
    # pixels are copied as they lie in the image, in a third of the time of single pixels.
    x = x.unflatten(batch + 1, (windows.groups, -1))  # [... batch g c *space *kernel]
    front = list(range(batch))
    space = [batch + 3 + i for i in range(axes)]
    kernel = [batch + 3 + axes + i for i in range(axes)]
    x = x.permute(*front, batch + 1, batch + 2, *kernel, batch, *space)
    return x.flatten(batch + 2 + axes).flatten(batch + 1, batch + 1 + axes).mT
