"""Messages between ranks: an object as bytes, in one transfer of a fixed size where it is small.

A transfer takes some tenths of a millisecond however small it is, and a receiver has to know how
long it is. So every message begins with a packet of one size, which holds its length and as much of
it as fits; what is left follows in a second one.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import UInt8
from torch import Tensor

PACKET_BYTES, LENGTH_BYTES = 2**13, 8
"""How long the first packet of a message is, and the number in front that says how long it is."""


def packets_of(message: Any, device: torch.device) -> list[UInt8[Tensor, " _"]]:
    """Return the packets of a message: the first, and what does not fit into it, if anything."""
    octets = pickle.dumps(message)
    octets = len(octets).to_bytes(LENGTH_BYTES, "little") + octets
    first = octets[:PACKET_BYTES].ljust(PACKET_BYTES, b"\0")
    parts = [first, octets[PACKET_BYTES:]]
    return [
        torch.frombuffer(bytearray(part), dtype=torch.uint8).to(device) for part in parts if part
    ]


def empty_packet(device: torch.device) -> UInt8[Tensor, " _"]:
    """Return the memory for the first packet of a message, of an empty one until it arrives."""
    return torch.zeros(PACKET_BYTES, dtype=torch.uint8, device=device)


def missing_packets(first: UInt8[Tensor, " _"]) -> list[UInt8[Tensor, " _"]]:
    """Return the memory for what is to follow the first packet of a message."""
    missing = LENGTH_BYTES + _length(first) - PACKET_BYTES
    return [first.new_empty(missing)] if missing > 0 else []


def message_of(packets: list[UInt8[Tensor, " _"]]) -> Any:
    """Return the message that has arrived in packets."""
    octets = b"".join(packet.cpu().numpy().tobytes() for packet in packets)
    return pickle.loads(octets[LENGTH_BYTES : LENGTH_BYTES + _length(packets[0])])


def arriving(receive: Callable[[Tensor], object], device: torch.device) -> Any:
    """Return a message whose packets a function writes to memory."""
    packets = [empty_packet(device)]
    receive(packets[0])
    for packet in missing_packets(packets[0]):
        receive(packet)
        packets.append(packet)
    return message_of(packets)


def exchanged_messages(message: Any, group: dist.ProcessGroup, device: torch.device) -> list[Any]:
    """Return the messages of all ranks, on every rank."""
    packets, size = packets_of(message, device), dist.get_world_size(group)
    firsts = [empty_packet(device) for _ in range(size)]
    dist.all_gather(firsts, packets[0], group)
    # What does not fit, filled up to the longest.
    lengths = [sum(map(len, missing_packets(first))) for first in firsts]
    if not any(lengths):
        return [message_of([first]) for first in firsts]
    further = [first.new_zeros(max(lengths)) for first in firsts]
    padded = packets[0].new_zeros(max(lengths))
    for part in packets[1:]:
        padded[: len(part)] = part
    dist.all_gather(further, padded, group)
    pairs = zip(firsts, further, lengths, strict=True)
    return [message_of([first, rest[:length]]) for first, rest, length in pairs]


def _length(first: UInt8[Tensor, " _"]) -> int:
    """Return how long a message is, without the number that says so."""
    return int.from_bytes(first[:LENGTH_BYTES].cpu().numpy().tobytes(), "little")
