"""A model at a point: the record that its linearization starts from, that of this, a pullback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.columns.factors import Jacobian
from ddnewton.linearize.basis import Basis
from ddnewton.transforms import linear_map
from ddnewton.trees import take, tree_flatten, tree_unflatten
from ddnewton.types import ModelFn, PyTree


class Model(NamedTuple):
    """A model at a point: the function, its arguments, and what it returns for them."""

    function: ModelFn
    params: PyTree
    X: PyTree
    outputs: Float[Tensor, "n ..."]
    complex_outputs: bool = False  # as pairs of reals, along the last axis
    rounding: float = 0.0  # the eps of the narrowest dtype that it casts to inside, 0 without any
    pullback: Callable[[Tensor], list[Tensor]] | None = None  # of the batch, where it is kept
    at_once: int | None = None  # on how many samples at a time it has been run, None for all


def forgotten(*_: Any) -> Any:
    """Stand for a function of samples that are held no longer."""
    raise AssertionError


def at_samples(model: Model, samples: Int[Tensor, " _"] | slice) -> Model:
    """Return the model at some samples of its batch."""
    return model._replace(X=take(model.X, samples), outputs=model.outputs[samples], pullback=None)


def pullback_of(
    function: Callable[[PyTree], Tensor], params: PyTree
) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
    """Return a function's value, and its pullback of stacked cotangents to leaves of ``params``."""
    leaves, spec = tree_flatten(params)
    value, pullback, _ = linear_map(lambda *p: (function(tree_unflatten(p, spec)), ()), *leaves)
    return value, pullback


class Linearization(NamedTuple):
    """A model at a batch: its outputs and the means to differentiate it.

    ``jacobian`` pulls back a basis L_n of the outputs of some samples, None for all: the columns
    J_nᵀ L_n. ``function`` returns the outputs of some samples at parameters other than ``leaves``.
    ``in_float64`` returns the same in float64, at twice the cost; None if it is so already, or
    cannot be. ``depends`` says whether the outputs depend on a parameter, None where a
    call of ``function`` shows that. ``summed`` returns the sum of columns, one a sample, as a
    single one; None where products with it take no less time than with all of them.
    """

    outputs: Float[Tensor, "n ..."]  # in the model's own dtype
    precise: Float[Tensor, "n ..."]  # in the dtype in which they are computed
    jacobian: Callable[[Basis, Int[Tensor, " n"] | None], Jacobian]
    function: Callable[[Sequence[Tensor], Int[Tensor, " n"] | slice], Tensor]
    leaves: Sequence[Tensor]
    in_float64: Callable[[], Linearization] | None
    complex_outputs: bool  # which are pairs of reals here
    depends: Callable[[], bool] | None = None
    summed: Callable[[Basis, Int[Tensor, " n"] | None], Jacobian] | None = None
