"""The program of a model: a graph from which Jacobian columns are read off as outer products.

Where rules know all uses of a parameter, its columns are outer products. Where they know the uses
of weights that are computed from it, its columns are those of the weights, pulled back. Any other
parameter is differentiated directly, with a copy for every sample, in the same pullback.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.fx import GraphModule


class Path(NamedTuple):
    """The operations through which the columns of a leaf are found, or why there are none."""

    operations: Sequence[str]
    obstacle: str | None

    def __str__(self) -> str:
        return f"directly ({self.obstacle})" if self.obstacle else ", ".join(self.operations)


class Site(NamedTuple):
    """The result of an operation for one sample, to which a probe is added."""

    shape: torch.Size
    dtype: torch.dtype


class Part(NamedTuple):
    """One use of a layer, with its site and the sources of a by their numbers in the program.

    Weight and bias have a source each, and a function that reads a off it. Without a source a is 1,
    and the function takes the cotangents at the site.
    """

    site: int
    read_a: Sequence[tuple[int | None, Callable[[Tensor], Tensor]]]
    read_b: Callable[[Tensor], Tensor]


class Layer(NamedTuple):
    """A weight, and its bias where there is one: which parameters they are, and their uses."""

    indices: Sequence[Int[Tensor, "g o _"]]
    parts: Sequence[Part]
    positions: int  # of all uses


class DerivedLeaves(NamedTuple):
    """Leaves whose columns are those of weights, pulled back or added up.

    What is used is not a leaf itself but a weight that is computed from leaves alone, w = g v/‖v‖,
    say: one Jacobian ∂w/∂v for all samples. Or the uses of a leaf overlap, one with its transpose,
    and w is the leaf. Where every row of w is computed from entries of a leaf that no other row
    is, the leaf's columns are outer products for every row by itself; otherwise they are dense.
    """

    leaves: Sequence[int]
    graph: GraphModule | None  # (*params) -> the entries of all weights; None: those of the leaf
    size: int  # how many entries these are, by which the layers count
    layers: Sequence[Layer]
    repeated: Sequence[bool]  # whether entries of a layer are one parameter, and to be added up
    orders: Sequence[Int[Tensor, " _"] | None]  # otherwise, the places of w's entries in it
    rows: Sequence[Int[Tensor, "_ _"] | None]  # the entries of every leaf for every row


class Program(NamedTuple):
    """A graph as it is, and one that takes a probe for every site and also returns the sources.

    A probe is added to the result of an operation: its cotangent, pulled back, is that of the
    result. The factors of columns are the layers, the derived leaves, and the direct ones.
    """

    plain: GraphModule  # (*params, *x) -> outputs
    graph: GraphModule  # (*params, *x, *probes) -> (outputs, sources)
    sites: Sequence[Site]
    size: int  # the number of cotangents of a sample and column
    results: int  # the number of entries of all that a run computes for a sample
    layers: Sequence[Layer]
    derived_leaves: Sequence[DerivedLeaves]
    direct: Sequence[int]  # the leaves that are differentiated directly
    paths: Sequence[Path]  # of every leaf
    pieces: Sequence[Sequence[tuple[int, int]]]  # the leaf and size of every factor's pieces
    order: Int[Tensor, " d"] | None  # the places of the parameters in all factors; None: in order
    rounding: float  # the eps of the narrowest dtype that the graph casts to, 0 without casts
