"""What an optimizer is told besides the model, the loss and the options of a step."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor

from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.inputs.checks import check_nonnegative, check_positive
from ddnewton.inputs.scale import Scale, check_scale
from ddnewton.optim.adaptation import Adaptation, LearningRate
from ddnewton.optim.box import Box
from ddnewton.trees import named_leaves, tree_flatten, tree_leaves
from ddnewton.types import PyTree

Complement: TypeAlias = float | Literal["damping"] | None
"""Damping outside the kept directions: a number, that of all directions, or nothing there."""

WeightDecay: TypeAlias = float | Tensor | PyTree
"""A number ≥ 0, or a pytree like the parameters with one for every leaf."""


class Settings(NamedTuple):
    """How a step follows from the steps that damping leads to."""

    adaptation: Adaptation
    learning_rate: LearningRate
    momentum: float | Literal["exact"]
    weight_decay: WeightDecay
    trust_radius: float | None
    complement: Complement
    scale: Scale
    box: Box | None  # bounds of the parameters, which `fit` alone takes


def automatic_scale(settings: Settings, *, by_directions: bool) -> Scale:
    """Return the scale that goes with the damping.

    There is none where weight decay meets steps ``by_directions``: in units other than its own it
    is not the same along all of them.
    """
    decays = tree_leaves(settings.weight_decay)
    decayed = any(isinstance(decay, Tensor) or decay != 0 for decay in decays)
    return None if decayed and by_directions else settings.adaptation.scale


def check_settings(settings: Settings) -> None:
    """Refuse settings that break a rule."""
    rate, momentum = settings.learning_rate, settings.momentum
    # The learning rate: a positive number, a function of the updates, or one word.
    if isinstance(rate, str) and rate != "exact":
        rule = 'learning_rate must be a number, a function or "exact"'
        raise BadValue(sentence(rule, repr(rate), "Pass a number, such as 1.0."))
    if not isinstance(rate, str) and not callable(rate):
        check_positive("learning_rate", rate)
    # Momentum: a number from 0 to below 1, or one word.
    if isinstance(momentum, str) and momentum != "exact":
        rule = 'momentum must be a number from 0 to below 1, or "exact"'
        raise BadValue(sentence(rule, repr(momentum), "Pass a number, such as 0.9."))
    if not isinstance(momentum, str):
        check_nonnegative("momentum", momentum)
        if momentum >= 1:
            raise BadValue(sentence("momentum must be below 1", momentum, "Pass 0.9, say."))
    # Weight decay, the longest step, and the damping outside the kept directions.
    check_weight_decay(settings.weight_decay)
    if settings.trust_radius is not None:
        check_positive("trust_radius", settings.trust_radius)
    if isinstance(settings.complement, str) and settings.complement != "damping":
        rule = 'complement must be a positive number, "damping" or None'
        raise BadValue(sentence(rule, repr(settings.complement), 'Pass "damping".'))
    check_scale(settings.scale)


def check_bounded(settings: Settings, subsampling_curvature: object) -> None:
    """Refuse settings that have no meaning together with bounds."""
    asked = {
        "momentum": bool(settings.momentum),
        "subsampling_curvature": subsampling_curvature is not None,
    }
    for name, given in asked.items():
        if given:
            rule = "bounds go with neither momentum nor curvature of other samples"
            raise BadValue(sentence(rule, name, "Leave that out."))


def check_weight_decay(weight_decay: WeightDecay) -> None:
    """Require a number ≥ 0, or a pytree of such."""
    if isinstance(weight_decay, Tensor):
        check_nonnegative("weight_decay", weight_decay)
        return
    for path, decay in named_leaves(weight_decay):
        if isinstance(decay, Tensor):
            rule = f"weight_decay{path} must be a plain number ≥ 0"
            raise BadType(sentence(rule, "a tensor", "Pass decay.item(), one for every leaf."))
        check_nonnegative(f"weight_decay{path}", decay)


def decays_of(weight_decay: WeightDecay, params: PyTree) -> list[float | Tensor]:
    """Return the weight decay of every leaf of the parameters."""
    # One for all.
    leaves, structure = tree_flatten(params)
    if isinstance(weight_decay, (Tensor, float, int)):
        return [weight_decay] * len(leaves)
    # Or one for each, in the order of the parameters.
    try:
        decays: list[float | Tensor] = structure.flatten_up_to(weight_decay)
    except ValueError:
        decays = []
    if not decays or not all(isinstance(decay, (float, int)) for decay in decays):
        rule = "weight_decay must be a number, or have the structure of params"
        got = "other keys, lengths or types"
        raise BadValue(sentence(rule, got, "Pass tree_map(lambda leaf: 0.01, params), say."))
    return decays


def is_read_at_trials(settings: Settings) -> bool:
    """Return whether an update reads values with the verdict of a trial alone, off the CPU.

    What it does before must then hardly ever depend on them, as it does for a search over lengths,
    and for a damping that falls as long as losses do, to where factorizations have no digits left.
    """
    adaptation = settings.adaptation
    if adaptation.by_length or settings.trust_radius is not None:
        return False
    return adaptation.choice is not None or bool(settings.momentum)
