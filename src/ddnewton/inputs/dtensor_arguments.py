"""Arguments that are DTensors, at the edge of the library: outside placed, inside whole.

See `ddnewton.dtensors` for what that means.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddnewton.dtensors import (
    ROOM,
    agreed,
    among_dtensors,
    is_dtensor,
    placed_like,
    rows_of_ranks,
    samples_placed_like,
    twice_differentiable,
    whole,
)
from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.inputs.terms import TermArguments
from ddnewton.process import ONE_THREAD
from ddnewton.trees import tree_leaves, tree_map
from ddnewton.types import GramWays, ModelFn, PyTree

FREE_REMEDY = 'Leave gram at "auto", or pass "free": steps and leading eigenpairs by products.'


def any_dtensor(tree: PyTree) -> bool:
    """Return whether a leaf of a tree is a DTensor."""
    return ROOM in sys.modules and any(map(is_dtensor, tree_leaves(tree)))


def whole_tree(tree: PyTree) -> PyTree:
    """Return a tree with plain tensors, whole on every rank, in place of its DTensors."""
    return tree_map(whole, tree) if any_dtensor(tree) else tree


def placed_tree(tree: PyTree, like: PyTree) -> PyTree:
    """Return a tree of whole tensors placed as those of another are."""
    return tree_map(placed_like, tree, like) if any_dtensor(like) else tree


def ways_of(gram: GramWays, params: PyTree) -> GramWays:
    """Return how Gram matrices are formed: with parameters that are DTensors, not at all."""
    if not any_dtensor(params):
        return gram
    ways = gram.values() if isinstance(gram, Mapping) else [gram]
    for way in ways:
        if way not in ("auto", "free"):
            rule = 'gram must be "free" or "auto" where params are DTensors'
            raise BadValue(sentence(rule, repr(way), FREE_REMEDY))
    return "free"


def on_whole(term: TermArguments, params: PyTree) -> TermArguments:
    """Return a term as one of whole tensors, for parameters that are DTensors.

    Its model gets parameters and inputs placed as they are here, and its outputs are gathered.
    """
    if term.in_batches:
        return term._replace(model_fn=partial(_called, term.model_fn, params, None))
    function = partial(_called, term.model_fn, params, term.X)
    return term._replace(model_fn=function, X=whole_tree(term.X), y=whole_tree(term.y))


def check_same_on_ranks(params: PyTree, told: Mapping[str, object]) -> None:
    """Require all ranks of some parameters to have been given the same, told by its names."""
    leaf = next(filter(is_dtensor, tree_leaves(params)))
    numbers = [int(sha256(str(text).encode()).hexdigest()[:15], 16) for text in told.values()]
    rows = rows_of_ranks(torch.tensor(numbers, device="cpu"), leaf)
    for name, column in zip(told, rows.unbind(1), strict=True):
        if bool((column != column[0]).any()):
            rule = f"{name} must be the same on all ranks where params are DTensors"
            remedy = "Pass the whole batch on each, or as DTensors sharded along axis 0."
            raise BadValue(sentence(rule, "other values on one than on the first", remedy))


def check_places(terms: Sequence[TermArguments]) -> None:
    """Require plain inputs and targets, as those of parameters that are plain."""
    for term in terms:
        if any_dtensor((term.X, term.y)):
            rule = "X and y may hold DTensors only where params do"
            remedy = "Distribute params as well, replicated: distribute_tensor(p, mesh)."
            raise BadType(sentence(rule, "DTensors beside params that are plain", remedy))


def _called(model_fn: ModelFn, params: PyTree, X: PyTree, *whole_arguments: PyTree) -> Tensor:
    """Call a model with whole tensors placed as some others; inputs with None as they are."""
    whole_params, samples = whole_arguments
    # Arguments as the caller has them.
    first = next(filter(is_dtensor, tree_leaves(params)))
    placed = tree_map(partial(_as_argument, first), whole_params, params)
    if X is not None:
        samples = tree_map(samples_placed_like, samples, X)
    # Attention by products of matrices: DTensors know no other on every device.
    with ONE_THREAD, sdpa_kernel(SDPBackend.MATH):
        outputs: Any = model_fn(placed, samples)
    if isinstance(outputs, Tensor) and (outputs.is_floating_point() or outputs.is_complex()):
        outputs = agreed(outputs, first, check_mean)
    differentiated = isinstance(outputs, Tensor) and outputs.requires_grad
    result: Tensor = twice_differentiable(outputs) if differentiated else outputs
    return result


def _as_argument(first: Tensor, tensor: Tensor, leaf: Tensor) -> Tensor:
    """Return a whole tensor as the model takes it in place of a leaf, beside a first DTensor."""
    if is_dtensor(leaf):
        return placed_like(tensor, leaf)
    return among_dtensors(tensor, first, check_mean)


def check_mean(tensor: Tensor, mean: Tensor) -> None:
    """Require a plain tensor of this rank to be the mean over all, up to rounding.

    A mean that is all but zero may be the rounding of terms that cancel; nan is told elsewhere.
    """
    if not mean.numel():
        return
    eps, size = torch.finfo(mean.dtype).eps, mean.abs().amax()
    if bool((tensor - mean).abs().amax() > (eps**0.5 * size).clamp(min=eps**0.75)):
        rule = "plain tensors that leave a model of DTensors must be the same on all ranks"
        remedy = (
            "Gather outputs, as by ColwiseParallel(output_layouts=Replicate()), and let plain "
            "parameters meet no part of a tensor that one rank alone has."
        )
        raise BadValue(sentence(rule, "other values on one of them", remedy))
