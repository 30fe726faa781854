"""The edge of the library: what holds for every public function that computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from ddnewton.devices import in_full_float32
from ddnewton.errors import public

P = ParamSpec("P")
R = TypeVar("R")


def computing(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function public that computes: its name is in errors."""
    return public(computing_in_place(function))


def computing_in_place(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function record no graph, and compute in float32 without TF32."""
    return torch.no_grad()(in_full_float32(function))
