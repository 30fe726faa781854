r"""Curvature from targets drawn from the model's own likelihood.

Where a loss is the negative logarithm of a likelihood whose Hessian does not depend on the target,
the Hessian is the expectation of s sᵀ over gradients s at drawn targets. S draws have S columns a
sample, where the exact Hessian of a softmax has C − 1: fewer columns make a cheaper step.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ddnewton.criteria.loss import Expansion, Loss, name_of, value_and_gradient
from ddnewton.criteria.random_numbers import (
    RowsOfBatch,
    Seed,
    drawn_seed,
    further_seed,
    uniform_from,
)
from ddnewton.criteria.root import Root, dense_root, drawn_root
from ddnewton.criteria.torch_losses import TORCH_LOSSES, record_of
from ddnewton.errors import BadType, BadValue, public, sentence
from ddnewton.records import restored_draws, stored_draws
from ddnewton.types import Criterion, PyTree

Per: TypeAlias = Literal["position", "sequence"]


class MonteCarlo(NamedTuple):
    """A loss whose curvature is sampled: how many draws, of what, and the source of randomness."""

    loss: Loss
    samples: int
    generator: torch.Generator
    per: Per
    seed: Tensor | None = None  # of one call, where it was drawn before that

    def __reduce__(self) -> tuple[Any, ...]:
        draws = stored_draws(self.generator)
        return _with_draws, (self.loss, self.samples, *draws, self.per, self.seed)


AnyCriterion: TypeAlias = Criterion | Loss | MonteCarlo
Criteria: TypeAlias = AnyCriterion | Mapping[Any, AnyCriterion]
"""What the public functions take as a criterion."""


@public
def monte_carlo(
    criterion: AnyCriterion,
    samples: int,
    generator: torch.Generator,
    *,
    per: Per = "position",
) -> MonteCarlo:
    r"""Return a criterion whose curvature is estimated from drawn targets; its gradient is exact.

    .. math:: \nabla^2 \ell_n \approx \frac{1}{S} \sum_{s=1}^S \nabla \ell(f_n, \hat y_{ns})
              \nabla \ell(f_n, \hat y_{ns})^\top, \quad \hat y_{ns} \sim p(y \mid f_n)

    The expectation of the right side is the left. It has S columns a sample; for cross-entropy over
    several positions, tokens or pixels, S a position. With ``per="sequence"`` a sample has S
    columns whatever its length T, the sums of its positions' scores,

    .. math:: \nabla^2 \ell_n \approx \frac{1}{S} \sum_{s=1}^S \hat r_{ns} \hat r_{ns}^\top,
              \quad \hat r_{ns} = \sum_{t=1}^T \nabla \ell_t(f_{nt}, \hat y_{nts})

    with the same expectation: targets are drawn independently and the mean of a score is zero, so
    that products of two positions' scores vanish in expectation; their variance is the price of
    fewer columns. Where a loss has no positions both are the same.

    Every call of a function that takes the criterion draws one seed from the generator, and all its
    random numbers follow from that: they depend neither on chunks nor on how often the loss is
    expanded, and members of an ensemble share them.

    Parameters
    ----------
    criterion
        Loss that is the negative logarithm of a likelihood: squared error, cross-entropy, binary
        cross-entropy of logits, Poisson of log-rates, or Gaussian with given variances, in any
        form; or a `Loss` with ``scores``, such as `heteroscedastic_nll`.
    samples
        How many targets are drawn for every position of every sample of the batch: S ≥ 1.
    generator
        Source of the randomness.
    per
        Whether a column is the score of one "position", or of a whole "sequence": a sample.

    Returns
    -------
    MonteCarlo
        The criterion.

    Raises
    ------
    ValueError, TypeError
        Where the criterion has no likelihood, or an argument breaks another rule.

    Notes
    -----
    Source: Dangel, Tatzel, Hennig, "ViViT: Curvature access through the generalized Gauss-Newton's
    low-rank structure", TMLR 2022, arXiv 2106.02624, on Monte-Carlo approximation.

    Examples
    --------
    >>> import torch
    >>> from ddnewton.criteria import as_loss, cross_entropy
    >>> criterion = monte_carlo(torch.nn.CrossEntropyLoss(), 2, torch.Generator().manual_seed(0))
    >>> logits, y = torch.zeros(5, 10), torch.arange(5)
    >>> as_loss(criterion).expand(logits, y).basis.shape
    torch.Size([5, 10, 2])
    >>> cross_entropy().expand(logits, y).basis.shape
    torch.Size([5, 10, 9])

    Of 7 tokens in each of 5 sequences, one column for all:

    >>> logits, y = torch.zeros(5, 10, 7), torch.zeros(5, 7, dtype=torch.long)
    >>> for per in ("position", "sequence"):
    ...     generator = torch.Generator().manual_seed(0)
    ...     criterion = monte_carlo(torch.nn.CrossEntropyLoss(), 1, generator, per=per)
    ...     print(as_loss(criterion).expand(logits, y).basis.shape)
    torch.Size([5, 70, 7])
    torch.Size([5, 70, 1])
    """
    # Check how many targets are drawn and from what, then that the criterion has a likelihood.
    if isinstance(samples, bool) or not isinstance(samples, int):
        rule, got = "samples must be an integer", type(samples).__name__
        raise BadType(sentence(rule, got, "Pass how many targets to draw, such as 1."))
    if samples < 1:
        raise BadValue(sentence("samples must be at least 1", samples, "One draw is the cheapest."))
    if not isinstance(generator, torch.Generator):
        rule, got = "generator must be a torch.Generator", type(generator).__name__
        raise BadType(sentence(rule, got, "Pass torch.Generator().manual_seed(0)."))
    if per not in ("position", "sequence"):
        remedy = "One column a sequence is the cheapest, one a position has less variance."
        raise BadValue(sentence('per must be "position" or "sequence"', repr(per), remedy))
    if isinstance(criterion, MonteCarlo):
        rule, got = "criterion must be a loss to draw targets from", "monte_carlo of one"
        raise BadValue(sentence(rule, got, "Pass the loss itself, and more samples."))
    loss = record_of(criterion)
    if loss.scores is None:
        raise BadValue(_without_likelihood(criterion))
    return MonteCarlo(loss, samples, generator, per)


def _with_draws(
    loss: Loss, samples: int, device: torch.device, state: Tensor, per: Per, seed: Tensor | None
) -> MonteCarlo:
    """Return the record with a generator in a state."""
    return MonteCarlo(loss, samples, restored_draws(device, state), per, seed)


def sampled(criterion: MonteCarlo) -> Loss:
    """Return a loss whose curvature is from drawn targets, the same ones at every expansion."""
    # One seed, also under vmap: all members of an ensemble share it.
    seed = drawn_seed(criterion.generator) if criterion.seed is None else criterion.seed
    return _sampled_from(criterion, seed, 0)


def _sampled_from(
    criterion: MonteCarlo, first_seed: Seed, number: int, rows: RowsOfBatch | None = None
) -> Loss:
    """Return the loss for a batch of a data set, each with a seed of its own from the first.

    Some ``rows`` of a batch have the targets that they have in all of it.
    """
    loss, samples, _, per, _ = criterion
    seed = further_seed(first_seed, number)

    def scores(outputs: Tensor, y: PyTree) -> Tensor:
        assert loss.scores is not None
        uniform = uniform_from(seed, outputs.device, rows)
        if per == "position":
            return loss.scores(outputs, y, samples, uniform)
        if loss.position_scores is not None:
            of_positions = loss.position_scores(outputs, y, samples, uniform)
            return of_positions.summed(*of_positions.parts)
        # A loss that has no such form has its positions one after the other, if it has several.
        columns = loss.scores(outputs, y, samples, uniform)
        return columns.reshape(*columns.shape[:2], -1, samples).sum(2)

    def expand(outputs: Tensor, y: PyTree) -> Expansion:
        # L = [s_1 … s_S] with h = 1 / S makes L h Lᵀ the mean of s sᵀ. The exact gradient does not
        # lie in the span of L: z = 0, and all of it is the column R.
        value, gradient = value_and_gradient(loss, outputs, y)
        columns = scores(outputs, y)
        zeros = columns.new_zeros(columns.shape[0], columns.shape[2])
        return Expansion(value, columns, z=zeros, h=zeros + 1 / samples, R=gradient[:, :, None])

    def root(outputs: Tensor, y: PyTree) -> Root:
        # The same targets by products, and S = [s_1 … s_S] / √S.
        value, gradient = value_and_gradient(loss, outputs, y)
        if loss.position_scores is not None:
            uniform = uniform_from(seed, outputs.device, rows)
            by_products = loss.position_scores(outputs, y, samples, uniform)
            by_position = per == "position"
            return drawn_root(value, gradient, by_products, samples, by_position=by_position)
        columns = scores(outputs, y)
        h = columns.new_full((columns.shape[0], columns.shape[2]), 1 / samples)
        return dense_root(value, gradient, columns, h, spans=False)

    def columns(outputs: Tensor) -> int:
        # One draw a sample, or one a position beyond the classes on axis 1.
        return samples * (outputs.shape[2:].numel() if per == "position" else 1)

    return loss._replace(
        expand=expand,
        scores=None,
        fisher=None,
        columns=columns,
        positions=None,
        squares=False,
        root=root,
        fisher_root=None,
        position_scores=None,
        redrawn=partial(_sampled_from, criterion, first_seed),
    )


def generators_of(criterion: Criteria) -> dict[Any, torch.Generator]:
    """Return the generators of criteria that draw, by term; that of a single one by None."""
    criteria = criterion if isinstance(criterion, Mapping) else {None: criterion}
    return {
        name: drawn.generator for name, drawn in criteria.items() if isinstance(drawn, MonteCarlo)
    }


def undrawn(criterion: AnyCriterion, remedy: str) -> Loss:
    """Return the record of a criterion whose curvature is replaced: not one that is drawn."""
    if isinstance(criterion, MonteCarlo):
        raise BadValue(sentence("criterion must be a loss", "monte_carlo of one", remedy))
    return record_of(criterion)


def check_criterion(criterion: AnyCriterion) -> None:
    """Require a criterion that a step takes, before there is a batch to look at."""
    if not isinstance(criterion, MonteCarlo):
        record_of(criterion)


def kind_of(criterion: AnyCriterion) -> str:
    """Return the name of a criterion in a message."""
    return "a Loss without scores" if isinstance(criterion, Loss) else name_of(criterion)


def _without_likelihood(criterion: AnyCriterion) -> str:
    """Return the message for a criterion without a likelihood: what it is, and which have one."""
    names = [loss.module.__name__ for loss in TORCH_LOSSES if loss.factory().scores is not None]
    rule = "criterion must have a likelihood to draw targets from"
    remedy = (
        f"{', '.join(names)} have one (Poisson with log_input=True), themselves and not wrapped in "
        "another function, as has a Loss with scores."
    )
    return sentence(rule, kind_of(criterion), remedy)
