"""Jacobian columns of every sample, by torch.func, a chunk of samples at a time.

A column a_i = J_nᵀ L_nm [d] is the pullback of one column of the loss's basis at one sample; all
of them make A [d, i].
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp
from torch.utils._pytree import tree_leaves

from ddnewton.checks import check_derivatives, check_sample_axis
from ddnewton.independence import check_alone
from ddnewton.precision import Model
from ddnewton.transforms import over_samples
from ddnewton.trees import as_batch, parameter_count, take
from ddnewton.types import ModelFn, PyTree

Leaves: TypeAlias = list[Tensor]
"""Columns of a chunk of samples: for every leaf of params a tensor [n·m, d of the leaf]."""


class Jacobian(NamedTuple):
    """The columns of a batch, to be had chunk by chunk."""

    visit: Callable[[slice], Leaves]
    chunks: Sequence[slice]
    samples: int
    columns: int  # of one sample: m
    eps: float  # their rounding


def jacobian(
    models: Sequence[Model], basis: Float[Tensor, "n c m"], chunk_size: int | None
) -> Jacobian:
    """Return the columns by the first of the models that can be differentiated."""
    model, *others = models
    try:
        return _of_model(model, basis.to(model.outputs.dtype), chunk_size)
    except RuntimeError:
        if not others:
            raise
        return jacobian(others, basis, chunk_size)


def _of_model(model: Model, basis: Float[Tensor, "n c m"], chunk_size: int | None) -> Jacobian:
    n, _, m = basis.shape
    size = chunk_size or _sensible_chunk(model, m)
    chunks = [slice(start, min(start + size, n)) for start in range(0, n, size)]
    outputs = model.outputs.reshape(n, -1)

    def visit(chunk: slice) -> Leaves:
        alone, leaves = _visit(model, chunk, basis[chunk])
        together = outputs[chunk]
        check_alone(together, alone, together.abs().amax(), "outputs")
        return leaves

    trial = slice(0, min(max(2, size), n))
    first = visit(trial)
    _check_pullback(model, trial, basis[trial], first)
    eps = torch.finfo(basis.dtype).eps
    if trial.stop == n:  # one visit is all: keep it
        return Jacobian(lambda chunk: first, [trial], n, m, eps)
    return Jacobian(visit, chunks, n, m, eps)


def _visit(
    model: Model, chunk: slice, basis: Float[Tensor, "n c m"]
) -> tuple[Float[Tensor, "n c"], Leaves]:
    """Return the outputs and the columns of some samples, every sample taken alone."""

    def one(x: PyTree, columns: Float[Tensor, "c m"]) -> tuple[Tensor, list[Tensor]]:
        f, pullback, *_ = vjp(lambda p: _alone(model.function, p, x).reshape(-1), model.params)
        return f, over_samples(lambda column: tree_leaves(pullback(column)), columns.mT)

    f, leaves = over_samples(one, take(model.X, chunk), basis)
    rows = basis.shape[0] * basis.shape[2]
    return f, [leaf.reshape(rows, -1) for leaf in leaves]


def _alone(function: ModelFn, params: PyTree, x: PyTree) -> Float[Tensor, "..."]:
    """Return the outputs of one sample, as a batch of one."""
    outputs = function(params, as_batch(x))
    check_sample_axis(outputs, 1)
    return outputs[0]


def _check_pullback(
    model: Model, chunk: slice, basis: Float[Tensor, "n c m"], columns: Leaves
) -> None:
    """Compare a pullback of a batch with the sum of its samples' own.

    Values alone may agree by chance: samples that mix through a weight that is zero, say.
    """
    n, _, m = basis.shape
    X = take(model.X, chunk)
    weights = torch.arange(1, n * m + 1, device=basis.device, dtype=basis.dtype).cos()
    outputs, pullback, *_ = vjp(lambda p: model.function(p, X), model.params)
    mixed = torch.einsum("ncm,nm->nc", basis, weights.reshape(n, m))
    for leaf, column in zip(
        tree_leaves(pullback(mixed.reshape(outputs.shape))), columns, strict=True
    ):
        check_derivatives(leaf)
        if leaf.numel():
            size = n * m * column.abs().amax()
            check_alone(leaf.reshape(-1), weights.to(column) @ column, size, "derivatives")


def _sensible_chunk(model: Model, m: int) -> int:
    """Return how many samples' columns, and as many to pair them with, fill an eighth of memory."""
    n, width = model.outputs.shape[0], model.outputs.element_size()
    one = 4 * width * m * parameter_count(model.params) + 1
    return max(1, min(n, _memory(model.outputs.device) // 8 // one))


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 2**33
