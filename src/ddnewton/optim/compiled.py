"""An update under `torch.compile`: one trial in one graph, and uncompiled where that is not all."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

from ddnewton.criteria import Criteria
from ddnewton.criteria.monte_carlo import generators_of
from ddnewton.optim.notices import FLAT_SHARE_WARNED
from ddnewton.optim.settings import Settings
from ddnewton.optim.state import State, UpdateInfo

P = ParamSpec("P")
R = TypeVar("R")


def has_one_trial(settings: Settings, criterion: Criteria, state: State) -> bool | Bool[Tensor, ""]:
    """Return whether an update is one trial, if that is taken: no search over lengths or a grid.

    Nor may anything be drawn, for the update may be made once more.
    """
    adaptation = settings.adaptation
    by_length = adaptation.by_length or settings.trust_radius is not None
    if by_length or callable(adaptation.rule) or generators_of(criterion):
        return False
    choice = adaptation.choice
    return choice is None or state.updates % choice.every != 0


def is_all(info: UpdateInfo) -> Bool[Tensor, ""]:
    """Return whether the first trial is all of an update: taken, and nothing to be warned of."""
    return info.accepted & (info.step_norm > 0) & ~(info.flat_share > FLAT_SHARE_WARNED)


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that `torch.compile` leaves alone."""
    left_alone: Callable[P, R] = torch.compiler.disable(function)
    return left_alone
