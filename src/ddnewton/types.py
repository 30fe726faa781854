"""Types of the arguments that a user passes; shapes stand in the signatures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from torch import Tensor

PyTree: TypeAlias = Any
"""Nested dicts, lists, tuples and NamedTuples with tensors as leaves, or one tensor."""

ModelFn: TypeAlias = Callable[[PyTree, PyTree], Tensor]
"""``model_fn(params, X) -> outputs``, the samples on axis 0 of X's leaves and of the outputs."""

AnyModelFn: TypeAlias = ModelFn | Mapping[Any, ModelFn]
"""One function, or a dict of them: the terms of a loss, whose X and y are dicts as well."""

Criterion: TypeAlias = Callable[[Tensor, PyTree], Tensor]
"""``criterion(outputs, y) -> scalar``, convex in the outputs, of which no two samples interact."""

DampingRule: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``damping(evals [K], evecs [NM, K], gammas [N, K], lambdas [N, K]) -> [K]``."""

Select: TypeAlias = Callable[[Tensor], Tensor | Sequence[int]]
"""``select(evals)``: the eigenvalues to keep, as indices into the ascending ones or as a mask."""

GramWay: TypeAlias = Literal["auto", "structured", "dense", "free"]
"""How the Gram matrix is formed: from the layers, from dense columns, the better of both, or not at
all, where products with it do."""

Precision: TypeAlias = Literal["auto", "float64", "model"]
"""What models are evaluated in: float64 where it matters, float64 always, or their own dtype."""

GramWays: TypeAlias = GramWay | Mapping[Any, GramWay]
"""One way, or a dict of them for the terms of a loss."""
