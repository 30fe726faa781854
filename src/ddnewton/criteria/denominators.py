"""The loss of a data set in batches: what it is divided by, all of it together.

The mean over a data set divides the sum of all samples' losses by the sum of what the means over
its batches divide by: numbers of samples, of valid labels, or sums of weights. A sum divides by 1,
in a batch and in the data set.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.criteria.loss import Loss
from ddnewton.criteria.option_checks import NoTargets, check_denominator
from ddnewton.criteria.random_numbers import RowsOfBatch
from ddnewton.errors import BadValue, sentence
from ddnewton.linearize.precision import loss_in_float64
from ddnewton.trees import take, tree_map
from ddnewton.types import PyTree

logger = logging.getLogger(__name__)

DOUBLED_SAMPLES = 8
"""On how many samples, taken once and twice, it is seen whether a denominator counts them."""

BATCHES_RULE = "the criterion of Batches must be a sum of one loss a sample, or their mean"
WHOLE_REMEDY = (
    'Pass a criterion of the library or of torch.nn, reduction="sum", or all samples as one batch.'
)


class Share(NamedTuple):
    """What a batch brings to the denominator of a data set."""

    denominator: float
    counts_samples: bool  # whether it is that of a mean, which adds up over batches
    ratio: float  # by what its curvature is multiplied besides, in this batch
    probe: tuple[Tensor, PyTree] | None  # outputs and targets to hold others against


def share_of(
    loss: Loss,
    outputs: Float[Tensor, "n ..."],
    precise: Float[Tensor, "n ..."],
    y: PyTree,
    before: Sequence[Share],
) -> Share:
    """Return the share of a batch; refuse samples that have no losses of their own.

    What all samples of a batch have in common shows beside some of the batches ``before``.
    """
    return loss_in_float64(partial(_share, loss, y, before), precise, outputs)


def _share(
    loss: Loss, y: PyTree, before: Sequence[Share], outputs: Float[Tensor, "n ..."]
) -> Share:
    """Return the share of a batch with some outputs."""
    # A function is looked at, on the batch and beside the first one.
    probe = None
    if loss.joint is not None:
        head = slice(0, DOUBLED_SAMPLES)
        probe = outputs[head].clone(), tree_map(torch.clone, take(y, head))
        combined = _beside(before[0].probe, probe) if before else None
        for f, target in filter(None, [(outputs, y), combined]):
            if loss.joint(f, target) is not None:
                got = "one that divides by what the samples have in y"
                raise BadValue(sentence(BATCHES_RULE, got, WHOLE_REMEDY))
    # Of some samples, and of the same ones twice.
    first = torch.arange(min(DOUBLED_SAMPLES, len(outputs)), device=outputs.device)
    once, twice = (
        float(loss.denominator(outputs[rows], take(y, rows)))
        for rows in (first, torch.cat([first, first]))
    )
    if twice not in (once, 2 * once):
        got = f"one that divides by {once:.6g} for some samples, and by {twice:.6g} for them twice"
        raise BadValue(sentence(BATCHES_RULE, got, WHOLE_REMEDY))
    ratio = 1.0 if loss.curvature_ratio is None else float(loss.curvature_ratio(outputs, y))
    probe = None if before else probe
    return Share(float(loss.denominator(outputs, y)), twice == 2 * once, ratio, probe)


def _beside(
    first: tuple[Tensor, PyTree] | None, second: tuple[Tensor, PyTree]
) -> tuple[Tensor, PyTree] | None:
    """Return some outputs and targets beside others, None where their shapes differ."""
    try:
        joined: tuple[Tensor, PyTree] = tree_map(lambda *x: torch.cat(x), first, second)
    except (RuntimeError, ValueError):
        return None
    return joined


def denominator_of(shares: Sequence[Share]) -> float:
    """Return the denominator of the loss of all batches."""
    # What multiplies a curvature cannot differ from batch to batch.
    first = shares[0]
    if not all(abs(share.ratio - first.ratio) <= 1e-12 * abs(first.ratio) for share in shares):
        got = "a gradient and a curvature that divide by numbers of other ratios in every batch"
        raise BadValue(sentence(BATCHES_RULE, got, WHOLE_REMEDY))
    # A mean, or a sum.
    if first.counts_samples:
        total = sum(share.denominator for share in shares)
        check_denominator(total)
        return total
    if any(share.denominator != first.denominator for share in shares):
        raise BadValue(
            sentence(BATCHES_RULE, "one that divides every batch by another number", WHOLE_REMEDY)
        )
    return first.denominator


def common_denominator(loss: Loss, shares: Sequence[Share]) -> float | None:
    """Return the denominator of the loss of a batch, by the shares of its parts.

    It is None where samples have no losses of their own, which may show beside other parts alone.
    """
    probes = [share.probe for share in shares if share.probe is not None]
    try:
        if loss.joint is not None:
            joint = loss.joint
            outputs, y = tree_map(lambda *parts: torch.cat(parts), *probes)
            if loss_in_float64(lambda f: joint(f, y), outputs, outputs) is not None:
                return None
        return denominator_of(shares)
    except torch.OutOfMemoryError:
        raise
    except Exception as reason:  # noqa: BLE001 - the loss was never asked to take parts of a batch
        logger.info("the loss has no parts: %s", reason)
        return None


def divided_by(loss: Loss, total: float) -> Loss:
    """Return the loss of a batch as a part of a data set, which divides by a given number.

    A batch of which no target counts is none of the data set's.
    """
    return loss._replace(denominator=lambda outputs, y: total, check=partial(_check, loss.check))


def for_batch(loss: Loss, number: int) -> Loss:
    """Return the loss of a further batch, which draws random numbers of its own."""
    if number == 0 or loss.redrawn is None:
        return loss
    further: Loss = loss.redrawn(number)
    return further._replace(check=loss.check)


def for_rows(loss: Loss, first: int, whole: int) -> Loss:
    """Return the loss of some samples of a batch, which draws what that draws for them."""
    if loss.redrawn is None:
        return loss
    of_rows: Loss = loss.redrawn(0, RowsOfBatch(first, whole))
    return of_rows._replace(check=loss.check)


def _check(check: Callable[[Tensor, PyTree], None], outputs: Tensor, y: PyTree) -> None:
    """Check a batch, which need not have a target that counts."""
    try:
        check(outputs, y)
    except NoTargets:
        return
