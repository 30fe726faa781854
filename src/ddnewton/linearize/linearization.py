"""A model linearized at a batch: its outputs, and the columns of its Jacobian in one of two ways.

By layers, from a trace of the model, columns are sums of outer products; by Jacobians they are
dense. Columns of layers are preferred where the products of dense ones take longer than a trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from ddnewton.linearize.by_program import by_program
from ddnewton.linearize.independence import evaluate
from ddnewton.linearize.jacobians import jacobian
from ddnewton.linearize.model import Linearization, Model
from ddnewton.linearize.precision import (
    check_float64,
    float64_columns,
    float64_on_demand,
    float64_throughout,
    widened,
)
from ddnewton.linearize.sample_columns import tangents_pay
from ddnewton.linearize.structured.costs import dense_flops, is_tiny, step_flops
from ddnewton.linearize.structured.prepare import layers_of
from ddnewton.linearize.structured.traced_model import Prepared
from ddnewton.linearize.widening import widen_leaf
from ddnewton.transforms import without_autocast
from ddnewton.trees import (
    batches,
    parameter_count,
    sample_count,
    take,
    tree_flatten,
    tree_unflatten,
)
from ddnewton.types import ModelFn, Precision, PyTree


@contextmanager
def linearized(
    model_fn: ModelFn,
    params: PyTree,
    X: PyTree,
    gram: str,
    chunk_size: int | None,
    whole: int | None = None,
    *,
    precision: Precision = "auto",
) -> Iterator[Linearization]:
    """Linearize a model by its layers or by its Jacobians.

    A prepared model whose samples have many more outputs than it has parameters is differentiated
    along these. Where X is a part of a batch, the ``whole`` number of samples decides.
    """
    whole = sample_count(X) if whole is None else whole
    if isinstance(model_fn, Prepared) and not _goes_dense(model_fn, params, whole, gram, precision):
        # Its casts are in the graph, and products of columns need none.
        with without_autocast(params):
            yield _by_layers(model_fn, params, X, chunk_size, whole, precision)
        return
    model = evaluate(model_fn, params, X, chunk_size)
    yield _linearized(model, gram, chunk_size, whole, precision)


def _goes_dense(
    prepared: Prepared, params: PyTree, n: int, gram: str, precision: Precision
) -> bool:
    """Return whether a prepared model is linearized by dense columns after all.

    It has its version in float64 by layers alone.
    """
    if precision == "float64" and prepared.wide is not None:
        return False
    if gram != "auto" or torch.compiler.is_compiling():
        return gram == "dense"
    return tangents_pay(n, prepared.width, parameter_count(params))


def _linearized(
    model: Model, gram: str, chunk_size: int | None, whole: int, precision: Precision
) -> Linearization:
    """Linearize a model by its layers if asked to, or if that is faster and possible."""
    count, d = whole * model.outputs[0].numel(), parameter_count(model.params)
    prepared = layers_of(model, gram, tiny=is_tiny(count, d))
    # Casts in a graph stay, those of a function may be left out.
    kept_narrow = precision == "float64" and prepared is not None and prepared.is_narrow
    if prepared is None or (kept_narrow and gram == "auto"):
        return _by_jacobians(model, chunk_size, dense_flops(count, d), precision)
    return _by_layers(prepared, model.params, model.X, chunk_size, whole, precision)


def _by_jacobians(
    model: Model, chunk_size: int | None, flops: float, precision: Precision
) -> Linearization:
    """Linearize a model by dense columns, in float64 where it can be evaluated so."""
    wide = model
    if float64_columns(precision, model.outputs.device, flops):
        wide = widened(model, lambda X: batches(X, model.at_once), precision)
    models = [model] if wide is model else [wide, model]
    leaves, spec = tree_flatten(wide.params)
    return Linearization(
        outputs=model.outputs,
        precise=wide.outputs,
        jacobian=lambda basis, samples: jacobian(models, basis, samples, chunk_size),
        function=lambda leaves, samples: wide.function(
            tree_unflatten(leaves, spec), take(wide.X, samples)
        ),
        leaves=leaves,
        in_float64=None,
        complex_outputs=model.complex_outputs,
    )


def _by_layers(
    prepared: Prepared,
    params: PyTree,
    X: PyTree,
    chunk_size: int | None,
    whole: int,
    precision: Precision,
) -> Linearization:
    """Linearize a model by its layers, in float64 where that costs little, or on demand."""
    # In its own dtype, where that is float64 or the only one.
    leaves, samples = prepared.leaves(params, X)
    narrow, wide = prepared.narrow, prepared.wide
    if wide is None:
        check_float64(precision, prepared.narrowest, narrow.rounding)
        return by_program(prepared, narrow, leaves, samples, chunk_size, whole)

    def in_float64() -> Linearization:
        wide_leaves, wide_samples = ([*map(widen_leaf, tensors)] for tensors in (leaves, samples))
        return by_program(prepared, wide, wide_leaves, wide_samples, chunk_size, whole)

    # In float64 at once, or in its own dtype with float64 on demand. Casts below its own dtype
    # round more than small curvatures can bear.
    cost, device = partial(step_flops, narrow, whole, prepared.width), leaves[0].device
    on_demand = float64_on_demand(precision, device)
    if (on_demand and narrow.rounding) or float64_throughout(precision, device, cost):
        return in_float64()
    in_own_dtype = by_program(
        prepared, narrow, leaves, samples, chunk_size, whole, exact_sums=not on_demand
    )
    return in_own_dtype._replace(in_float64=in_float64 if on_demand else None)
