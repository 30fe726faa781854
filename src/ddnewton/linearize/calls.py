"""How a model is called, and what it means where a call fails.

A model may need autograd: `torch.autograd.grad` inside it, as in a physics-informed net or a force
field. It is then called with autograd recording, as it would be in anyone's own loop.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.linearize.model import Model
from ddnewton.transforms import first_member, is_transformed, untransformed
from ddnewton.trees import on_copies, take, tree_flatten, tree_leaves, tree_map, tree_unflatten
from ddnewton.types import ModelFn, PyTree

Way: TypeAlias = Callable[[ModelFn], ModelFn]
"""How a model is called: `on_copies`, or `recording`."""


def recording(model_fn: ModelFn, X: PyTree) -> ModelFn:
    """Return a function called on copies, with autograd recording.

    Parameters require a gradient, and samples do where those of ``X`` do, for the model may
    differentiate by them.
    """
    flags = [leaf.requires_grad for leaf in tree_leaves(X)]
    on_own_copies = on_copies(model_fn)

    def recorded(params: PyTree, X: PyTree) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            # In front of the copies, so that the model may write to what it gets.
            if not is_transformed():
                params = tree_map(_differentiated, params)
                leaves, spec = tree_flatten(X)
                pairs = zip(leaves, flags, strict=True)
                X = tree_unflatten([_differentiated(x) if flag else x for x, flag in pairs], spec)
            return on_own_copies(params, X)

    return recorded


def with_dense_samples(model_fn: ModelFn, X: PyTree) -> tuple[ModelFn, PyTree]:
    """Return samples that can be taken apart, and a function of them, where ``X`` is sparse."""
    layouts = [leaf.layout for leaf in tree_leaves(X)]
    if all(layout == torch.strided for layout in layouts):
        return model_fn, X

    def of_dense(params: PyTree, X: PyTree) -> Tensor:
        leaves, spec = tree_flatten(X)
        pairs = zip(leaves, layouts, strict=True)
        sparse = [x if kind == torch.strided else x.to_sparse(layout=kind) for x, kind in pairs]
        return model_fn(params, tree_unflatten(sparse, spec))

    return of_dense, tree_map(lambda x: x if x.layout == torch.strided else x.to_dense(), X)


def _differentiated(leaf: Tensor) -> Tensor:
    """Return a leaf that requires a gradient: itself, or a copy."""
    return leaf if leaf.requires_grad else leaf.clone().requires_grad_()


def called(
    evaluate: Callable[[Way], Model],
    model_fn: ModelFn,
    params: PyTree,
    X: PyTree,
    whole_batch: bool,
) -> Model:
    """Evaluate a model as it is or, where that fails, with autograd recording.

    ``whole_batch`` says whether it is evaluated on the whole batch at once, and not in parts.
    """
    try:
        return evaluate(on_copies)
    except (torch.OutOfMemoryError, BadValue, BadType):
        raise
    except Exception as error:
        if torch.compiler.is_compiling():
            raise
        try:
            return evaluate(partial(recording, X=X))
        except torch.OutOfMemoryError:
            raise
        except Exception as again:
            # It may be no error of the model's own, but one of how it is called here.
            _check_outside_transforms(model_fn, params, X, error)
            if not whole_batch and _succeeds(recording(model_fn, X), params, X):
                raise _any_size(again) from again
            if (type(again), str(again)) == (type(error), str(error)):
                raise error from None
            raise


def refusal(model: Model, error: Exception) -> Exception:
    """Return the error of a model that gave outputs, but no derivatives."""
    if isinstance(error, (BadValue, BadType)) or torch.compiler.is_compiling():
        return error
    first_sample_outputs(model)
    _check_outside_transforms(model.function, model.params, model.X, error)
    rule = "model_fn must be differentiable by torch.func or by torch.autograd.grad"
    remedy = "Mend what the error names; a checkpoint takes use_reentrant=False."
    named = BadValue(sentence(rule, first_line(error), remedy))
    named.__cause__ = error
    return named


def first_sample_outputs(model: Model) -> Tensor:
    """Return the outputs of the first sample alone; say so where it cannot be called on one."""
    try:
        return model.function(model.params, take(model.X, slice(0, 1))).detach()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise _any_size(error) from error


def _any_size(error: Exception) -> BadValue:
    """Return the error of a model that takes its batch, but not a part of it."""
    rule = "model_fn must take a batch of any size, one sample included"
    remedy = (
        "Keep in model_fn what all samples share, such as the edges of a graph, and in X what "
        "each has of its own; or make one graph one sample."
    )
    return BadValue(sentence(rule, first_line(error), remedy))


def _check_outside_transforms(
    model_fn: ModelFn, params: PyTree, X: PyTree, error: Exception
) -> None:
    """Say that ``vmap`` is what a model fails under, where it does not fail outside."""
    if not is_transformed():
        return
    params, X = tree_map(first_member, (params, X))
    with untransformed():
        refused = _succeeds(recording(model_fn, X), params, X)
    if refused:
        rule = "under torch.func.vmap, model_fn must be one that torch.func differentiates"
        remedy = "Pass prepare(model_fn, …) in its place, or loop over the members of the ensemble."
        raise BadValue(sentence(rule, first_line(error), remedy)) from error


def _succeeds(function: ModelFn, params: PyTree, X: PyTree) -> bool:
    """Return whether a call of a model raises nothing."""
    try:
        function(params, X)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: BLE001 - an error of the model's own may be of any kind
        return False
    return True


def first_line(error: Exception) -> str:
    """Return an error in a line: its type, and the first line of its message."""
    return " ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
