"""What a peer is asked for, and in what form it answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from benchmarks.recipes import Case

DIRECTIONS = 10
QUANTITIES = ("top10", "all", "eigenvalues")

Answer = Callable[[], Tensor]
"""Returns the step as one vector, in the order of the parameters, or the eigenvalues."""


class Peer(NamedTuple):
    """How a peer is made, and what it is asked: which quantities, of which kinds of problems."""

    make: Callable[[Case, str], Answer]
    kinds: tuple[str, ...] = ("mlp", "layers", "residual", "transformer", "function")
    quantities: tuple[str, ...] = QUANTITIES
    main: bool = False  # measured first, and with more patience
