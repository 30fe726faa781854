"""`prepare`: find the layers of a model, and check that they reproduce it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, overload

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.columns.column_sums import weighted_sums
from ddnewton.columns.factors import in_order
from ddnewton.edge import computing
from ddnewton.errors import BadValue, sentence, warn
from ddnewton.inputs.checks import (
    Independent,
    check_batch,
    check_dependence,
    check_functions,
    check_params,
)
from ddnewton.inputs.dtensor_arguments import any_dtensor
from ddnewton.inputs.term_names import about_term, check_keys, is_several, of_term, term_names
from ddnewton.linearize.calls import first_line, first_sample_outputs
from ddnewton.linearize.independence import SamplesMix, check_independent, evaluate
from ddnewton.linearize.model import Model, at_samples
from ddnewton.linearize.precision import Widened, if_same_function, narrowest, pulled_back, ramp
from ddnewton.linearize.structured.compilation import compile_program, widened_program
from ddnewton.linearize.structured.program import Program
from ddnewton.linearize.structured.trace import trace
from ddnewton.linearize.structured.traced_model import Prepared, kept, signature
from ddnewton.linearize.structured.visit import Visit, visit
from ddnewton.linearize.widening import in_float64, widen_leaf
from ddnewton.transforms import first_member
from ddnewton.trees import (
    as_real,
    device_to_go_to,
    moved_to,
    moving,
    on_pairs,
    take,
    tree_leaves,
    tree_map,
)
from ddnewton.types import AnyModelFn, ModelFn, PyTree

TRACED_SAMPLES = 4
"""The number of samples on which a trace is compared with its model."""

TRACE_REMEDY = (
    "Branch with torch.where, index with fixed shapes and leave tensors tensors, or pass model_fn "
    'itself, unprepared, with gram="auto" or "dense".'
)


class Untraceable(BadValue):
    """A model whose layers cannot be found."""


def no_layers(reason: Untraceable) -> str:
    """Return the message of the warning that a model is differentiated without its layers."""
    return (
        "the layers of the model are not found, and steps go the slow way, by dense Jacobians: "
        f"{str(reason).removesuffix(TRACE_REMEDY)}Branch with torch.where, index with fixed shapes "
        'and leave tensors tensors; or pass gram="dense", which looks for none and says nothing.'
    )


@overload
def prepare(model_fn: ModelFn, params: PyTree, X: PyTree) -> Prepared: ...
@overload
def prepare(model_fn: Mapping[Any, ModelFn], params: PyTree, X: PyTree) -> dict[Any, Prepared]: ...
@computing
def prepare(model_fn: AnyModelFn, params: PyTree, X: PyTree) -> Prepared | dict[Any, Prepared]:
    """Find the layers of a model once, for any number of steps.

    The result is a ``model_fn`` itself, faster in `newton_step` than the one it is made from. It
    holds for any number of samples and any values of ``params`` and ``X``; what ``model_fn``
    refers to besides is frozen as it is now, as under `jax.jit`. Printed, it tells through which
    operations it sees each parameter, or why it differentiates one directly.

    Parameters
    ----------
    model_fn, params, X
        As in `ddnewton.newton_step`; of ``X`` a few samples are enough.

    Returns
    -------
    Prepared
        A ``model_fn``; of a dict of functions, the terms of a loss, a dict of them.

    Raises
    ------
    ValueError, TypeError
        Where an argument breaks a rule, or where the model cannot be traced.

    Examples
    --------
    >>> import torch
    >>> model_fn = lambda p, x: torch.tanh(x @ p["W"] + p["b"]) * p["scale"]
    >>> params = {"W": torch.ones(3, 2), "b": torch.zeros(2), "scale": torch.ones(2)}
    >>> prepare(model_fn, params, torch.ones(1, 3))
    Prepared(
      ['W']: mm
      ['b']: add
      ['scale']: directly (no rule for mul)
    )
    """
    # Refuse what breaks a rule, before any model is run.
    check_functions(model_fn, None)
    check_params(params)
    check_keys(model_fn, X=X)
    if any_dtensor((params, X)):
        rule, remedy = "prepare needs tensors that are whole", "Pass model_fn itself to steps."
        raise BadValue(sentence(rule, "DTensors", remedy))
    # The layers of every term.
    prepared = {}
    for name in term_names(model_fn):
        with about_term(name):
            prepared[name] = _prepared(of_term(model_fn, name), params, of_term(X, name))
    return prepared if is_several(model_fn) else prepared[None]


def _prepared(model_fn: ModelFn, params: PyTree, X: PyTree) -> Prepared:
    """Find the layers of one model, unless they are known."""
    check_batch(X=X)
    if isinstance(model_fn, Prepared):
        model_fn.leaves(params, X)
        return model_fn
    # From here on all parameters are real, and samples are taken to where they are.
    model_fn = moving(on_pairs(model_fn, params), device_to_go_to(X, params))
    params = as_real(params)
    return kept(prepared_model(evaluate(model_fn, params, X, None, TRACED_SAMPLES)))


def layers_of(model: Model, gram: str, *, tiny: bool) -> Prepared | None:
    """Return a model with its layers if asked to, or if that is faster and possible."""
    if gram == "dense" or (gram == "auto" and tiny):
        return None
    try:
        return prepared_model(at_samples(model, slice(0, TRACED_SAMPLES)))
    except (Untraceable, SamplesMix) as reason:
        if gram == "structured":
            raise
        # Samples that mix are refused by dense Jacobians too.
        if isinstance(reason, Untraceable):
            warn(no_layers(reason))
        return None


def prepared_model(model: Model) -> Prepared:
    """Find the layers of a model, and compare their outputs and derivatives with the model's.

    Raises `Untraceable` where they cannot be found or differ on one sample, and `SamplesMix` where
    they differ on the batch.
    """
    # Of an ensemble, its first member; and the model on the first sample alone.
    X = moved_to(model.X, device_to_go_to(model.X, model.params))
    params, X, outputs = tree_map(first_member, (model.params, X, model.outputs))
    model = model._replace(params=params, X=X, outputs=outputs)
    on_one_sample = model._replace(X=take(X, slice(0, 1)), outputs=first_sample_outputs(model))
    # The program is made from the first sample, and must agree with the model there.
    leaves, samples = tree_leaves(params), tree_leaves(X)
    try:
        graph = trace(model.function, params, tree_map(lambda x: x[0], X))
        narrow = compile_program(graph, leaves, [sample[0] for sample in samples])
        check_dependence(narrow.size > 0)
        _check_agreement(narrow, on_one_sample)
    except (torch.OutOfMemoryError, Independent):
        raise
    except SamplesMix as error:
        got = "other values or derivatives, as of an autograd.Function with a backward of its own"
        raise Untraceable(
            sentence("the trace of model_fn must agree with it", got, TRACE_REMEDY)
        ) from error
    except Exception as error:
        rule = "model_fn must be traceable"
        raise Untraceable(sentence(rule, first_line(error), TRACE_REMEDY)) from error
    # It must agree on the batch too, and its version in float64 with it.
    program_outputs, pullback = _check_agreement(narrow, model)
    return Prepared(
        sample=graph,
        narrow=narrow,
        wide=_widened_program(narrow, leaves, samples, program_outputs, pullback),
        params=signature("params", params, 0),
        X=signature("X", X, 1),
        width=outputs[0].numel(),
        dtype=outputs.dtype,
        complex_outputs=model.complex_outputs,
    )


def _check_agreement(program: Program, model: Model) -> tuple[Tensor, Tensor]:
    """Return the outputs and a pullback of a program, which must be those of the model."""
    # The outputs: the program takes every sample by itself, the model all of them as a batch.
    visited = visit(program, tree_leaves(model.params), tree_leaves(model.X))
    size = model.outputs.abs().amax()
    rounding = max(model.rounding, program.rounding)
    check_independent(model.outputs, visited.outputs, size, size, "outputs", rounding)
    # The pullback, leaf by leaf, up to the rounding of the model's own dtype.
    expected, pullback = _model_pullback(model), _program_pullback(program, visited)
    leaves = tree_leaves(model.params)
    dtype, sizes = narrowest([model.outputs, *leaves]), [leaf.numel() for leaf in leaves]
    expected = expected.to(dtype)
    largest = torch.maximum(expected.abs().amax(), size)
    pieces = zip(expected.split(sizes), pullback.to(dtype).split(sizes), strict=True)
    for of_model, of_program in pieces:
        if of_model.numel():
            scale = of_model.abs().amax()
            check_independent(of_model, of_program, scale, largest, "derivatives", rounding)
    return visited.outputs, pullback


def _model_pullback(model: Model) -> Float[Tensor, " d"]:
    """Return the pullback of the ramp by the model itself."""
    try:
        return pulled_back(model, model.X)
    except RuntimeError:  # a kernel that has a derivative in float64 alone, as LSTM's on a CPU
        params, X = tree_map(widen_leaf, (model.params, model.X))
        return pulled_back(model._replace(function=in_float64(model.function), params=params), X)


def _program_pullback(program: Program, visited: Visit) -> Float[Tensor, " d"]:
    """Return the pullback of the ramp by a program: the sum of the columns of all samples."""
    outputs = visited.outputs
    n = outputs.shape[0]
    factors = visited.pullback(ramp(outputs).reshape(n, -1, 1))
    weights = torch.ones(1, n, 1, dtype=torch.float64, device=outputs.device)
    pieces = [part[0] for factor in factors for part in weighted_sums(factor, weights)]
    return in_order(torch.cat(pieces), program.order)


def _widened_program(
    program: Program,
    leaves: list[Tensor],
    samples: list[Tensor],
    outputs: Float[Tensor, "n ..."],
    pullback: Float[Tensor, " d"],
) -> Program | None:
    """Return a narrow program in float64, if that makes no other function of it.

    Of the program as it is the outputs and the pullback of the ramp are known.
    """
    dtype = narrowest([*leaves, *samples])
    if dtype == torch.float64:
        return None
    wide, rounded = widened_program(program, dtype)

    def evaluate() -> Widened[Program]:
        visited = visit(wide, *tree_map(widen_leaf, (leaves, samples)))
        return Widened(wide, visited.outputs, rounded, lambda: _program_pullback(wide, visited))

    return if_same_function(evaluate, outputs, lambda: pullback, dtype)
