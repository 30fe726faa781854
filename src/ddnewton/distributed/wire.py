"""Trees of tensors on their way between ranks.

A tree goes in two parts: itself, with what is told of its tensors in their places, and then the
tensors, one by one. They travel on the host, or on the device where the group has a backend there.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ddnewton.trees import tree_leaves, tree_map
from ddnewton.types import PyTree


@dataclass(frozen=True)  # a leaf of a tree, as a NamedTuple would not be
class Announced:
    """What a rank is told of a tensor before it arrives."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    at_home: bool  # whether it is where the parameters are, or else on the host

    @property
    def count(self) -> int:
        """The number of entries."""
        return torch.Size(self.shape).numel()


class Wire(NamedTuple):
    """A process group, where its tensors travel, and where the parameters of this rank are.

    ``traffic`` counts the bytes of the tensors that this rank has sent, by what they were.
    """

    group: dist.ProcessGroup
    device: torch.device
    home: torch.device
    traffic: Counter[str]


def wire_of(group: dist.ProcessGroup, home: torch.device) -> Wire:
    """Return the wire of a group: on the device where it has a backend for that."""
    on_device = home.type != "cpu" and "nccl" in str(dist.get_backend(group))
    return Wire(group, home if on_device else torch.device("cpu"), home, Counter())


def broadcast(wire: Wire, tree: PyTree, source: int, kind: str) -> PyTree:
    """Return the tree of one rank on all ranks."""
    sends = dist.get_rank(wire.group) == source
    message: list[Any] = [_announcement(wire, tree) if sends else None]
    dist.broadcast_object_list(message, group_src=source, group=wire.group)
    tensors = _tensors(tree) if sends else _memory(wire, message[0])
    on_wire = [_on_wire(wire, tensor) for tensor in tensors]
    for tensor in on_wire:
        dist.broadcast(tensor, group_src=source, group=wire.group)
        if sends:
            wire.traffic[kind] += tensor.nbytes
    return tree if sends else _arrived(wire, message[0], on_wire)


def send(wire: Wire, tree: PyTree, rank: int, kind: str) -> None:
    """Send a tree to a rank that is to `receive` it."""
    dist.send_object_list([_announcement(wire, tree)], group_dst=rank, group=wire.group)
    for tensor in _tensors(tree):
        dist.send(_on_wire(wire, tensor), group_dst=rank, group=wire.group)
        wire.traffic[kind] += tensor.nbytes


def receive(wire: Wire, rank: int) -> PyTree:
    """Return a tree that a rank is to `send`."""
    message: list[Any] = [None]
    dist.recv_object_list(message, group_src=rank, group=wire.group)
    tensors = _memory(wire, message[0])
    for tensor in tensors:
        dist.recv(tensor, group_src=rank, group=wire.group)
    return _arrived(wire, message[0], tensors)


def swap(wire: Wire, tree: PyTree, to: int | None, source: int | None, kind: str) -> PyTree:
    """Send a tree to a rank, and return one from a rank; None stands for no rank, and no tree."""
    # What is announced, as bytes, whose number goes ahead.
    message = bytearray(pickle.dumps(_announcement(wire, tree)))
    outgoing = [torch.frombuffer(message, dtype=torch.uint8).to(wire.device)]
    length = torch.tensor([len(message)], device=wire.device)
    (count,) = _both(wire, [length], to, source, [torch.zeros_like(length)])
    incoming = [torch.empty(int(count), dtype=torch.uint8, device=wire.device)]
    (received,) = _both(wire, outgoing, to, source, incoming)
    announced = None if source is None else pickle.loads(received.cpu().numpy().tobytes())
    # The tensors themselves.
    outgoing = [_on_wire(wire, tensor) for tensor in _tensors(tree)]
    if to is not None:
        wire.traffic[kind] += sum(tensor.nbytes for tensor in outgoing)
    tensors = _both(wire, outgoing, to, source, _memory(wire, announced))
    return _arrived(wire, announced, tensors)


def _both(
    wire: Wire,
    outgoing: Sequence[Tensor],
    to: int | None,
    source: int | None,
    incoming: Sequence[Tensor],
) -> Sequence[Tensor]:
    """Send tensors to a rank, while others arrive from one in the memory that is for them."""
    group = wire.group
    operations = []
    if to is not None:
        operations += [dist.P2POp(dist.isend, x, group=group, group_peer=to) for x in outgoing]
    if source is not None:
        operations += [dist.P2POp(dist.irecv, x, group=group, group_peer=source) for x in incoming]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    return incoming


def _announcement(wire: Wire, tree: PyTree) -> PyTree:
    """Return a tree with what is told of its tensors in their places."""
    return tree_map(
        lambda x: (
            Announced(tuple(x.shape), x.dtype, x.device == wire.home)
            if isinstance(x, Tensor)
            else x
        ),
        tree,
    )


def _tensors(tree: PyTree) -> list[Tensor]:
    """Return the tensors of a tree that have entries."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.numel()]


def _on_wire(wire: Wire, tensor: Tensor) -> Tensor:
    """Return a tensor as it travels."""
    return tensor.detach().to(wire.device).contiguous()


def _memory(wire: Wire, announced: PyTree) -> list[Tensor]:
    """Return the memory that the tensors of a tree arrive in."""
    expected = [x for x in tree_leaves(announced) if isinstance(x, Announced) and x.count]
    return [torch.empty(x.shape, dtype=x.dtype, device=wire.device) for x in expected]


def _arrived(wire: Wire, announced: PyTree, tensors: Sequence[Tensor]) -> PyTree:
    """Return a tree whose tensors have arrived, where they belong."""
    arrived: Iterator[Tensor] = iter(tensors)

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, Announced):
            return leaf
        empty = torch.empty(leaf.shape, dtype=leaf.dtype, device=wire.device)
        tensor = next(arrived) if leaf.count else empty
        return tensor.to(wire.home if leaf.at_home else "cpu")

    return tree_map(placed, announced)
