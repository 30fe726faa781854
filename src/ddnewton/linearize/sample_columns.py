"""Outputs and Jacobian columns of samples, each evaluated by itself: four ways.

By ``vmap`` over all samples, backwards, or, where a sample has many more columns than the model has
parameters, forwards, so that a curve of many points costs what its few parameters do; by ``vmap``
over a trace of one sample, where torch.func refuses the model but not the operations that it
consists of, derivatives by `torch.autograd.grad` included; and in a loop by plain autograd, which
takes all that autograd can differentiate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jacfwd

from ddnewton.inputs.checks import check_sample_axis
from ddnewton.linearize.basis import (
    Basis,
    PositionBlocks,
    projected,
    stored,
    with_stored,
    written_columns,
    written_out,
)
from ddnewton.linearize.model import pullback_of
from ddnewton.linearize.structured.trace import trace
from ddnewton.transforms import concatenated, linear_map, one_by_one, vmap
from ddnewton.trees import as_batch, chunks, tree_flatten, tree_leaves, tree_map, tree_unflatten
from ddnewton.types import ModelFn, PyTree

Way: TypeAlias = Callable[[ModelFn, PyTree, PyTree, Basis], tuple[Tensor, list[Tensor]]]
"""A way from a function, its parameters, samples and their basis to outputs and columns."""

TRACE_PAYS = 100
"""From how many samples on a trace takes less time than the loop: about 100 ms, and 1 a sample."""

MANY_COTANGENTS = 1e5
"""From how many numbers in all cotangents on these take longer than forward mode's overhead."""


WRITTEN_COTANGENTS = 2**22
"""How many numbers the cotangents have that are written out at once."""


def tangents_pay(samples: int, columns: int, parameters: int) -> bool:
    """Return whether one tangent a parameter takes less time than one cotangent a column."""
    return parameters < columns and samples * columns**2 > MANY_COTANGENTS


def _by_vmap(
    function: ModelFn, params: PyTree, X: PyTree, basis: Basis
) -> tuple[Tensor, list[Tensor]]:
    """Return outputs and columns by ``vmap`` over the samples."""
    return _mapped(partial(_sample_outputs, function), params, X, basis)


def _by_tangents(
    function: ModelFn, params: PyTree, X: PyTree, basis: Basis
) -> tuple[Tensor, list[Tensor]]:
    """Return outputs and columns by forward mode, with one tangent for every parameter."""

    def outputs_twice(params: PyTree, x: PyTree) -> tuple[Tensor, Tensor]:
        f = _sample_outputs(function, params, x)
        return f, f

    def of_sample(x: PyTree, entries: Tensor) -> tuple[Tensor, list[Tensor]]:
        jacobians, f = jacfwd(outputs_twice, has_aux=True)(params, x)
        L = with_stored(basis, entries[None])
        rows = (J.reshape(1, f.numel(), -1) for J in tree_leaves(jacobians))
        return f, [projected(L, J)[0] for J in rows]

    outputs, columns = vmap(of_sample)(X, stored(basis))
    return outputs, columns


def _by_trace(
    function: ModelFn, params: PyTree, X: PyTree, basis: Basis
) -> tuple[Tensor, list[Tensor]]:
    """Return outputs and columns by ``vmap`` over a trace of the first sample."""
    graph = trace(function, params, tree_map(lambda x: x[0], X))

    def of_sample(params: PyTree, x: PyTree) -> Tensor:
        outputs: Tensor = graph(*tree_leaves(params), *tree_leaves(x))
        return outputs

    return _mapped(of_sample, params, X, basis)


def _mapped(
    function: ModelFn, params: PyTree, X: PyTree, basis: Basis
) -> tuple[Tensor, list[Tensor]]:
    """Return outputs and columns by ``vmap`` over samples of a function of one.

    What is pulled back to copies of the parameters, one a sample, are the columns.
    """
    leaves, spec = tree_flatten(params)
    n, _, m = basis.shape

    def of_copies(*copies: Tensor) -> tuple[Tensor, PyTree]:
        return vmap(lambda p, x: function(tree_unflatten(p, spec), x))(list(copies), X), ()

    outputs, pullback, _ = linear_map(of_copies, *(leaf.expand(n, *leaf.shape) for leaf in leaves))
    # Columns of positions are written out some at a time.
    size = m
    if isinstance(basis, PositionBlocks):
        size = max(1, WRITTEN_COTANGENTS // outputs.numel())
    parts = []
    for columns in chunks(m, size):
        cotangents = written_columns(basis, columns).movedim(2, 0)
        parts.append(pullback(cotangents.reshape(-1, *outputs.shape)))
    return outputs, [concatenated(pulled).transpose(0, 1) for pulled in zip(*parts, strict=True)]


def _by_loop(
    at_once: int | None,
    function: ModelFn,
    params: PyTree,
    X: PyTree,
    basis: Basis,
) -> tuple[Tensor, list[Tensor]]:
    """Return outputs and columns sample by sample, so many columns of it at once, None for all."""

    def of_sample(x: PyTree, L: Float[Tensor, "c m"]) -> tuple[Tensor, list[Tensor]]:
        f, pullback = pullback_of(lambda p: _sample_outputs(function, p, x), params)
        parts = [pullback(part.reshape(-1, *f.shape)) for part in L.mT.split(at_once or L.shape[1])]
        return f, [torch.cat(pieces) for pieces in zip(*parts, strict=True)]

    outputs, columns = one_by_one(of_sample, X, written_out(basis))
    return outputs, columns


def _sample_outputs(function: ModelFn, params: PyTree, x: PyTree) -> Float[Tensor, "..."]:
    """Return the outputs of one sample, as a batch of one."""
    outputs = function(params, as_batch(x))
    check_sample_axis(outputs, 1)
    return outputs[0]


def ways(samples: int, columns: int, parameters: int) -> Iterator[tuple[Way, str]]:
    """Yield the ways that are worth a try, the fastest first, and what the slow ones cost.

    They depend on the number of samples at a time, that of a sample's columns, and that of the
    parameters.
    """
    if tangents_pay(samples, columns, parameters):
        yield _by_tangents, ""
    yield _by_vmap, ""
    if samples >= TRACE_PAYS:
        yield _by_trace, "a trace of one sample, made anew for every chunk of samples"
    yield partial(_by_loop, None), "{}, one backward pass per sample"
    yield partial(_by_loop, 1), "{}, one backward pass per sample and column"
