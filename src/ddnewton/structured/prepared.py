"""Models whose layers have been found, once for many steps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap
from torch.fx import GraphModule
from torch.utils._pytree import TreeSpec, tree_leaves, tree_map, tree_structure

from ddnewton.buffers import kept_buffers
from ddnewton.checks import check_batch, check_functions, check_params
from ddnewton.contraction import combined, in_order
from ddnewton.errors import BadType, BadValue, public, sentence
from ddnewton.independence import Mixed, check_alone, evaluate
from ddnewton.precision import (
    PULLBACKS,
    VALUES,
    Model,
    in_float64,
    near,
    pulled_back,
    ramp,
    widen_leaf,
)
from ddnewton.structured.program import Program, compile_program
from ddnewton.structured.trace import trace, widen
from ddnewton.structured.visit import Visit, visit
from ddnewton.transforms import first_member
from ddnewton.trees import named_leaves, take
from ddnewton.types import ModelFn, PyTree

logger = logging.getLogger(__name__)

FEW = 4
"""On how many samples a trace is compared with its model."""


REMEDY = (
    "Branch with torch.where, index with fixed shapes and leave tensors tensors, or pass model_fn "
    'itself, unprepared, with gram="auto" or "dense".'
)


class Untraceable(BadValue):
    """A model whose layers cannot be found."""


class Signature(NamedTuple):
    """What the arguments of a prepared model must be like."""

    name: str
    structure: TreeSpec
    skip: int  # axes in front, of the samples
    leaves: Sequence[tuple[str, torch.Size, torch.dtype, torch.device]]


@dataclass(frozen=True, eq=False, repr=False)
class Prepared:
    """A model with its layers found: called, the model itself; printed, what was found.

    It holds for any number of samples and any values; what the model referred to besides its
    arguments is frozen as it was, as under `jax.jit`.
    """

    sample: GraphModule
    narrow: Program
    wide: Program | None
    params: Signature
    X: Signature
    width: int  # how many outputs a sample has
    dtype: torch.dtype  # of the outputs

    def __call__(self, params: PyTree, X: PyTree) -> Float[Tensor, "n ..."]:
        """Return the model's outputs."""
        leaves, samples = self.leaves(params, X)
        mapped = (*(None for _ in leaves), *(0 for _ in samples))
        outputs: Tensor = vmap(self.sample, mapped)(*leaves, *samples)
        return outputs

    def leaves(self, params: PyTree, X: PyTree) -> tuple[list[Tensor], list[Tensor]]:
        """Return the tensors of arguments that fit; refuse others."""
        _check_signature(self.params, params)
        _check_signature(self.X, X)
        leaves, samples = tree_leaves(params), tree_leaves(X)
        if not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled()):
            # What was made in inference mode, autograd refuses outside.
            leaves = [leaf.clone() if leaf.is_inference() else leaf for leaf in leaves]
            samples = [leaf.clone() if leaf.is_inference() else leaf for leaf in samples]
        return leaves, samples

    def __repr__(self) -> str:
        rows = [
            f"  {name or 'params'}: {path}"
            for (name, *_), path in zip(self.params.leaves, self.narrow.paths, strict=True)
        ]
        return "\n".join(["Prepared(", *rows, ")"])


@public
@torch.no_grad()
def prepare(model_fn: ModelFn, params: PyTree, X: PyTree) -> Prepared:
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
        A ``model_fn``.

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
    check_functions(model_fn, None)
    check_params(params)
    check_batch(X=X)
    with kept_buffers(model_fn) as check_buffers:
        model = evaluate(model_fn, params, take(X, slice(0, FEW)), None)
        check_buffers()
        return prepared_model(model)


def prepared_model(model: Model) -> Prepared:
    """Find the layers of a model, and compare what comes of them with the model on its batch."""
    params, X, outputs = tree_map(first_member, (model.params, model.X, model.outputs))
    model = Model(model.function, params, X, outputs)
    first = take(X, slice(0, 1))
    one = Model(model.function, params, first, model.function(params, first))
    leaves, samples = tree_leaves(params), tree_leaves(X)
    try:
        graph = trace(model.function, params, tree_map(lambda x: x[0], X))
        narrow = compile_program(graph, leaves, [sample[0] for sample in samples])
        _check(narrow, one)
    except torch.OutOfMemoryError:
        raise
    except Mixed as error:
        got = "other values or derivatives, as of an autograd.Function with a backward of its own"
        raise Untraceable(
            sentence("the trace of model_fn must agree with it", got, REMEDY)
        ) from error
    except Exception as error:
        got = " ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        raise Untraceable(sentence("model_fn must be traceable", got, REMEDY)) from error
    _check(narrow, model)
    return Prepared(
        sample=graph,
        narrow=narrow,
        wide=_wide(narrow, leaves, samples),
        params=_signature("params", params, 0),
        X=_signature("X", X, 1),
        width=outputs[0].numel(),
        dtype=outputs.dtype,
    )


def _check(program: Program, model: Model) -> None:
    """Require that outputs and a pullback of all samples are those of the model."""
    v = visit(program, tree_leaves(model.params), tree_leaves(model.X))
    size = model.outputs.abs().amax()
    check_alone(model.outputs, v.outputs, size, size, "outputs")
    expected, mine = _expected(model), _pulled_back(program, v)
    sizes = [leaf.numel() for leaf in tree_leaves(model.params)]
    dtype = _narrowest([model.outputs, *tree_leaves(model.params)])
    expected, mine = expected.to(dtype), mine.to(dtype)
    largest = torch.maximum(expected.abs().amax(), size)
    for together, alone in zip(expected.split(sizes), mine.split(sizes), strict=True):
        if together.numel():
            check_alone(together, alone, together.abs().amax(), largest, "derivatives")


def _expected(model: Model) -> Float[Tensor, " d"]:
    """Return the model's own pullback of the ramp."""
    try:
        return pulled_back(model, model.X)
    except RuntimeError:  # a kernel that has a derivative in float64 alone, as LSTM's on a CPU
        params, X = tree_map(widen_leaf, (model.params, model.X))
        return pulled_back(model._replace(function=in_float64(model.function), params=params), X)


def _pulled_back(program: Program, visited: Visit) -> Float[Tensor, " d"]:
    """Return the pullback of the ramp, summed over the samples' own."""
    outputs = visited.outputs
    n = outputs.shape[0]
    factors = visited.pullback(ramp(outputs).reshape(n, -1, 1))
    weights = torch.ones(n, 1, dtype=torch.float64, device=outputs.device)
    return in_order(torch.cat([combined(factor, weights) for factor in factors]), program.order)


def _wide(program: Program, leaves: list[Tensor], samples: list[Tensor]) -> Program | None:
    """Return the program in float64, if it is narrower and that makes no other function of it."""
    dtype = _narrowest([*leaves, *samples])
    if dtype == torch.float64:
        return None
    graph, rounded = widen(program.graph, dtype)
    wide = program._replace(graph=graph)
    try:
        narrow = visit(program, leaves, samples)
        precise = visit(wide, *tree_map(widen_leaf, (leaves, samples)))
        tolerance = VALUES if rounded else torch.finfo(dtype).eps ** 0.5
        outputs_agree = near(precise.outputs, narrow.outputs, tolerance)
        slopes = _pulled_back(program, narrow), _pulled_back(wide, precise)
        if outputs_agree and near(slopes[1], slopes[0], PULLBACKS):
            return wide
        reason: object = "its outputs or derivatives change"
    except Exception as error:  # noqa: BLE001 - the model was never asked to run in float64
        reason = error
    logger.info("the model is not evaluated in float64: %s", reason)
    return None


def _narrowest(tensors: Sequence[Tensor]) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _signature(name: str, tree: PyTree, skip: int) -> Signature:
    leaves = [
        (path, leaf.shape[skip:], leaf.dtype, leaf.device) for path, leaf in named_leaves(tree)
    ]
    return Signature(name, tree_structure(tree), skip, leaves)


def _check_signature(expected: Signature, tree: PyTree) -> None:
    """Refuse arguments that are not like those that the model was prepared with."""
    name, remedy = expected.name, "Prepare the model anew for these."
    if tree_structure(tree) != expected.structure:
        rule = f"{name} must have the structure that the model was prepared with"
        raise BadType(sentence(rule, str(tree_structure(tree)), remedy))
    for (path, leaf), (_, shape, dtype, device) in zip(
        named_leaves(tree), expected.leaves, strict=True
    ):
        if not isinstance(leaf, Tensor):
            rule = f"{name} must hold tensors"
            raise BadType(sentence(rule, f"{name}{path}: {type(leaf).__name__}", remedy))
        got = (leaf.shape[expected.skip :], leaf.dtype, leaf.device)
        if got != (shape, dtype, device) or leaf.ndim < expected.skip:
            per = " a sample" if expected.skip else ""
            rule = f"{name}{path} must be {dtype}{list(shape)}{per} on {device}, as prepared"
            raise BadValue(sentence(rule, f"{got[1]}{list(got[0])} on {got[2]}", remedy))
