"""The loss of a batch, or of a sub-sample, at other parameters than those it is expanded around."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.criteria.expand import joint_loss, losses, weight
from ddnewton.linearize.free_linearization import FreeLinearization
from ddnewton.linearize.model import Linearization
from ddnewton.quadratic.term import HasLosses
from ddnewton.trees import chunks, take


class Trial(NamedTuple):
    """The mean loss of some samples of a term at other parameters, and their outputs there."""

    loss: Float[Tensor, ""]
    outputs: Float[Tensor, "s ..."]


class TrialTerm(HasLosses, Protocol):
    """What is asked of a term for its loss at other parameters."""

    @property
    def linearization(self) -> Linearization | FreeLinearization:
        """The model at the batch."""

    @property
    def samples_at_once(self) -> int:
        """How many samples are evaluated at a time."""


def trial_of(term: TrialTerm, leaves: Sequence[Tensor], samples: Int[Tensor, " s"] | None) -> Trial:
    r"""Return the mean loss of some samples of a term, None for all, at other parameters.

    Where samples have no losses of their own, it is the batch's loss L with the samples that are
    not asked for left at their outputs f, and of s samples the change counts N / s times,

    .. math:: L(f) + \frac{N}{s} \bigl(L(f') - L(f)\bigr),

    as the mean of their parts of the gradient does. For a plain mean that is the same change.
    """
    loss, y = term.objective.loss, term.objective.y
    samples = samples if samples is None else samples.to(term.linearization.outputs.device)
    linearization, outputs = term.linearization, term.linearization.outputs
    pairs = zip(leaves, linearization.leaves, strict=True)
    leaves = [new.to(leaf) for new, leaf in pairs]
    if term.objective.mean_loss is not None:
        return Trial(term.objective.mean_loss(leaves, samples), outputs[:0])
    # The outputs a chunk of samples at a time, as many as their Jacobians are.
    count = outputs.shape[0] if samples is None else len(samples)
    slices = chunks(count, term.samples_at_once)
    parts: Sequence[Tensor | slice] = (
        slices if samples is None else [samples[part] for part in slices]
    )
    moved = [linearization.function(leaves, part) for part in parts]
    changed = torch.cat(moved)
    # Every sample's own loss, or the loss of all outputs together.
    scale = weight(loss, outputs, linearization.precise, y)
    batch_loss = joint_loss(loss, outputs, linearization.precise, y)
    if batch_loss is None:
        at_parts = zip(moved, parts, strict=True)
        values = [losses(loss, part, take(y, indices)) for part, indices in at_parts]
        return Trial((scale * torch.cat(values)).mean(), changed)
    if samples is None:
        return Trial(scale * batch_loss(changed), changed)
    before = term.losses.mean()
    after = scale * batch_loss(linearization.precise.index_copy(0, samples, changed))
    return Trial(before + outputs.shape[0] / len(samples) * (after - before), changed)
