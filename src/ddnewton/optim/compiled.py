"""An update under `torch.compile`: one trial in one graph, and uncompiled where that is not all."""

from __future__ import annotations

from jaxtyping import Bool
from torch import Tensor

from ddnewton.errors import sentence
from ddnewton.optim.notices import FLAT_SHARE_WARNED
from ddnewton.optim.settings import Settings
from ddnewton.optim.state import State, UpdateInfo

SEARCH_RULE = "torch.compile makes a graph of updates whose first trial is mostly taken"

FIRST_TRIAL = "the first trial is not all of an update: what follows is not compiled"


def search_obstacle(settings: Settings) -> str:
    """Return why no update is one trial in one graph, the empty string where most are."""
    adaptation, remedy = settings.adaptation, "Pass levenberg_marquardt, spring or a number."
    if adaptation.by_length or settings.trust_radius is not None:
        return sentence(SEARCH_RULE, "a search for a step of some length", remedy)
    if callable(adaptation.rule):
        return sentence(SEARCH_RULE, "a rule as damping", remedy)
    return ""


def is_chosen(settings: Settings, state: State) -> bool | Bool[Tensor, ""]:
    """Return whether an update chooses its damping from a grid, which is left uncompiled."""
    choice = settings.adaptation.choice
    return choice is not None and state.updates % choice.every == 0


def is_all(info: UpdateInfo, ended: Bool[Tensor, ""]) -> Bool[Tensor, ""]:
    """Return whether the first trial is all of an update that ended: nothing to be warned of."""
    still = info.accepted & (info.step_norm == 0)
    return ended & ~still & ~(info.flat_share > FLAT_SHARE_WARNED)
