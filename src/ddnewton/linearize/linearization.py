"""A model at a batch, linearized: what it returns there, and its columns, one way or the other.

A pullback of the columns of a basis makes a `Jacobian`; directions are pushed forward where there
are fewer of them than columns.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.columns.contraction import flops
from ddnewton.columns.factors import Factor, Jacobian, Outer
from ddnewton.inputs.checks import check_outputs
from ddnewton.linearize.buffers import kept_buffers
from ddnewton.linearize.independence import SamplesMix, evaluate
from ddnewton.linearize.jacobians import jacobian, memory
from ddnewton.linearize.model import Model, at_samples
from ddnewton.linearize.precision import float64_throughout, widened
from ddnewton.linearize.structured.prepare import TRACED_SAMPLES, Untraceable, prepared_model
from ddnewton.linearize.structured.program import Program
from ddnewton.linearize.structured.traced_model import Prepared
from ddnewton.linearize.structured.visit import Visit, run, visit
from ddnewton.linearize.widening import widen_leaf
from ddnewton.trees import batches, chunks, parameter_count, take, tree_flatten, tree_unflatten
from ddnewton.types import ModelFn, PyTree

logger = logging.getLogger(__name__)

TINY_FLOPS = 1e9
"""Up to how many flops dense products are cheaper than finding the layers."""


class Linearization(NamedTuple):
    """A model at a batch: outputs in its dtype and as precise as they are known, and derivatives.

    ``jacobian`` pulls the columns of a basis back from some of the samples, None for all, and
    ``function`` returns the outputs of some samples for parameters next to these. Where the model
    is not in float64 but could be, at twice the cost, ``in_float64`` is.
    """

    outputs: Float[Tensor, "n ..."]
    precise: Float[Tensor, "n ..."]
    jacobian: Callable[[Float[Tensor, "n c m"], Int[Tensor, " n"] | None], Jacobian]
    function: Callable[[Sequence[Tensor], Int[Tensor, " n"]], Tensor]
    leaves: Sequence[Tensor]
    in_float64: Callable[[], Linearization] | None


@contextmanager
def linearized(
    model_fn: ModelFn, params: PyTree, X: PyTree, gram: str, chunk_size: int | None
) -> Iterator[Linearization]:
    """Evaluate a model, and choose the way to its columns; keep its buffers meanwhile."""
    if isinstance(model_fn, Prepared) and gram != "dense":
        yield _structured(model_fn, params, X, chunk_size)
        return
    with kept_buffers(model_fn) as check_buffers:
        model = evaluate(model_fn, params, X, chunk_size)
        check_buffers()
        yield _chosen(model, gram, chunk_size)


def _chosen(model: Model, gram: str, chunk_size: int | None) -> Linearization:
    """Return a model by its layers or by its Jacobians."""
    if gram == "structured" or (gram == "auto" and not _is_tiny(model)):
        try:
            prepared = prepared_model(at_samples(model, slice(0, TRACED_SAMPLES)))
            return _structured(prepared, model.params, model.X, chunk_size)
        except (Untraceable, SamplesMix) as reason:
            if gram == "structured":
                raise
            logger.info("the Gram matrix is formed from dense Jacobians: %s", reason)
    return _dense(model, chunk_size)


def _is_tiny(model: Model) -> bool:
    """Return whether the products of dense columns take less time than a trace."""
    count, d = model.outputs.numel(), parameter_count(model.params)
    return 2 * count * d * min(count, d) <= TINY_FLOPS


def _dense(model: Model, chunk_size: int | None) -> Linearization:
    wide = widened(model, lambda X: batches(X, chunk_size))
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
    )


def _structured(
    prepared: Prepared, params: PyTree, X: PyTree, chunk_size: int | None
) -> Linearization:
    """Return the model by its layers, in float64 where that costs little, or on demand."""
    leaves, samples = prepared.leaves(params, X)
    narrow, wide = prepared.narrow, prepared.wide

    if wide is None:
        return _by_layers(prepared, narrow, leaves, samples, chunk_size)

    def precise() -> Linearization:
        wider, X = ([widen_leaf(x) for x in each] for each in (leaves, samples))
        return _by_layers(prepared, wide, wider, X, chunk_size)

    if float64_throughout(lambda: _cost(narrow, samples[0].shape[0], prepared.width)):
        return precise()
    return _by_layers(prepared, narrow, leaves, samples, chunk_size)._replace(in_float64=precise)


def _by_layers(
    prepared: Prepared,
    program: Program,
    leaves: Sequence[Tensor],
    samples: Sequence[Tensor],
    chunk_size: int | None,
) -> Linearization:
    """Return a model by a program: run once, where all samples fit into memory at a time."""
    size = chunk_size or _sensible_chunk(program, leaves, prepared.width)

    def at(which: Int[Tensor, " n"] | slice) -> Visit:
        return visit(program, leaves, take(samples, which))

    n = samples[0].shape[0]
    everything = chunks(n, size)
    first = at(everything[0])
    rest = [at(chunk).outputs for chunk in everything[1:]]
    outputs = torch.cat([first.outputs, *rest]) if rest else first.outputs
    check_outputs(outputs, n)
    eps = max(torch.finfo(x.dtype).eps for x in (outputs, *leaves))

    def jacobian(basis: Float[Tensor, "n c m"], which: Int[Tensor, " n"] | None) -> Jacobian:
        parts = chunks(basis.shape[0], size)
        factors: Sequence[Factor] = []

        def of_chunk(chunk: slice) -> Sequence[Factor]:
            return at(chunk if which is None else which[chunk]).pullback(basis[chunk])

        if len(parts) == 1:  # keep what is visited once and for all
            factors = of_chunk(parts[0]) if which is not None else first.pullback(basis)
        return Jacobian(
            visit=lambda chunk: factors or of_chunk(chunk),
            chunks=parts,
            samples=basis.shape[0],
            columns=basis.shape[2],
            sizes=[leaf.numel() for leaf in leaves],
            pieces=program.pieces,
            order=program.order,
            device=basis.device,
            eps=eps,
            sums=0.0 if outputs.dtype == torch.float64 else torch.finfo(outputs.dtype).eps,
        )

    return Linearization(
        outputs=outputs.to(prepared.dtype),
        precise=outputs,
        jacobian=jacobian,
        function=lambda leaves, which: run(program, leaves, take(samples, which)),
        leaves=leaves,
        in_float64=None,
    )


def _cost(program: Program, n: int, m: int) -> float:
    """Return about how many flops a step takes."""
    total = 0.0
    for layer in program.layers:
        g, o, _ = layer.indices[0].shape
        widths = tuple(index.shape[2] for index in layer.indices)
        a = torch.empty(n, g, layer.positions, sum(widths), device="meta")
        b = torch.empty(n, m, g, o, layer.positions, device="meta")
        total += flops(Outer(a, b, widths)) + 2 * (m + 3) * a.numel() * o
    rows = program.size - sum(shape.numel() for shape in program.sites)
    rows += sum(each.size for each in program.sums)
    return total + 2 * rows * (n * m) ** 2


def _sensible_chunk(program: Program, leaves: Sequence[Tensor], m: int) -> int:
    """Return how many samples' cotangents, twice over, take a quarter of the memory."""
    inputs = sum(
        layer.positions * sum(index.shape[0] * index.shape[2] for index in layer.indices)
        for layer in program.layers
    )
    one = leaves[0].element_size() * (2 * m * program.size + inputs) + 1
    return max(1, memory(leaves[0].device) // 4 // one)
