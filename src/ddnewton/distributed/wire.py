"""Trees of tensors on their way between ranks.

A tree goes in two parts: itself, with what is told of its tensors in their places, and then those
that are not small, one by one. They travel on the host, or on the device where the group has a
backend there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ddnewton.distributed.packets import (
    arriving,
    empty_packet,
    exchanged_messages,
    message_of,
    missing_packets,
    packets_of,
)
from ddnewton.hashes import octets_of
from ddnewton.trees import tree_leaves, tree_map
from ddnewton.types import PyTree

TOLD_BYTES = 2**12
"""Up to how many bytes a tensor is a part of what is told of its tree."""


@dataclass(frozen=True)  # a leaf of a tree, as a NamedTuple would not be
class Announced:
    """What a rank is told of a tensor before it arrives."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    at_home: bool  # whether it is where the parameters are, or else on the host
    octets: bytes | None  # of a small one, which then does not travel by itself


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


def exchange(wire: Wire, message: Any) -> list[Any]:
    """Return the messages of all ranks, which are small, on every rank."""
    return exchanged_messages(message, wire.group, wire.device)


def broadcast(wire: Wire, tree: PyTree, source: int, kind: str) -> PyTree:
    """Return the tree of one rank on all ranks."""
    # The same transfers on all ranks, from the memory of one to that of the others.
    sends = dist.get_rank(wire.group) == source
    to_all = partial(dist.broadcast, group_src=source, group=wire.group)
    if sends:
        outgoing = _on_wire(wire, tree, kind)
        for tensor in (*packets_of(_announcement(wire, tree), wire.device), *outgoing):
            to_all(tensor)
        return tree
    announced = arriving(to_all, wire.device)
    tensors = _memory(wire, announced)
    for tensor in tensors:
        to_all(tensor)
    return _arrived(wire, announced, tensors)


def send(wire: Wire, tree: PyTree, rank: int, kind: str) -> None:
    """Send a tree to a rank that is to `receive` it."""
    outgoing = _on_wire(wire, tree, kind)
    for tensor in (*packets_of(_announcement(wire, tree), wire.device), *outgoing):
        dist.send(tensor, group_dst=rank, group=wire.group)


def receive(wire: Wire, rank: int) -> PyTree:
    """Return a tree that a rank is to `send`."""
    from_rank = partial(dist.recv, group_src=rank, group=wire.group)
    announced = arriving(from_rank, wire.device)
    tensors = _memory(wire, announced)
    for tensor in tensors:
        from_rank(tensor)
    return _arrived(wire, announced, tensors)


def swap(wire: Wire, tree: PyTree, to: int | None, source: int | None, kind: str) -> PyTree:
    """Send a tree to a rank, and return one from a rank; None stands for no rank, and no tree."""
    # What is announced, in one packet or two, and then the tensors.
    first, *further = packets_of(_announcement(wire, tree), wire.device)
    packets = [*_both(wire, [first], to, source, [empty_packet(wire.device)])]
    packets += _both(wire, further, to, source, missing_packets(packets[0]))
    announced = None if source is None else message_of(packets)
    outgoing = [] if to is None else _on_wire(wire, tree, kind)
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
    """Return a tree with what is told of its tensors in their places, small ones altogether."""

    def announced(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        octets = octets_of(leaf).cpu().numpy().tobytes() if leaf.nbytes <= TOLD_BYTES else None
        return Announced(tuple(leaf.shape), leaf.dtype, leaf.device == wire.home, octets)

    return tree_map(announced, tree)


def _on_wire(wire: Wire, tree: PyTree, kind: str) -> list[Tensor]:
    """Return the tensors of a tree that travel by themselves, and count those of all."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    if count := sum(tensor.nbytes for tensor in tensors):
        wire.traffic[kind] += count
    large = [tensor for tensor in tensors if tensor.nbytes > TOLD_BYTES]
    return [tensor.detach().to(wire.device).contiguous() for tensor in large]


def _memory(wire: Wire, announced: PyTree) -> list[Tensor]:
    """Return the memory that the tensors of a tree arrive in."""
    expected = [leaf for leaf in tree_leaves(announced) if isinstance(leaf, Announced)]
    return [
        torch.empty(leaf.shape, dtype=leaf.dtype, device=wire.device)
        for leaf in expected
        if leaf.octets is None
    ]


def _arrived(wire: Wire, announced: PyTree, tensors: Sequence[Tensor]) -> PyTree:
    """Return a tree whose tensors have arrived, where they belong."""
    arrived: Iterator[Tensor] = iter(tensors)

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, Announced):
            return leaf
        tensor = next(arrived) if leaf.octets is None else _tensor_of(leaf, leaf.octets)
        return tensor.to(wire.home if leaf.at_home else "cpu")

    return tree_map(placed, announced)


def _tensor_of(announced: Announced, octets: bytes) -> Tensor:
    """Return a tensor whose bytes were told."""
    if not octets:
        return torch.empty(announced.shape, dtype=announced.dtype, device="cpu")
    return torch.frombuffer(bytearray(octets), dtype=announced.dtype).reshape(announced.shape)
