"""Refusal of criteria that read what is trained: a loss is differentiated along its outputs alone.

A penalty on the weights inside a criterion would count as a constant, and parameters of its own
would never be trained; nothing in the result would show it. What requires a gradient shows when the
criterion is evaluated on outputs that require none, and a leaf of the parameters, which need not
require any, when an operation takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ddnewton.criteria.loss import Loss
from ddnewton.errors import BadValue, sentence
from ddnewton.linearize.module_state import restoring
from ddnewton.transforms import first_member, untransformed
from ddnewton.trees import tree_leaves, tree_map
from ddnewton.types import Criterion, PyTree

RULE = (
    "criterion must read nothing that is trained: its result on detached outputs must be one that "
    "requires no gradient"
)
REMEDY = (
    "For a penalty on the weights pass weight_decay to the optimizer, or let the model return what "
    "is penalised as further outputs. Train what the criterion holds elsewhere; detach, or freeze "
    "by requires_grad_(False), what is constant."
)

CONSTANTS = {Tensor.detach, Tensor.data.__get__}  # type: ignore[attr-defined]
"""Functions by which a criterion says that it takes a tensor as a constant."""

NUMBERS = {"item", "tolist", "numpy", "__float__", "__array__"}
"""Functions that read the values of a tensor and return no tensor."""


def check_holds_no_parameters(criterion: object) -> None:
    """Require a criterion that is a module to have no parameters that require a gradient."""
    if isinstance(criterion, nn.Module):
        for name, p in criterion.named_parameters():
            if p.requires_grad:
                got = f"{type(criterion).__name__} with a parameter {name!r} of its own"
                raise BadValue(sentence(RULE, got, REMEDY))


def check_options_are_constant(options: dict[str, Any]) -> None:
    """Require the options of a loss, such as weights, to require no gradient."""
    for name, value in options.items():
        if isinstance(value, Tensor) and value.requires_grad:
            got = f"{name} that requires a gradient"
            raise BadValue(sentence(RULE, got, REMEDY))


def check_constant(criterion: Criterion, outputs: Tensor, y: PyTree) -> None:
    """Require a criterion's result on detached outputs to require no gradient.

    Where torch compiles nothing is checked. A criterion that fails here, where autograd records,
    is judged by how it fails, or does not, where it is used.
    """
    if torch.compiler.is_compiling():
        return
    try:
        with untransformed(), torch.inference_mode(False), torch.enable_grad():
            f, targets = tree_map(lambda x: first_member(x).clone(), (outputs, y))
            value = restoring(criterion)(f, targets)
    except BadValue:
        raise
    except Exception:  # noqa: BLE001 - any error comes again where the criterion is used
        return
    if isinstance(value, Tensor) and value.requires_grad:
        got = "a result that requires a gradient"
        raise BadValue(sentence(RULE, got, REMEDY))


class Reads(TorchFunctionMode):
    """Refuse operations that take one of some tensors, the leaves of the parameters."""

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        super().__init__()
        self.leaves = {id(leaf) for leaf in leaves}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result, name = func(*args, **kwargs), getattr(func, "__name__", "")
        # A shape or a dtype is no value.
        results = result if isinstance(result, (tuple, list)) else (result,)
        reads = any(isinstance(part, Tensor) for part in results) or name in NUMBERS
        if reads and func not in CONSTANTS and any(map(self._has_leaf, (*args, *kwargs.values()))):
            got = f"a leaf of params in {name or func}"
            raise BadValue(sentence(RULE, got, REMEDY))
        return result

    def _has_leaf(self, argument: object) -> bool:
        """Return whether an argument of an operation is a leaf, or a sequence with one in it."""
        if isinstance(argument, (tuple, list)):
            return any(map(self._has_leaf, argument))
        return id(argument) in self.leaves


def without_params(loss: Loss, params: PyTree) -> Loss:
    """Return a loss whose check refuses to read the parameters as well."""
    return loss._replace(check=partial(_check, loss.check, tree_leaves(params)))


def _check(
    check: Callable[[Tensor, PyTree], None], leaves: Sequence[Tensor], outputs: Tensor, y: PyTree
) -> None:
    """Check a batch, and refuse to read some leaves meanwhile."""
    if torch.compiler.is_compiling():
        check(outputs, y)
        return
    with Reads(leaves):
        check(outputs, y)
