"""A model at a point: the record that its linearization starts from."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.trees import take
from ddnewton.types import ModelFn, PyTree


class Model(NamedTuple):
    """A model at a point: the function, its arguments, and what it returns for them."""

    function: ModelFn
    params: PyTree
    X: PyTree
    outputs: Float[Tensor, "n ..."]
    rounding: float = 0.0  # the eps of the narrowest dtype that it casts to inside, 0 without any


def at_samples(model: Model, samples: Int[Tensor, " _"] | slice) -> Model:
    """Return the model at some samples of its batch."""
    return model._replace(X=take(model.X, samples), outputs=model.outputs[samples])
