r"""How a weight acts in an operation: one rule an operation.

Where a weight W multiplies what goes in, its Jacobian columns are sums of outer products, over
positions t, of what goes in, a, and what is pulled back to what comes out, b:

    y_t = W a_t,        column = Σ_t b_t ⊗ a_t.

A rule says, for one operation and one of its operands, how to read a and b off the tensors and
which parameters the outer product belongs to. A further operation is one more function here. It
is a rule where a is one tensor; where a is made of two, as of a bilinear layer, it is a
decomposition into operations that have rules. Groups g are products side by side, as in a grouped
convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Int, Num
from torch import Tensor
from torch.fx import Node

aten = torch.ops.aten

SHAPE = "shape"
"""Where a node's metadata hold the shape of its result for one sample."""


class Use(NamedTuple):
    """One use of some parameters, read for n samples and m pulled-back columns at once.

    ``inputs`` may give integers [n g t] in place of a: each the position of the one in a row that
    is zero elsewhere, or −1 for a row of zeros. Without an ``other`` operand a is 1 throughout,
    and ``inputs`` takes any tensor of the batch.
    """

    node: Node
    other: Node | None
    entries: Int[Tensor, "g o p"]
    inputs: Callable[[Num[Tensor, "n ..."]], Num[Tensor, "n g t ..."]]
    outputs: Callable[[Num[Tensor, "n m ..."]], Num[Tensor, "n m g o t"]]


Rule: TypeAlias = Callable[[Node, int, Tensor], Use | None]
"""From a node, the position of the weight among its operands and the parameters that the weight's
entries are, to a use; None where the rule is no help."""

RULES: dict[Any, Rule] = {}

DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {}
"""What operations are replaced by in the trace of a model, in torch's own terms."""


def rule(target: Any) -> Callable[[Rule], Rule]:
    """Register a function as the rule of an operation."""

    def register(function: Rule) -> Rule:
        RULES[target] = function
        return function

    return register


def decomposition(target: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function that computes what an operation does, by operations that have rules."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        DECOMPOSITIONS[target] = function
        return function

    return register


@rule(aten.mm.default)
def matrix(node: Node, operand: int, index: Int[Tensor, "_ _"]) -> Use | None:
    """Y = A W, or y = W A."""
    return _matrix(node, node.args[1 - operand], operand, index)


@rule(aten.addmm.default)
def shifted_matrix(node: Node, operand: int, index: Int[Tensor, "..."]) -> Use | None:
    """Y = shift + A W, or y = shift + W A."""
    if node.kwargs:
        return None
    if operand == 0:
        return added(node, operand, index)
    return _matrix(node, node.args[3 - operand], operand - 1, index)


def _matrix(node: Node, other: Any, operand: int, index: Int[Tensor, "_ _"]) -> Use:
    if operand == 1:
        return Use(node, other, index.T[None], lambda x: x[:, None], lambda b: b[:, :, None].mT)
    return Use(node, other, index[None], lambda x: x[:, None].mT, lambda b: b[:, :, None])


@rule(aten.bmm.default)
def matrices(node: Node, operand: int, index: Int[Tensor, "_ _ _"]) -> Use | None:
    """y_g = A_g W_g, or y_g = W_g A_g; where all W_g are one, the products are its positions."""
    other: Any = node.args[1 - operand]
    if not bool((index == index[:1]).all()):
        if operand == 1:
            return Use(node, other, index.mT, lambda x: x, lambda b: b.mT)
        return Use(node, other, index, lambda x: x.mT, lambda b: b)
    if operand == 1:
        return Use(
            node,
            other,
            index[:1].mT,
            lambda x: x.flatten(1, 2)[:, None],
            lambda b: b.flatten(2, 3)[:, :, None].mT,
        )
    return Use(
        node,
        other,
        index[:1],
        lambda x: x.mT.flatten(1, 2)[:, None],
        lambda b: b.transpose(2, 3).flatten(3, 4)[:, :, None],
    )


@decomposition(aten._trilinear.default)
def bilinear(x: Tensor, W: Tensor, z: Tensor, *axes: Any) -> Any:
    """Y_o = Σ_ij x_i W_oij z_j, of a bilinear layer: a product of W and the numbers x_i z_j."""
    if axes[:4] != ([1, 3], [0], [1, 2], [2, 3]):  # one of its derivatives, which is no layer
        return NotImplemented
    return (x[:, :, None] * z[:, None, :]).flatten(1) @ W.flatten(1).T


@rule(aten.mv.default)
def matrix_vector(node: Node, operand: int, index: Int[Tensor, "..."]) -> Use | None:
    """Y = W x, or y = X w."""
    other: Any = node.args[1 - operand]
    if operand == 0:
        return Use(
            node, other, index[None], lambda x: x[:, None, None], lambda b: b[:, :, None, :, None]
        )
    return Use(node, other, index[None, None], lambda x: x[:, None], lambda b: b[:, :, None, None])


@rule(aten.dot.default)
def inner_product(node: Node, operand: int, index: Int[Tensor, "_"]) -> Use | None:
    """Y = wᵀx."""
    other: Any = node.args[1 - operand]
    return Use(
        node,
        other,
        index[None, None],
        lambda x: x[:, None, None],
        lambda b: b[:, :, None, None, None],
    )


@rule(aten.add.Tensor)
def added(node: Node, operand: int, index: Int[Tensor, "..."]) -> Use | None:
    """Y = x + w, with w repeated along the axes that it lacks or has of length one."""
    if node.kwargs:
        return None
    shape = node.meta[SHAPE]
    aligned = (1,) * (len(shape) - index.ndim) + tuple(index.shape)
    return _shift(node, index, [axis for axis, size in enumerate(aligned) if size == shape[axis]])


def _shift(node: Node, index: Int[Tensor, "..."], kept: Sequence[int]) -> Use:
    """Return the use of a shift that runs along some axes of the result: a = 1."""
    shape = node.meta[SHAPE]
    rest = [axis for axis in range(len(shape)) if axis not in kept]
    order = [0, 1, *(2 + axis for axis in (*kept, *rest))]
    positions = torch.Size([shape[axis] for axis in rest]).numel()

    def inputs(x: Tensor) -> Tensor:
        return x.new_ones(()).expand(x.shape[0], 1, positions, 1)

    def outputs(b: Tensor) -> Tensor:
        return b.permute(order).reshape(*b.shape[:2], 1, -1, positions)

    return Use(node, None, index.reshape(1, -1, 1), inputs, outputs)


@rule(aten.embedding.default)
def embedding(node: Node, operand: int, index: Int[Tensor, "_ _"]) -> Use | None:
    """y_t = row number x_t of W, whose padding row does not learn."""
    arguments: Any = node.args
    _, other, *options = arguments
    padding = options[0] if options else -1
    if operand != 0 or any(options[1:2]) or node.kwargs:  # scaled by frequency
        return None

    def inputs(x: Tensor) -> Tensor:
        return torch.where(x == padding, -1, x).reshape(x.shape[0], 1, -1)

    def outputs(b: Tensor) -> Tensor:
        return b.reshape(*b.shape[:2], 1, -1, b.shape[-1]).mT

    return Use(node, other, index.T[None], inputs, outputs)


@rule(aten.convolution.default)
def convolution(node: Node, operand: int, index: Int[Tensor, "..."]) -> Use | None:
    """Y = W ∗ x, of any number of axes and with any options: a holds the patches under the kernel.

    Transposed, y and x change places, and the patches are b's.
    """
    arguments: Any = node.args
    x, _, _, stride, padding, dilation, transposed, _, groups = arguments
    if operand == 0:
        return None
    if operand == 2:
        return _shift(node, index, [1])
    small: Node = x if transposed else node
    axes = index.ndim - 2
    windows = _Windows(
        stride=_each(stride, axes),
        padding=_each(padding, axes),
        dilation=_each(dilation, axes),
        kernel=index.shape[2:],
        counts=small.meta[SHAPE][2:],
        groups=groups,
    )
    index = index.unflatten(0, (groups, -1)).flatten(
        3
    )  # [g o c kernel] or, transposed, [g p c kernel]
    if transposed:
        return Use(
            node,
            x,
            index.flatten(2).mT,
            lambda x: _pixels(x, windows).mT,
            lambda b: _patches(b, windows).mT,
        )
    return Use(
        node,
        x,
        index.flatten(2),
        lambda x: _patches(x, windows),
        lambda b: _pixels(b, windows),
    )


class _Windows(NamedTuple):
    """Where the kernel of a convolution lies, one entry an axis of space."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    kernel: Sequence[int]
    counts: Sequence[int]
    groups: int


def _each(option: Sequence[int], axes: int) -> Sequence[int]:
    return list(option) * (axes if len(option) == 1 else 1)


def _pixels(x: Num[Tensor, "..."], windows: _Windows) -> Num[Tensor, "... g c t"]:
    """Return the values [... batch channels *space] of every channel, in groups."""
    channels = x.ndim - len(windows.kernel) - 1
    x = x.unflatten(channels, (windows.groups, -1))
    return x.movedim(channels - 1, channels + 1).flatten(channels + 1)


def _patches(x: Num[Tensor, "..."], windows: _Windows) -> Num[Tensor, "... g t p"]:
    """Return what the kernel sees of [... batch channels *space] at each of its places."""
    axes = len(windows.kernel)
    batch = x.ndim - axes - 2
    x = F.pad(x, [width for p in reversed(windows.padding) for width in (p, p)])
    for i in range(axes):
        gap, axis = windows.dilation[i], batch + 2 + i
        x = x.unfold(axis, (windows.kernel[i] - 1) * gap + 1, windows.stride[i])[..., ::gap]
        x = x.narrow(axis, 0, windows.counts[i])
    x = x.unflatten(batch + 1, (windows.groups, -1))  # [... batch g c *space *kernel]
    front = list(range(batch))
    space = [batch + 3 + i for i in range(axes)]
    kernel = [batch + 3 + axes + i for i in range(axes)]
    x = x.permute(*front, batch + 1, batch, *space, batch + 2, *kernel)
    return x.flatten(batch + 2 + axes).flatten(batch + 1, batch + 1 + axes)
