"""The model in float64, whatever dtype it has.

In float32 a confident net's logits are wrong by 1e-6, and so, relatively, are all curvatures;
its Jacobians are wrong by eps, and directions whose singular values differ by 1e4 turn that into
1e-3 of the step. Both vanish when the same function is evaluated in float64. Buffers, constants
and casts inside the model are in the way of that; a `TorchFunctionMode` widens them as they are
used. What comes out is compared with what the model itself returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ddnewton.transforms import bare
from ddnewton.types import ModelFn, PyTree


class Model(NamedTuple):
    """A model at a point: the function, its arguments, and what it returns for them."""

    function: ModelFn
    params: PyTree
    X: PyTree
    outputs: Float[Tensor, "n ..."]


class Widen(TorchFunctionMode):
    """Give every operation float64 tensors in place of narrower ones."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return func(*map(_widen, args), **{k: _widen(v) for k, v in (kwargs or {}).items()})


def in_float64(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function of tensors that computes in float64."""

    def wide(*args: PyTree) -> Tensor:
        with Widen():
            return function(*tree_map(_widen, args))

    return wide


def widened(model: Model, batches: Callable[[PyTree], list[PyTree]]) -> Model:
    """Return the model in float64 where it can be evaluated so, else the model as it is.

    A model that writes into a narrow tensor of its own, or calls a kernel that has no float64,
    cannot; whatever the reason, it shows in an error or in the outputs.
    """
    if model.outputs.dtype == torch.float64:
        return model
    function = in_float64(model.function)
    params, X = tree_map(_widen, model.params), tree_map(_widen, model.X)
    try:
        outputs = torch.cat([function(params, batch) for batch in batches(X)])
    except Exception:  # noqa: BLE001 - the model was never asked to run in float64
        return model
    same = outputs.dtype == torch.float64 and outputs.shape == model.outputs.shape
    if not same or not _agree(outputs, model.outputs):
        return model
    return Model(function, params, X, outputs)


def _agree(wide: Float[Tensor, "n ..."], narrow: Float[Tensor, "n ..."]) -> bool:
    """Return whether two evaluations differ by no more than rounding can explain."""
    distance, scale = bare((wide - narrow).abs().amax()), bare(narrow.abs().amax())
    return bool((distance <= torch.finfo(narrow.dtype).eps ** 0.5 * scale).all())


def _widen(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.double() if leaf.is_floating_point() else leaf
    if type(leaf) in (list, tuple):
        return type(leaf)(map(_widen, leaf))
    return leaf
