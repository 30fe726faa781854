"""A model at a batch, to be multiplied with: outputs, and products with its Jacobian in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.inputs.checks import check_outputs
from ddnewton.linearize.calls import refusal
from ddnewton.linearize.first_products import check_products
from ddnewton.linearize.independence import evaluate
from ddnewton.linearize.jacobian_products import Products, products_of
from ddnewton.linearize.kept_graphs import OfSamples, of_leaves, samples_of_graphs
from ddnewton.linearize.model import Model, forgotten
from ddnewton.linearize.precision import (
    check_float64,
    float64_on_demand,
    float64_throughout,
    widened,
)
from ddnewton.linearize.structured.traced_model import Prepared
from ddnewton.linearize.structured.visit import run
from ddnewton.linearize.widening import widen_leaf
from ddnewton.transforms import plain_tensor, without_autocast
from ddnewton.trees import (
    TreeSpec,
    batches,
    chunks,
    parameter_count,
    sample_count,
    take,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
)
from ddnewton.types import ModelFn, Precision, PyTree


class FreeLinearization(NamedTuple):
    """A model at a batch whose Jacobian is known by products alone.

    ``function`` returns the outputs of some samples at parameters other than ``leaves``;
    ``in_float64`` the same linearization in float64, None where it is so or cannot be; and
    ``at_batch`` that at another batch, without the checks that one batch is enough for.
    """

    outputs: Float[Tensor, "n ..."]  # in the model's own dtype
    precise: Float[Tensor, "n ..."]  # in the dtype in which they are computed
    function: OfSamples
    leaves: Sequence[Tensor]
    in_float64: Callable[[], FreeLinearization] | None
    complex_outputs: bool  # which are pairs of reals here
    samples_at_once: int
    eps: float  # the rounding of a product
    at_batch: Callable[[PyTree], FreeLinearization]
    keeps_graphs: bool = True
    depends: Callable[[], bool] | None = None  # on a parameter; None where a call shows it
    of_ranks: Callable[[Sequence[int], Any], Products] | None = None  # which have the samples
    refused: Callable[[Exception], Exception] | None = None  # the error of a product that fails

    def products(self, wanted: Sequence[int], samples: Int[Tensor, " n"] | slice) -> Products:
        """Return the products of some samples with their Jacobian along some leaves."""
        if self.of_ranks is not None:
            return self.of_ranks(wanted, samples)
        return products_of(partial(of_leaves, self.function, samples), self.leaves, wanted)

    def graphs_fit(self, count: int) -> bool:
        """Return whether the graphs of so many samples may be kept."""
        return self.keeps_graphs and count <= self.samples_at_once


@contextmanager
def linearized_freely(
    model_fn: ModelFn,
    params: PyTree,
    X: PyTree,
    chunk_size: int | None,
    whole: int | None = None,
    *,
    precision: Precision = "auto",
) -> Iterator[FreeLinearization]:
    """Linearize a model by products, prepared or not.

    Where X is a part of a batch, the ``whole`` number of samples decides what is in float64.
    """
    X = tree_map(plain_tensor, X)
    whole = sample_count(X) if whole is None else whole
    if isinstance(model_fn, Prepared):
        with without_autocast(params):
            yield _of_prepared(model_fn, params, X, chunk_size, whole, precision)
        return
    model = evaluate(model_fn, params, X, chunk_size)
    try:
        yield _of_model(model, chunk_size, whole, precision)._replace(
            refused=partial(refusal, model)
        )
    except RuntimeError as error:
        raise refusal(model, error) from error


def _of_model(
    model: Model, chunk_size: int | None, whole: int, precision: Precision
) -> FreeLinearization:
    """Linearize a model that has been evaluated, in float64 where that costs little."""
    device, flops = model.outputs.device, _cost(whole * model.outputs[0].numel(), model.params)
    at_once = float64_throughout(precision, device, lambda: flops)
    widen = partial(widened, model, lambda X: batches(X, chunk_size), precision)
    wide = widen() if at_once else model

    def in_float64() -> FreeLinearization:
        return _at(widen(), model, chunk_size)

    is_widest = wide is not model or wide.outputs.dtype == torch.float64
    further = None if is_widest or not float64_on_demand(precision, device) else in_float64
    return _at(wide, model, chunk_size)._replace(in_float64=further)


def _at(model: Model, narrow: Model, chunk_size: int | None) -> FreeLinearization:
    """Linearize a model, with the outputs that it has in its own dtype."""
    leaves, spec = tree_flatten(model.params)
    of_batch = partial(_of_batch, model.function, spec)
    function, widens = of_batch(model.X), model is not narrow
    linearization = FreeLinearization(
        outputs=narrow.outputs,
        precise=model.outputs,
        function=function,
        leaves=leaves,
        in_float64=None,
        complex_outputs=narrow.complex_outputs,
        samples_at_once=samples_of_graphs(function, leaves, len(model.outputs), chunk_size),
        eps=_rounding(model.outputs, leaves, model.rounding),
        at_batch=forgotten,
    )
    # Nothing of this batch goes along to others.
    empty = narrow.outputs.new_empty(0)
    like = linearization._replace(outputs=empty, precise=empty, function=forgotten)

    def at_batch(X: PyTree) -> FreeLinearization:
        dense = tree_map(lambda x: x if x.layout == torch.strided else x.to_dense(), X)
        dense = tree_map(plain_tensor, dense)
        at_samples = of_batch(tree_map(widen_leaf, dense) if widens else dense)
        return _anew(like, at_batch, at_samples, sample_count(X), chunk_size)

    check_products(linearization.products, linearization.precise, len(leaves))
    return linearization._replace(at_batch=at_batch)


def _of_batch(function: ModelFn, spec: TreeSpec, X: PyTree) -> OfSamples:
    """Return a function of parameters as one of leaves and indices of samples."""
    return lambda leaves, samples: function(tree_unflatten(leaves, spec), take(X, samples))


def _anew(
    like: FreeLinearization,
    at_batch: Callable[[PyTree], FreeLinearization],
    function: OfSamples,
    n: int,
    chunk_size: int | None,
) -> FreeLinearization:
    """Return a linearization at another batch, with the outputs there."""
    size = samples_of_graphs(function, like.leaves, n, chunk_size)
    outputs = torch.cat([function(like.leaves, chunk).detach() for chunk in chunks(n, size)])
    check_outputs(outputs, n)
    return like._replace(
        outputs=outputs.to(like.outputs.dtype),
        precise=outputs,
        function=function,
        samples_at_once=size,
        at_batch=at_batch,
    )


def _of_prepared(
    prepared: Prepared,
    params: PyTree,
    X: PyTree,
    chunk_size: int | None,
    whole: int,
    precision: Precision,
) -> FreeLinearization:
    """Linearize a prepared model, in float64 where that costs little, or on demand."""
    linearized_in = partial(_by_program, prepared, params, X, chunk_size)
    # In its own dtype, where that is float64 or the only one.
    if prepared.wide is None:
        check_float64(precision, prepared.narrowest, prepared.narrow.rounding)
        return linearized_in(wide=False)
    # In float64 at once, or in its own dtype with float64 on demand.
    device, flops = tree_leaves(params)[0].device, _cost(whole * prepared.width, params)
    on_demand = float64_on_demand(precision, device)
    rounds = on_demand and prepared.narrow.rounding > 0
    if rounds or float64_throughout(precision, device, lambda: flops):
        return linearized_in(wide=True)
    further = partial(linearized_in, wide=True) if on_demand else None
    return linearized_in(wide=False)._replace(in_float64=further)


def _by_program(
    prepared: Prepared, params: PyTree, X: PyTree, chunk_size: int | None, *, wide: bool
) -> FreeLinearization:
    """Linearize a prepared model by one of its two programs."""
    leaves, samples = prepared.leaves(params, X)
    program = prepared.narrow
    if wide:
        assert prepared.wide is not None
        program = prepared.wide
        leaves, samples = ([*map(widen_leaf, part)] for part in (leaves, samples))

    # The program runs on all leaves at once, so that samples are taken before.
    def function(leaves: Sequence[Tensor], indices: Int[Tensor, " n"] | slice) -> Tensor:
        return run(program, leaves, prepared.at(samples, indices))

    n = len(samples[0])
    size = samples_of_graphs(function, leaves, n, chunk_size)
    with torch.no_grad():
        outputs = torch.cat([function(leaves, chunk) for chunk in chunks(n, size)])
    check_outputs(outputs, n)
    return FreeLinearization(
        outputs=outputs.to(prepared.dtype),
        precise=outputs,
        function=function,
        leaves=leaves,
        in_float64=None,
        complex_outputs=prepared.complex_outputs,
        samples_at_once=size,
        eps=_rounding(outputs, leaves, program.rounding),
        at_batch=partial(_by_program, prepared, params, chunk_size=chunk_size, wide=wide),
    )


def _cost(outputs: int, params: PyTree) -> float:
    """Return about how many flops products with a matrix of so many outputs take."""
    return float(outputs * parameter_count(params))


def _rounding(outputs: Tensor, leaves: Sequence[Tensor], inside: float) -> float:
    """Return the rounding of a product: that of the narrowest dtype on the way."""
    return max(inside, *(torch.finfo(tensor.dtype).eps for tensor in (outputs, *leaves)))
