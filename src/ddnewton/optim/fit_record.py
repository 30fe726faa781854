"""The record of a fit, and that of its updates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ddnewton.optim.state import State, UpdateInfo
from ddnewton.quadratic.term import TermLosses
from ddnewton.trees import tree_map
from ddnewton.types import PyTree


class History(NamedTuple):
    """The updates of a fit as tensors on the CPU, an entry for each."""

    losses: Float[Tensor, " t"]
    """After every update, on its points."""
    term_losses: TermLosses
    """Before every update, of the terms by their names, or of the only one."""
    dampings: Float[Tensor, " t"]
    step_norms: Float[Tensor, " t"]
    gradient_norms: Float[Tensor, " t"]
    """Before every update, as the cosines."""
    cosines: Float[Tensor, " t"]
    """What ``gtol`` is compared with: of squared errors, the largest cosine between the residuals
    and what a parameter does to the outputs."""
    attempts: Int[Tensor, " t"]
    accepted: Bool[Tensor, " t"]
    seconds: Float[Tensor, " t"]
    """On the clock, of every update: the first may trace and compile."""


class Fit(NamedTuple):
    """The result of a fit, and, for a callback, what there is of it so far."""

    params: PyTree
    """The fitted parameters, like those at the start."""
    loss: Float[Tensor, ""]
    """The loss there, in float64."""
    updates: int
    """How many updates this fit made; ``state.updates`` counts those before as well."""
    reason: str
    """Why it ended, in words; it begins with "converged" where it did."""
    info: UpdateInfo
    """The record of the update that led to ``params``."""
    state: State
    """For ``fit(…, state=…)``, together with ``params``, to go on from here."""
    history: History

    def __repr__(self) -> str:
        """Return a line; the fields hold all numbers."""
        return f"Fit(loss={float(self.loss):.6g}, updates={self.updates}, reason={self.reason!r})"


def history_of(info: UpdateInfo, cosine: Float[Tensor, ""], seconds: float) -> History:
    """Return the history of one update."""
    entries = History(
        losses=info.loss_after,
        term_losses=info.losses,
        dampings=info.damping,
        step_norms=info.step_norm,
        gradient_norms=info.gradient_norm,
        cosines=cosine,
        attempts=info.attempts,
        accepted=info.accepted,
        seconds=torch.tensor(seconds, dtype=torch.float64, device="cpu"),
    )
    history: History = tree_map(lambda entry: entry.detach().cpu()[None], entries)
    return history


def continued(history: History, further: History) -> History:
    """Return the history of some updates, and of those after them."""
    extended: History = tree_map(lambda *parts: torch.cat(parts), history, further)
    return extended
