"""The model in float64, whatever dtype it has.

In float32 a confident net's logits are wrong by 1e-6, and so, relatively, are all curvatures;
its Jacobians are wrong by eps, and directions whose singular values differ by 1e4 turn that into
1e-3 of the step. Both vanish when the same function is evaluated in float64. Buffers, constants
and casts inside the model are in the way of that; a `TorchFunctionMode` widens every tensor that
an operation takes or gives. What comes out, values and one pullback, is compared with the model
itself, coarsely: the two differ by the rounding of the narrower one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp
from torch.overrides import TorchFunctionMode

from ddnewton.transforms import unwrapped
from ddnewton.trees import tree_leaves, tree_map
from ddnewton.types import ModelFn, PyTree

logger = logging.getLogger(__name__)

CASTS = {"to", "type", "type_as", "float", "half", "bfloat16"}

VALUE_TOLERANCE, PULLBACK_TOLERANCE = 1 / 64, 1 / 8
"""How far, relatively, float64 may lie from bfloat16 inside the model, and slopes from another
side of a kink: far less than from another function."""


class Model(NamedTuple):
    """A model at a point: the function, its arguments, and what it returns for them."""

    function: ModelFn
    params: PyTree
    X: PyTree
    outputs: Float[Tensor, "n ..."]


class Widen(TorchFunctionMode):
    """Give every operation float64 tensors in place of narrower ones, and pass on no others.

    Results are widened as well, so that what is written into a new tensor is not lost in a copy
    of it; a cast to a narrower dtype returns what it was given, or a copy of it, as the cast would
    have in the model's own dtype. ``rounded`` tells whether there were casts below that, by hand
    or by autocast.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.rounded = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        args = tuple(map(widen_leaf, args))
        result = func(*args, **{k: widen_leaf(v) for k, v in (kwargs or {}).items()})
        self.rounded |= any(map(torch.is_autocast_enabled, ("cpu", "cuda")))
        if getattr(func, "__name__", "") in CASTS and _narrower(result, args[0]):
            self.rounded |= result.dtype.itemsize < self.dtype.itemsize
            source = args[0].to(result.device)
            return source if result.dtype == self.dtype else source.clone()
        return widen_leaf(result)


def in_float64(function: Callable[..., Tensor], mode: Widen | None = None) -> Callable[..., Tensor]:
    """Return a function that computes in float64, whatever its arguments are."""
    mode = mode or Widen()

    def wide(*args: PyTree) -> Tensor:
        with mode:
            return function(*args)

    return wide


def widened(model: Model, batches: Callable[[PyTree], Sequence[PyTree]]) -> Model:
    """Return the model in float64 where it can be evaluated so, else the model as it is.

    A model that calls a kernel that has no float64, or writes into a narrow tensor from outside,
    cannot; whatever the reason, it shows in an error, in the values or in a pullback.
    """
    dtype = narrowest(tree_leaves((model.outputs, model.params, model.X)))
    if dtype == torch.float64:
        return model
    mode = Widen(dtype)
    function = in_float64(model.function, mode)
    params, X = tree_map(widen_leaf, model.params), tree_map(widen_leaf, model.X)
    try:
        outputs = torch.cat([function(params, batch) for batch in batches(X)])
        wide = Model(function, params, X, outputs)
        same = outputs.shape == model.outputs.shape and outputs.dtype == torch.float64
        values = tolerance(dtype, mode.rounded)
        if same and near(outputs, model.outputs, values) and _same_slopes(wide, model, batches):
            return wide
        reason: object = "its outputs or derivatives change"
    except Exception as error:  # noqa: BLE001 - the model was never asked to run in float64
        reason = error
    logger.info("the model is not evaluated in float64: %s", reason)
    return model


def narrowest(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the floating-point dtype with the fewest digits."""
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def tolerance(dtype: torch.dtype, rounded: bool) -> float:
    """Return how far values in float64 may lie from those of a model that may round on purpose."""
    return VALUE_TOLERANCE if rounded else torch.finfo(dtype).eps ** 0.5


def _same_slopes(wide: Model, narrow: Model, batches: Callable[[PyTree], Sequence[PyTree]]) -> bool:
    """Return whether a pullback of the first batch comes out alike."""
    try:
        expected = pulled_back(narrow, batches(narrow.X)[0])
    except RuntimeError:  # the narrow model has no derivative; nothing stands against the wide
        return True
    return not _finite(expected) or near(
        pulled_back(wide, batches(wide.X)[0]), expected, PULLBACK_TOLERANCE
    )


def pulled_back(model: Model, X: PyTree) -> Float[Tensor, " d"]:
    """Return one pullback of a batch, to be compared with another's."""
    outputs, pullback, *_ = vjp(lambda p: model.function(p, X), model.params)
    leaves = tree_leaves(pullback(ramp(outputs)))
    return torch.cat([leaf.double().reshape(-1) for leaf in leaves])


def ramp(outputs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return numbers of any sign and size, no two the same."""
    numbers = torch.arange(1, outputs.numel() + 1, dtype=outputs.dtype, device=outputs.device)
    return numbers.cos().reshape(outputs.shape)


def near(wide: Tensor, narrow: Tensor, tolerance: float) -> bool:
    """Return whether two tensors differ by no more than a share of the largest entry."""
    distance, size = unwrapped((wide - narrow).abs().amax()), unwrapped(narrow.abs().amax())
    return bool((distance <= tolerance * size).all())


def _finite(tensor: Tensor) -> bool:
    return bool(unwrapped(tensor).isfinite().all())


def _narrower(result: Any, source: Any) -> bool:
    """Return whether a cast lost digits."""
    floats = all(isinstance(x, Tensor) and x.is_floating_point() for x in (result, source))
    return floats and result.dtype.itemsize < source.dtype.itemsize


def widen_leaf(leaf: Any) -> Any:
    """Return a narrow floating-point tensor in float64, anything else as it is."""
    # A second .double() would be a view, and inside functorch not the tensor that was written to.
    if isinstance(leaf, Tensor):
        narrow = leaf.is_floating_point() and leaf.dtype != torch.float64
        return leaf.double() if narrow else leaf
    if type(leaf) in (list, tuple):
        return type(leaf)(map(widen_leaf, leaf))
    return leaf
