"""What an optimizer says once, as a warning: that of the gradient no step, or no part, is made."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ddnewton.errors import warn
from ddnewton.optim.local_model import LocalModel
from ddnewton.optim.search import Searched, Step
from ddnewton.optim.settings import Settings
from ddnewton.optim.solved_trials import TrialSteps
from ddnewton.optim.state import UpdateInfo
from ddnewton.quadratic.flat import check_slopes, steep_weights
from ddnewton.quadratic.matrix_free.free_model import FreeModel
from ddnewton.quadratic.quadratic_model import QuadraticModel
from ddnewton.transforms import any_known, unwrapped

FLAT_SHARE_WARNED = 0.01
"""From which share without curvature upwards a gradient is worth a warning."""


@dataclass(frozen=True)
class Notices:
    """The kinds of warnings that an optimizer has given; no result depends on them."""

    given: set[str] = field(default_factory=set)

    def once(self, kind: str, message: str) -> None:
        """Warn, unless there was a warning of this kind before, or there is nothing to say."""
        if message and kind not in self.given:
            self.given.add(kind)
            warn(message)


def notice(
    notices: Notices, local: LocalModel, settings: Settings, searched: Searched, info: UpdateInfo
) -> None:
    """Warn, once each, of slopes without curvature and of an update that moves nothing."""
    if torch.compiler.is_compiling():
        return
    # Without a complement, a step follows only what has curvature; that is known by directions.
    name, trials = local.model.names, local.trials
    by_directions = isinstance(trials, TrialSteps) and trials.decompositions.directions
    followed = by_directions and settings.complement is None
    if followed and any_known(info.flat_share > FLAT_SHARE_WARNED):
        share = float(unwrapped(info.flat_share).nan_to_num().amax())
        notices.once(
            "flat",
            f"{share:.0%} of the squared gradient of {name} has no curvature, and steps leave it "
            "out: at some samples the loss is flat, but not level. Pass majorized(criterion), "
            "fisher(criterion), or a complement, with which all of the gradient counts.",
        )
    # A step of no length is none, unless the gradient is zero or the learning rate is.
    if searched.is_still and _stands_still(local, searched.step):
        assert isinstance(local.model, QuadraticModel)
        assert isinstance(local.trials, TrialSteps)
        check_slopes(local.model, local.trials.matrices, curved=True)
        notices.once(
            "still",
            f"an update moved nothing, though the gradient of {name} is not zero: every direction "
            "along which it has a slope was skipped, by select or by an infinite damping.",
        )


def _stands_still(local: LocalModel, step: Step) -> bool:
    """Return whether a step of no length is taken where the gradient stands out from rounding."""
    if isinstance(local.model, FreeModel):
        return False
    still = step.taken & (step.outcome.length == 0)
    moving = (step.rate > 0).any()
    steep = (steep_weights(local.model) != 0).any()
    noise = local.noise * local.curvature.trace
    return any_known(still & moving & steep & (local.gradient_norm.square() > noise))
