r"""How a weight acts in an operation: one rule an operation.

Where a weight W multiplies what goes in, its Jacobian columns are sums of outer products, over
positions t, of what goes in, a, and what is pulled back to what comes out, b:

    y_t = W a_t,        column = Σ_t b_t ⊗ a_t.

A rule says, for one operation and one of its operands, how to read a and b off the tensors and
which parameters the outer product belongs to. Groups g are products side by side, as in a grouped
convolution. A further operation is one more function here: a rule, if a is read off one tensor; if
it is made of two, as in a bilinear layer, a decomposition into operations that have rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Num
from torch import Tensor
from torch.fx import Node

from ddnewton.linearize.structured.windows import Windows, patches, per_axis, pixels

aten = torch.ops.aten

SHAPE = "shape"
"""Where a node's metadata hold the shape of its result for one sample."""

DTYPE = "dtype"
"""Where they hold its dtype."""


class Use(NamedTuple):
    """One use of a weight: where a and b are found, and how they are read off the tensors there.

    ``read_a`` takes the source for n samples, ``read_b`` the cotangents of the node for n samples
    and m columns. ``read_a`` may return integers [n g t] in place of a: each the place of the one
    in a row that is zero elsewhere, or −1 for a row of zeros. Without a source a is 1 throughout,
    and ``read_a`` takes any tensor of the batch.
    """

    node: Node
    source: Node | None
    indices: Num[Tensor, "g o p"]  # of the parameters that it consists of; complex ones are pairs
    read_a: Callable[[Num[Tensor, "n ..."]], Num[Tensor, "n g t ..."]]
    read_b: Callable[[Num[Tensor, "n m ..."]], Num[Tensor, "n m g o t"]]


Rule: TypeAlias = Callable[[Node, int, Tensor], Use | None]
"""``rule(node, operand, indices)`` returns the use of a weight by an operation, as its operand of
this number, made of the parameters with these indices; None if the rule does not apply."""

RULES: dict[Any, Rule] = {}

DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {}
"""Functions that replace operations in the trace of a model, as `make_fx` takes them."""


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
def matrix(node: Node, operand: int, indices: Num[Tensor, "_ _"]) -> Use | None:
    """Y = A W, or Y = W A."""
    return _matrix(node, node.args[1 - operand], operand, indices)


@rule(aten.addmm.default)
def shifted_matrix(node: Node, operand: int, indices: Num[Tensor, "..."]) -> Use | None:
    """Y = shift + A W, or Y = shift + W A."""
    if node.kwargs:
        return None
    if operand == 0:
        return added(node, operand, indices)
    return _matrix(node, node.args[3 - operand], operand - 1, indices)


def _matrix(node: Node, source: Any, operand: int, indices: Num[Tensor, "_ _"]) -> Use:
    """Return the use of a matrix whose positions are the rows of A, or its columns."""
    if operand == 1:
        return Use(node, source, indices.T[None], lambda x: x[:, None], lambda b: b[:, :, None].mT)
    return Use(node, source, indices[None], lambda x: x[:, None].mT, lambda b: b[:, :, None])


@rule(aten.bmm.default)
def matrices(node: Node, operand: int, indices: Num[Tensor, "_ _ _"]) -> Use | None:
    """Y_g = A_g W_g, or Y_g = W_g A_g."""
    source: Any = node.args[1 - operand]
    # Different W_g are groups side by side; of one W all rows of all A_g are the positions.
    if not bool((indices == indices[:1]).all()):
        if operand == 1:
            return Use(node, source, indices.mT, lambda x: x, lambda b: b.mT)
        return Use(node, source, indices, lambda x: x.mT, lambda b: b)
    if operand == 1:
        return Use(
            node,
            source,
            indices[:1].mT,
            lambda x: x.flatten(1, 2)[:, None],
            lambda b: b.flatten(2, 3)[:, :, None].mT,
        )
    return Use(
        node,
        source,
        indices[:1],
        lambda x: x.mT.flatten(1, 2)[:, None],
        lambda b: b.transpose(2, 3).flatten(3, 4)[:, :, None],
    )


@decomposition(aten._trilinear.default)
def bilinear(x: Tensor, W: Tensor, z: Tensor, *axes: Any) -> Any:
    """Y_o = Σ_ij x_i W_oij z_j, of a bilinear layer: a product of W and the numbers x_i z_j."""
    if axes[:4] != ([1, 3], [0], [1, 2], [2, 3]):  # one of its derivatives, which is no layer
        return NotImplemented
    return (x[:, :, None] * z[:, None, :]).flatten(1) @ W.flatten(1).T


@decomposition(aten._weight_norm_interface.default)
def weight_norm(v: Tensor, g: Tensor, axis: int = 0) -> tuple[Tensor, Tensor]:
    """W = g V/‖V‖ with norms along all axes but one, and these; torch cannot map its own."""
    axes = [i for i in range(v.ndim) if i != axis % v.ndim]
    norms = torch.linalg.vector_norm(v, dim=axes, keepdim=True)
    return v * (g / norms), norms


@rule(aten.mv.default)
def matrix_vector(node: Node, operand: int, indices: Num[Tensor, "..."]) -> Use | None:
    """Y = W x, or Y = X w."""
    source: Any = node.args[1 - operand]
    if operand == 0:
        return Use(
            node,
            source,
            indices[None],
            lambda x: x[:, None, None],
            lambda b: b[:, :, None, :, None],
        )
    return Use(
        node, source, indices[None, None], lambda x: x[:, None], lambda b: b[:, :, None, None]
    )


@rule(aten.dot.default)
def inner_product(node: Node, operand: int, indices: Num[Tensor, "_"]) -> Use | None:
    """Y = wᵀx."""
    source: Any = node.args[1 - operand]
    return Use(
        node,
        source,
        indices[None, None],
        lambda x: x[:, None, None],
        lambda b: b[:, :, None, None, None],
    )


@rule(aten.add.Tensor)
def added(node: Node, operand: int, indices: Num[Tensor, "..."]) -> Use | None:
    """Y = x + w, with w repeated along the axes that it lacks or has of length one."""
    if node.kwargs:
        return None
    shape = node.meta[SHAPE]
    aligned = (1,) * (len(shape) - indices.ndim) + tuple(indices.shape)
    return _shift(node, indices, [axis for axis, size in enumerate(aligned) if size == shape[axis]])


def _shift(node: Node, indices: Num[Tensor, "..."], shift_axes: Sequence[int]) -> Use:
    """Return the use of a shift: the axes along which it varies are o, the others positions."""
    shape = node.meta[SHAPE]
    position_axes = [axis for axis in range(len(shape)) if axis not in shift_axes]
    order = [0, 1, *(2 + axis for axis in (*shift_axes, *position_axes))]
    positions = torch.Size([shape[axis] for axis in position_axes]).numel()

    def read_a(x: Tensor) -> Tensor:
        return x.new_ones(()).expand(x.shape[0], 1, positions, 1)

    def read_b(b: Tensor) -> Tensor:
        return b.permute(order).reshape(*b.shape[:2], 1, -1, positions)

    return Use(node, None, indices.reshape(1, -1, 1), read_a, read_b)


@rule(aten.embedding.default)
def embedding(node: Node, operand: int, indices: Num[Tensor, "_ _"]) -> Use | None:
    """Y_t = row number x_t of W; the padding row has no derivative."""
    arguments: Any = node.args
    _, source, *options = arguments
    padding = options[0] if options else -1
    if operand != 0 or any(options[1:2]) or node.kwargs:  # scaled by frequency
        return None

    def read_a(x: Tensor) -> Tensor:
        return torch.where(x == padding, -1, x).reshape(x.shape[0], 1, -1)

    def read_b(b: Tensor) -> Tensor:
        return b.reshape(*b.shape[:2], 1, -1, b.shape[-1]).mT

    return Use(node, source, indices.T[None], read_a, read_b)


@rule(aten.convolution.default)
def convolution(node: Node, operand: int, indices: Num[Tensor, "..."]) -> Use | None:
    """Y = W ∗ x, along any number of axes and with any options; a is the patches under the kernel.

    Transposed, x and y change places, and the patches are of b.
    """
    arguments: Any = node.args
    x, _, _, stride, padding, dilation, transposed, _, groups = arguments
    if operand == 0:
        return None
    if operand == 2:
        return _shift(node, indices, [1])
    # There is one window of the kernel for every pixel of the result; transposed, of x.
    windowed: Node = x if transposed else node
    axes = indices.ndim - 2
    windows = Windows(
        stride=per_axis(stride, axes),
        padding=per_axis(padding, axes),
        dilation=per_axis(dilation, axes),
        kernel=indices.shape[2:],
        counts=windowed.meta[SHAPE][2:],
        groups=groups,
    )
    # In groups, [g o c kernel]; transposed, [g p c kernel].
    indices = indices.unflatten(0, (groups, -1)).flatten(3)
    if transposed:
        return Use(
            node,
            x,
            indices.flatten(2).mT,
            lambda x: pixels(x, windows).mT,
            lambda b: patches(b, windows).mT,
        )
    return Use(
        node,
        x,
        indices.flatten(2),
        lambda x: patches(x, windows),
        lambda b: pixels(b, windows),
    )
