"""Jacobian columns of every sample, by torch.func, a chunk of samples at a time.

A column a_i = J_nᵀ L_nm [d] is the pullback of one column of the loss's basis at one sample; all
of them make A [d, i].
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import vjp

from ddnewton.columns.factors import Jacobian
from ddnewton.inputs.checks import check_derivatives, check_sample_axis
from ddnewton.linearize.independence import SamplesMix, check_independent
from ddnewton.linearize.model import Model, at_samples
from ddnewton.transforms import one_by_one, over_samples
from ddnewton.trees import as_batch, chunks, parameter_count, take, tree_leaves
from ddnewton.types import ModelFn, PyTree

Mapping: TypeAlias = Callable[..., PyTree]
"""`over_samples`, or its slow twin `one_by_one`."""


def jacobian(
    models: Sequence[Model],
    basis: Float[Tensor, "n c m"],
    samples: Int[Tensor, " n"] | None,
    chunk_size: int | None,
) -> Jacobian:
    """Return the columns of some samples by the first of the models that can be differentiated.

    ``vmap`` is tried first, and a loop over the samples where it fails, or is wrong: in torch 2.13
    it mistakes an axis of PReLU's weight for one of the samples.
    """
    errors: list[Exception] = []
    if samples is not None:
        models = [at_samples(model, samples) for model in models]
    for model in models:
        for mapping in (over_samples, one_by_one):
            try:
                return _of_model(model, basis.to(model.outputs.dtype), chunk_size, mapping)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - torch raises all kinds, and the last is raised
                errors.append(error)
    raise next((error for error in errors if isinstance(error, SamplesMix)), errors[-1])


def _of_model(
    model: Model, basis: Float[Tensor, "n c m"], chunk_size: int | None, mapping: Mapping
) -> Jacobian:
    n, _, m = basis.shape
    size = chunk_size or _sensible_chunk(model, m)
    parts = chunks(n, size)
    trial = slice(0, min(max(2, size), n))
    first = _visit(model, trial, basis, mapping)
    _check_pullback(model, trial, basis, first)
    eps = max(torch.finfo(leaf.dtype).eps for leaf in (model.outputs, *tree_leaves(model.params)))
    sizes = [leaf.numel() for leaf in tree_leaves(model.params)]
    pieces = [[piece] for piece in enumerate(sizes)]
    record = partial(Jacobian, samples=n, columns=m, sizes=sizes, pieces=pieces, order=None)
    record = partial(record, device=basis.device, eps=eps, sums=0.0)
    if trial.stop == n:  # one visit is all: keep it
        return record(lambda _: first, [trial])
    _check_pullback(model, parts[-1], basis, _visit(model, parts[-1], basis, mapping))
    return record(lambda chunk: _visit(model, chunk, basis, mapping), parts)


def _visit(
    model: Model, chunk: slice, basis: Float[Tensor, "n c m"], mapping: Mapping
) -> list[Tensor]:
    """Return the columns of some samples, every sample taken alone."""

    def one(x: PyTree, columns: Float[Tensor, "c m"]) -> tuple[Tensor, list[Tensor]]:
        f, pullback, *_ = vjp(lambda p: _alone(model.function, p, x), model.params)
        return f, mapping(lambda g: tree_leaves(pullback(g.reshape(f.shape))), columns.mT)

    alone, leaves = mapping(one, take(model.X, chunk), basis[chunk])
    together = model.outputs[chunk]
    size = together.abs().amax()
    check_independent(together, alone, size, size, "outputs")
    rows = basis[chunk].shape[0] * basis.shape[2]
    return [leaf.reshape(rows, leaf.numel() // rows) for leaf in leaves]


def _alone(function: ModelFn, params: PyTree, x: PyTree) -> Float[Tensor, "..."]:
    """Return the outputs of one sample, as a batch of one."""
    outputs = function(params, as_batch(x))
    check_sample_axis(outputs, 1)
    return outputs[0]


def _check_pullback(
    model: Model, chunk: slice, basis: Float[Tensor, "n c m"], columns: Sequence[Tensor]
) -> None:
    """Compare a pullback of a batch with the sum of its samples' own.

    Values alone may agree by chance: samples that mix through a weight that is zero, say.
    """
    X, basis = take(model.X, chunk), basis[chunk]
    n, _, m = basis.shape
    weights = torch.arange(1, n * m + 1, device=basis.device, dtype=basis.dtype).cos()
    outputs, pullback, *_ = vjp(lambda p: model.function(p, X), model.params)
    mixed = torch.einsum("ncm,nm->nc", basis, weights.reshape(n, m)).reshape(outputs.shape)
    sizes = [
        n * m * torch.linalg.vector_norm(leaf, math.inf) if leaf.numel() else leaf.new_zeros(())
        for leaf in columns
    ]
    largest = torch.stack([outputs.abs().amax(), *(size.to(outputs) for size in sizes)]).amax()
    for leaf, mine, size in zip(tree_leaves(pullback(mixed)), columns, sizes, strict=True):
        if leaf.numel():
            check_derivatives(leaf)
            alone = weights.to(mine) @ mine
            check_independent(leaf.reshape(-1), alone, size, largest.to(mine), "derivatives")


def _sensible_chunk(model: Model, m: int) -> int:
    """Return how many samples' columns, and as many to pair them with, fill a quarter of memory."""
    n, width = model.outputs.shape[0], model.outputs.element_size()
    one = 2 * width * m * parameter_count(model.params) + 1
    return max(1, min(n, memory(model.outputs.device) // 4 // one))


def memory(device: torch.device) -> int:
    """Return how many bytes a device has: free ones on a GPU, all of them else."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    plain = not torch.compiler.is_compiling()  # which knows nothing of the system
    if plain and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 2**33
