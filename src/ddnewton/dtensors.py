"""Tensors that are distributed over a mesh of ranks, `torch.distributed.tensor.DTensor`.

Every rank makes the same call. What the caller has as DTensors are such inside the model and in
results alone; all between is plain, whole, and the same on every rank. Two linear maps lead from
one to the other: `placed_like` takes of a whole tensor what is this rank's, and communicates
nothing; `whole` gathers. Each is the other's adjoint, so that they can be differentiated any number
of times.

torch.distributed.tensor takes long to import: who has a DTensor has imported it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

Check: TypeAlias = Callable[[Tensor, Tensor], None]
"""A function that raises where a tensor of this rank is not the mean over all."""

ROOM = "torch.distributed.tensor"

FROM_LOCAL, TO_LOCAL = "_FromTorchTensorBackward", "_ToTorchTensorBackward"
"""The nodes of a graph for `DTensor.from_local`, and for `to_local` and `full_tensor`."""


def is_dtensor(leaf: object) -> bool:
    """Return whether a leaf is a DTensor."""
    return ROOM in sys.modules and isinstance(leaf, sys.modules[ROOM].DTensor)


def whole(leaf: Any) -> Any:
    """Return a DTensor as a plain tensor, whole on every rank; anything else as it is."""
    return _Whole.apply(leaf) if is_dtensor(leaf) else leaf  # type: ignore[no-untyped-call]


def placed_like(tensor: Tensor, leaf: Tensor) -> Tensor:
    """Return a whole tensor, the same on every rank, as a DTensor where a leaf is one.

    It may have further axes in front of those of the leaf.
    """
    if not is_dtensor(leaf):
        return tensor
    placements = _behind(tensor.ndim - leaf.ndim, leaf.placements)  # type: ignore[attr-defined]
    return _placed(tensor, leaf, placements)


def samples_placed_like(samples: Tensor, leaf: Tensor) -> Tensor:
    """Return some samples, whole on every rank, as a DTensor where the leaf of a batch is one.

    They are replicated along axis 0 where its ranks do not divide their number.
    """
    if not is_dtensor(leaf):
        return samples
    # Over how many ranks axis 0 is sharded.
    placements, mesh = _behind(0, leaf.placements), leaf.device_mesh  # type: ignore[attr-defined]
    axes = [i for i, placement in enumerate(placements) if placement.is_shard(0)]
    if len(samples) % math.prod(mesh.size(i) for i in axes):
        for i in axes:
            placements[i] = _replicate()
    return _placed(samples, leaf, placements)


def among_dtensors(tensor: Tensor, leaf: Any, check: Check) -> Tensor:
    """Return a plain tensor with a gradient that is plain, and the same on all ranks of a leaf."""
    arguments = tensor, leaf.device_mesh, check
    plain: Tensor = _Plain.apply(*arguments)  # type: ignore[no-untyped-call]
    return plain


def agreed(tensor: Tensor, leaf: Any, check: Check) -> Tensor:
    """Return a tensor whole, and the same on all ranks of a leaf.

    A plain one is the mean over these, which differ by their rounding; ``check`` gets that of this
    rank, and the mean.
    """
    return _agreed(tensor, leaf.device_mesh, check)


def rows_of_ranks(row: Int[Tensor, " k"], leaf: Any) -> Int[Tensor, "r k"]:
    """Return the row of every rank of a leaf, on all of them."""
    mesh, module = leaf.device_mesh, sys.modules[ROOM]
    local = row[None].to(mesh.device_type)
    rows = module.DTensor.from_local(local, mesh, [module.Shard(0)] * mesh.ndim)
    gathered: Tensor = rows.full_tensor()
    return gathered


@contextmanager
def mixing() -> Iterator[None]:
    """Take plain tensors that meet DTensors as the same on every rank, here and in gradients."""
    experimental = import_module(f"{ROOM}.experimental")
    # The end of an inner context of torch would be that of the outer one.
    if experimental.DTensor._op_dispatcher._allow_implicit_replication:
        yield
        return
    with experimental.implicit_replication():
        yield


def twice_differentiable(outputs: Tensor) -> Tensor:
    """Return outputs, in the graph of which from and to plain tensors lead two derivatives.

    In the gradient of `DTensor.from_local` torch moves numbers between ranks in a way that has no
    derivative of its own, and counts as constant, silently. Moved before they get there, they are
    differentiated. And `to_local` and `full_tensor` expect gradients that are plain, where a plain
    tensor that has met a DTensor has one that is none.
    """
    # Every node of the graph, once.
    nodes, visited = [outputs.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        nodes += [further for further, _ in node.next_functions]
        # What its gradients have to be before they get there.
        if node.name() == FROM_LOCAL:
            node.register_prehook(partial(_moved, node))
        elif node.name() == TO_LOCAL:
            node.register_prehook(lambda gradients: tuple(map(whole, gradients)))
    return outputs


def _moved(node: Any, gradients: Sequence[Any]) -> tuple[Any, ...]:
    """Return the gradients of a node as they are placed after it."""
    placements = node.grad_placements
    if placements is None:
        placements = _behind(0, node.forward_input_placements)
    return tuple(g if g is None else g.redistribute(placements=placements) for g in gradients)


def _replicate() -> Any:
    """Return the placement of what is whole on every rank."""
    return sys.modules[ROOM].Replicate()


def _behind(axes: int, placements: Sequence[Any]) -> list[Any]:
    """Return placements behind further axes; pending sums become whole."""
    return [_replicate() if p.is_partial() else _one_behind(axes, p) for p in placements]


def _one_behind(axes: int, placement: Any) -> Any:
    """Return a placement behind further axes."""
    if not axes or placement.is_replicate():
        return placement
    options = {} if placement.is_shard() else {"split_factor": placement.split_factor}
    return type(placement)(placement.dim + axes, **options)


def _placed(tensor: Tensor, leaf: Any, placements: Sequence[Any]) -> Tensor:
    """Return a whole tensor as a DTensor on the mesh of a leaf."""
    mesh = leaf.device_mesh
    placed: Tensor = _Placed.apply(tensor, mesh, placements)  # type: ignore[no-untyped-call]
    return placed


class _Whole(torch.autograd.Function):
    """From a DTensor to the whole tensor."""

    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Tensor:
        ctx.mesh, ctx.placements = tensor.device_mesh, _behind(0, tensor.placements)
        gathered: Tensor = tensor.full_tensor()
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        arguments = whole(gradient), ctx.mesh, ctx.placements
        placed: Tensor = _Placed.apply(*arguments)  # type: ignore[no-untyped-call]
        return placed


class _Placed(torch.autograd.Function):
    """From a whole tensor, the same on every rank, to a DTensor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mesh: Any, placements: Sequence[Any]) -> Tensor:
        placed: Tensor = sys.modules[ROOM].distribute_tensor(
            tensor.detach(), mesh, placements, src_data_rank=None
        )
        return placed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return whole(gradient), None, None


class _Plain(torch.autograd.Function):
    """From a plain tensor to the same one, with a gradient that is the same on all ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mesh: Any, check: Check) -> Tensor:
        ctx.mesh, ctx.check = mesh, check
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _agreed(gradient, ctx.mesh, ctx.check), None, None


class _Mean(torch.autograd.Function):
    """From tensors that are the same on all ranks, up to rounding, to their mean."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mesh: Any, check: Check) -> Tensor:
        ctx.mesh, ctx.check, module = mesh, check, sys.modules[ROOM]
        part, sums = tensor.detach().contiguous() / mesh.size(), [module.Partial()] * mesh.ndim
        mean: Tensor = module.DTensor.from_local(part, mesh, sums).full_tensor()
        check(tensor, mean)
        return mean

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _agreed(gradient, ctx.mesh, ctx.check), None, None


def _agreed(tensor: Tensor, mesh: Any, check: Check) -> Tensor:
    """Return a DTensor whole, and of plain tensors the mean over the ranks."""
    if is_dtensor(tensor):
        return whole(tensor)  # type: ignore[no-any-return]
    mean: Tensor = _Mean.apply(tensor, mesh, check)  # type: ignore[no-untyped-call]
    return mean
