"""What is computed in float64: the one room that decides on it.

In float32 a confident net's logits are wrong by 1e-6, and so, relatively, are all curvatures; its
Jacobians are wrong by eps, and directions whose singular values differ by 1e4 turn that into 1e-3
of the step. Both vanish when the same function is evaluated in float64. So, where parameters,
inputs or outputs are narrower:

- A model by its Jacobians is evaluated in float64 from end to end (`widened`).
- A model by its layers is so where a step takes few flops, or is compiled (`float64_throughout`).
  Where it takes many, it is evaluated in its own dtype, and once more in float64 if a damping
  lets curvatures count that float32 does not resolve (`resolved_in_float32`).
- What casts to fewer digits than its own inside, by hand or by autocast, does so no longer in
  float64. Where it stays as it is, a float64 model with a softmax in float32, say, the rounding of
  its columns is that of its narrowest cast (`cast_rounding` in widening.py).
- Neither is where float64 makes another function of the model, or where it cannot be evaluated so:
  a kernel has no float64, a tensor from outside is written to. Values and one pullback are
  compared with the model itself, coarsely: the two differ by the rounding of the narrower one
  (`if_same_function`).
- The loss is in float64 always, at outputs from float64 where the model has them, unless it does
  not take float64 (`loss_in_float64`); of a callable the constants inside too (`in_dtype_of`).

So it is with ``precision="auto"`` where float64 is fast. Where it is slow, on most GPUs, what is
not cheap stays in its own dtype whatever the damping, and so does everything with "model". Then
columns are wrong by eps, and of these the products are exact, so that no more is lost: mostly 1e-6
of a step for any damping, but up to eps √(λ_max / (λ_k + δ_k)) of it along e_k, 1e-3 where singular
values differ by 1e4. `NewtonInfo.rounding` is that eps. At its kink a ReLU may be on another side
than in float64, or in another call. With "float64" the model is in float64, or refused by name.

How a function is widened is in widening.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.devices import has_fast_float64
from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.linearize.model import Model, pullback_of
from ddnewton.linearize.widening import Widen, in_float64, widen_leaf
from ddnewton.transforms import any_known, unwrapped
from ddnewton.trees import parameter_count, sample_count, tree_leaves, tree_map
from ddnewton.types import Criterion, Precision, PyTree

logger = logging.getLogger(__name__)

T = TypeVar("T")

CHEAP_FLOPS = 1e9
"""Up to how many flops of a step a model is taken in float64 from end to end."""

FLOAT32_RESOLUTION = 1e4
"""From the largest curvature down to which ratio float32 is enough."""

VALUE_TOLERANCE, PULLBACK_TOLERANCE = 1 / 64, 1 / 8
"""How far, relatively, float64 may lie from bfloat16 inside the model, and pullbacks from another
side of a kink: far less than from another function."""

KEPT_ENTRIES = 2**22
"""Up to how many parameters, times samples, the graph of a batch is kept: a few of its columns."""

CHANGED = "its outputs or derivatives change"


def float64_throughout(
    precision: Precision, device: torch.device, flops: Callable[[], float]
) -> bool:
    """Return whether a model by its layers is in float64 from end to end, given a step's flops.

    What is compiled is, where float64 is fast: it could not come back for more digits.
    """
    if precision != "auto":
        return precision == "float64"
    if torch.compiler.is_compiling():
        return has_fast_float64(device)
    return flops() <= CHEAP_FLOPS


def float64_on_demand(precision: Precision, device: torch.device) -> bool:
    """Return whether a model that stays in its own dtype is evaluated in float64 where it has to.

    Otherwise its columns are those of its own dtype, and all sums of their products are exact.
    """
    return precision == "auto" and has_fast_float64(device)


def float64_columns(precision: Precision, device: torch.device, flops: float) -> bool:
    """Return whether a model by dense columns is in float64, given the flops of their products."""
    return float64_on_demand(precision, device) or float64_throughout(
        precision, device, lambda: flops
    )


def check_float64(precision: Precision, dtype: torch.dtype, rounding: float) -> None:
    """Refuse a model that is not in float64 from end to end where it has been asked for."""
    if precision == "float64" and (dtype != torch.float64 or rounding):
        rule = 'precision="float64" needs a model that is the same function in float64'
        what = "a model that casts to fewer digits inside" if rounding else f"a model in {dtype}"
        got = f"{what}, of which no float64 version is found: {CHANGED}, or a kernel has none"
        raise BadValue(sentence(rule, got, 'Pass "auto", or let model_fn cast to float64 itself.'))


def resolved_in_float32(smallest: float | Tensor, largest: Float[Tensor, ""]) -> bool:
    """Return whether float32 resolves curvatures as small as this beside the largest.

    What is compiled cannot tell, and counts as resolved.
    """
    return not any_known(largest > smallest * FLOAT32_RESOLUTION)


def loss_in_float64(function: Callable[[Tensor], T], precise: Tensor, outputs: Tensor) -> T:
    """Apply a function of the loss to outputs in float64, or as they are if it refuses these."""
    try:
        return function(precise.double())
    except (torch.OutOfMemoryError, BadType, BadValue):
        raise
    except Exception:  # noqa: BLE001 - the loss was never asked to take float64
        return function(outputs)


def in_dtype_of(outputs: Tensor, criterion: Criterion) -> Criterion:
    """Return the criterion in the outputs' dtype, constants included, where that is float64."""
    return in_float64(criterion) if outputs.dtype == torch.float64 else criterion


class Widened(NamedTuple, Generic[T]):
    """A model that was evaluated in float64, to be compared with the model itself."""

    model: T
    outputs: Float[Tensor, "n ..."]
    rounded: bool  # by what is narrower than the model's own dtype inside
    pullback: Callable[[], Float[Tensor, " d"]]


def if_same_function(
    evaluate: Callable[[], Widened[T]],
    outputs: Float[Tensor, "n ..."],
    pullback: Callable[[], Float[Tensor, " d"] | None],
    dtype: torch.dtype,
) -> T | None:
    """Return a model in float64 if its outputs and a pullback are the model's own, else None.

    The model's own are those in ``dtype``; a pullback of None is not compared. Whatever the reason
    for None, it shows in an error, in the values or in the pullback, and is logged.
    """
    try:
        wide = evaluate()
        tolerance = VALUE_TOLERANCE if wide.rounded else torch.finfo(dtype).eps ** 0.5
        if wide.outputs.shape == outputs.shape and _near(wide.outputs, outputs, tolerance):
            expected = pullback()
            # Rounding in bfloat16 puts some units on the other side of a kink, which changes few
            # entries by much.
            near = _near_on_the_whole if wide.rounded else _near
            if expected is None or near(wide.pullback(), expected, PULLBACK_TOLERANCE):
                return wide.model
        reason: object = CHANGED
    except Exception as error:  # noqa: BLE001 - the model was never asked to run in float64
        reason = error
    logger.info("the model is not evaluated in float64: %s", reason)
    return None


def widened(
    model: Model, batches: Callable[[PyTree], Sequence[PyTree]], precision: Precision = "auto"
) -> Model:
    """Return the model in float64 where it is the same function, else the model as it is.

    Where ``precision`` is "float64" so are casts inside a model of float64, or it is refused.
    """
    dtype = narrowest(tree_leaves((model.outputs, model.params, model.X)))
    if dtype == torch.float64 and not (precision == "float64" and model.rounding):
        return model
    mode = Widen(dtype)
    function = in_float64(model.function, mode)
    params, X = tree_map(widen_leaf, model.params), tree_map(widen_leaf, model.X)

    def evaluate() -> Widened[Model]:
        # The pullback of a small batch is kept for the columns to be compared with.
        parts, pullback = batches(X), None
        if len(parts) == 1 and sample_count(X) * parameter_count(params) <= KEPT_ENTRIES:
            outputs, pullback = pullback_of(lambda p: function(p, X), params)
        else:
            outputs = torch.cat([function(params, batch) for batch in parts])
        if outputs.dtype != torch.float64:
            raise BadType(CHANGED)
        wide = Model(function, params, X, outputs, pullback=pullback)
        return Widened(wide, outputs, mode.rounded, lambda: pulled_back(wide, parts[0]))

    def pullback() -> Tensor | None:
        try:
            expected = pulled_back(model, batches(model.X)[0])
        except RuntimeError:  # it has no derivative in its own dtype: nothing to compare with
            return None
        return expected if bool(unwrapped(expected).isfinite().all()) else None

    wide = if_same_function(evaluate, model.outputs, pullback, dtype)
    if wide is None:
        check_float64(precision, dtype, model.rounding)
        return model
    return wide


def narrowest(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the floating-point dtype with the fewest digits among those of tensors."""
    return fewest_digits([tensor.dtype for tensor in tensors])


def fewest_digits(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """Return the floating-point dtype with the fewest digits."""
    floats = {dtype for dtype in dtypes if dtype.is_floating_point}
    return max(floats, key=lambda dtype: torch.finfo(dtype).eps)


def pulled_back(model: Model, X: PyTree) -> Float[Tensor, " d"]:
    """Return the pullback of the ramp over a batch, to be compared with another's."""
    outputs, pullback = model.outputs, model.pullback
    if pullback is None:
        outputs, pullback = pullback_of(lambda p: model.function(p, X), model.params)
    return torch.cat([leaf.double().reshape(-1) for leaf in pullback(ramp(outputs)[None])])


def ramp(outputs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return numbers of any sign and size, no two the same."""
    count, device = outputs.numel(), outputs.device
    numbers = torch.arange(1, count + 1, dtype=torch.float64, device=device)
    return numbers.cos().reshape(outputs.shape).to(outputs.dtype)


def _near(wide: Tensor, narrow: Tensor, tolerance: float) -> bool:
    """Return whether two tensors differ by no more than a share of the largest entry."""
    distance, size = unwrapped((wide - narrow).abs().amax()), unwrapped(narrow.abs().amax())
    return bool((distance <= tolerance * size).all())


def _near_on_the_whole(wide: Tensor, narrow: Tensor, tolerance: float) -> bool:
    """Return whether two tensors differ by no more than a share of their norm."""
    distance, size = map(torch.linalg.vector_norm, (wide - narrow, narrow))
    return bool((unwrapped(distance) <= unwrapped(tolerance * size)).all())
