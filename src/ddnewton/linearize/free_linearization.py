"""A model at a batch, to be multiplied with: outputs, and products with its Jacobian in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.inputs.checks import check_outputs
from ddnewton.inputs.memory import CHUNK_BYTES
from ddnewton.linearize.calls import refusal
from ddnewton.linearize.first_products import MEASURED_SAMPLES, check_products
from ddnewton.linearize.independence import evaluate
from ddnewton.linearize.jacobian_products import Products, graph_bytes, products_of
from ddnewton.linearize.model import Model, forgotten
from ddnewton.linearize.precision import CHEAP_FLOPS, widened
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
    tree_map,
    tree_unflatten,
)
from ddnewton.types import ModelFn, PyTree

OfSamples: TypeAlias = Callable[[Sequence[Tensor], Int[Tensor, " n"] | slice], Tensor]
"""The outputs of some samples, as a function of leaves and indices."""

KEPT_BYTES = 2**29
"""Up to how many bytes the graphs of all samples are kept between products; where they are more,
those of a chunk are made anew for every product."""

GRAPHS = 3
"""How many times the results of a model the graphs take: its own, and that of its pullback."""


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
        return products_of(partial(_of_leaves, self.function, samples), self.leaves, wanted)

    def graphs_fit(self, count: int) -> bool:
        """Return whether the graphs of so many samples may be kept."""
        return self.keeps_graphs and count <= self.samples_at_once


def _of_leaves(
    function: OfSamples, samples: Int[Tensor, " n"] | slice, leaves: Sequence[Tensor]
) -> Tensor:
    """Call a function of leaves and samples with the samples first, to be bound."""
    return function(leaves, samples)


@contextmanager
def linearized_freely(
    model_fn: ModelFn, params: PyTree, X: PyTree, chunk_size: int | None, whole: int | None = None
) -> Iterator[FreeLinearization]:
    """Linearize a model by products, prepared or not.

    Where X is a part of a batch, the ``whole`` number of samples decides what is in float64.
    """
    X = tree_map(plain_tensor, X)
    whole = sample_count(X) if whole is None else whole
    if isinstance(model_fn, Prepared):
        with without_autocast(params):
            yield _of_prepared(model_fn, params, X, chunk_size, whole=whole)
        return
    model = evaluate(model_fn, params, X, chunk_size)
    try:
        yield _of_model(model, chunk_size, whole)._replace(refused=partial(refusal, model))
    except RuntimeError as error:
        raise refusal(model, error) from error


def _of_model(model: Model, chunk_size: int | None, whole: int) -> FreeLinearization:
    """Linearize a model that has been evaluated, in float64 where that costs little."""
    cheap = whole * model.outputs[0].numel() * parameter_count(model.params) <= CHEAP_FLOPS
    wide = widened(model, lambda X: batches(X, chunk_size)) if cheap else model

    def in_float64() -> FreeLinearization:
        return _at(widened(model, lambda X: batches(X, chunk_size)), model, chunk_size)

    further = None if wide is not model or wide.outputs.dtype == torch.float64 else in_float64
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
        samples_at_once=_samples_at_once(function, leaves, len(model.outputs), chunk_size),
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
    size = _samples_at_once(function, like.leaves, n, chunk_size)
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
    *,
    wide: bool | None = None,
    whole: int = 0,
) -> FreeLinearization:
    """Linearize a prepared model, in float64 where that costs little, or where it is said."""
    leaves, samples = prepared.leaves(params, X)

    def by_program(wide: bool) -> FreeLinearization:
        # The program runs on all leaves at once, so that samples are taken before.
        program = prepared.narrow
        own_leaves, own_samples = leaves, samples
        if wide:
            assert prepared.wide is not None
            program = prepared.wide
            own_leaves, own_samples = ([*map(widen_leaf, part)] for part in (leaves, samples))

        def function(leaves: Sequence[Tensor], indices: Int[Tensor, " n"] | slice) -> Tensor:
            return run(program, leaves, prepared.at(own_samples, indices))

        n = len(own_samples[0])
        size = _samples_at_once(function, own_leaves, n, chunk_size)
        with torch.no_grad():
            outputs = torch.cat([function(own_leaves, chunk) for chunk in chunks(n, size)])
        check_outputs(outputs, n)
        return FreeLinearization(
            outputs=outputs.to(prepared.dtype),
            precise=outputs,
            function=function,
            leaves=own_leaves,
            in_float64=None,
            complex_outputs=prepared.complex_outputs,
            samples_at_once=size,
            eps=_rounding(outputs, own_leaves, program.rounding),
            at_batch=partial(_of_prepared, prepared, params, chunk_size=chunk_size, wide=wide),
        )

    if wide is not None:
        return by_program(wide)
    if prepared.wide is None:
        return by_program(wide=False)
    count = whole * prepared.width
    if prepared.narrow.rounding or count * sum(leaf.numel() for leaf in leaves) <= CHEAP_FLOPS:
        return by_program(wide=True)
    return by_program(wide=False)._replace(in_float64=partial(by_program, wide=True))


def _rounding(outputs: Tensor, leaves: Sequence[Tensor], inside: float) -> float:
    """Return the rounding of a product: that of the narrowest dtype on the way."""
    return max(inside, *(torch.finfo(tensor.dtype).eps for tensor in (outputs, *leaves)))


def _samples_at_once(
    function: OfSamples, leaves: Sequence[Tensor], n: int, chunk_size: int | None
) -> int:
    """Return for how many samples graphs are made at once: all, where they are kept."""
    if chunk_size is not None:
        return min(n, chunk_size)

    # Mostly a graph of few samples shows that. It has copies of the parameters, which are as large
    # for any number of them, so that otherwise what counts is how much a sample adds.
    def bytes_of(count: int) -> int:
        return GRAPHS * graph_bytes(partial(_of_leaves, function, slice(0, count)), leaves)

    first = max(1, min(n // 2, MEASURED_SAMPLES))
    first_bytes = bytes_of(first)
    if n * first_bytes <= first * KEPT_BYTES:
        return n
    size = max(0, bytes_of(2 * first) - first_bytes if n > 1 else first_bytes) // first + 1
    return n if n * size <= KEPT_BYTES else max(1, min(n, CHUNK_BYTES // size))
