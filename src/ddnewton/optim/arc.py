r"""Arcs: steps that are bent as the outputs along them are.

A damped step s leads to outputs that are off the linear ones by ρ = f(θ + s) − f(θ) − J s. In a
curved valley that is all that keeps steps short. The second step

    c = −(G + δI)⁻¹ Jᵀ H ρ,        H = ∇²ℓ of the outputs,

takes it back: θ + t s + t² c follows the valley to second order. It costs a solve with the
decomposition that s is of. To leading order ρ = ½ f″(s, s), and c is half the geodesic acceleration
of Transtrum and Sethna, "Improvements to the Levenberg-Marquardt algorithm for nonlinear
least-squares minimization", 2012, arXiv 1201.5885; from the outputs of the trial itself, the
second-order correction of Nocedal and Wright, *Numerical Optimization*, 2006, section 18.3.

The outputs along the arc, f + t J s + t² (ρ + J c) + t³ κ, tell before a trial how far the loss is
below that at its start; κ is what the outputs at t = 1 have beyond the first two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ddnewton.columns.gram import rmatmat
from ddnewton.linearize.basis import projected
from ddnewton.optim.free_trials import FreeTrials
from ddnewton.optim.solved_trials import TrialSteps, further_step
from ddnewton.quadratic.term import Term

SHARES, SHORTEST_ARC, LONGEST_ARC = 120, 0.05, 0.9
"""How many shares of an arc are looked at, and the least and the largest that are tried."""

MOST_BENT = 0.5
"""How long t² c may be beside t s: from there on the model bends more than it goes."""

HOPE = 1.5
"""How much longer than the share up to which the loss is predicted to fall the first one is."""


class Arc(NamedTuple):
    """The arc t s + t² c, and what it does to Lᵀ f along every column, by powers of t."""

    step: Float[Tensor, " d"]  # s
    second: Float[Tensor, " d"]  # c
    columns: Float[Tensor, "i 3"]


def arc_of(
    trials: TrialSteps | FreeTrials,
    delta: Float[Tensor, ""],
    step: Float[Tensor, " d"],
    outputs: Sequence[Float[Tensor, "_ ..."]],
    column_slopes: Float[Tensor, "i k"] | None,
) -> Arc | None:
    """Return the arc that begins along a step, from the outputs of all terms where that leads.

    ``column_slopes`` are those of the columns of the curvature along the step, where known.
    It is None where no decomposition is at hand, which is where something else than the gradient
    makes the step, and by products; where there is a complement, and where directions or gradient
    are of some samples.
    """
    if isinstance(trials, FreeTrials):
        return None
    model = trials.model
    if not trials.decompositions.shifted or trials.complement is not None:
        return None
    samples = [term.objective.samples for term in model.terms]
    if any(part is not None for s in samples for part in (s.slopes, s.directions)):
        return None
    # Lᵀρ along every column: the changes of the outputs less the linear ones.
    linear = _along_step(trials, step) if column_slopes is None else column_slopes[:, 0]
    bent = _changes(trials, outputs) - linear
    # The step of the gradient Jᵀ H ρ.
    second = further_step(trials, delta, model.curvature_weights * bent)
    columns = torch.stack([linear, bent + _along_step(trials, second), torch.zeros_like(bent)], 1)
    return Arc(step, second, columns)


def with_end(
    trials: TrialSteps | FreeTrials, arc: Arc, outputs: Sequence[Float[Tensor, "_ ..."]]
) -> Arc:
    """Return an arc with the third power of t, what outputs at its end have beyond the others."""
    assert isinstance(trials, TrialSteps)
    first, second, _ = arc.columns.unbind(1)
    third = _changes(trials, outputs) - first - second
    return arc._replace(columns=torch.stack([first, second, third], 1))


def is_whole(arc: Arc) -> Bool[Tensor, ""]:
    """Return whether an arc may be walked to its end."""
    shorter: Tensor = arc.second.norm() <= MOST_BENT * arc.step.norm()
    return shorter


def vector_at(arc: Arc, share: Float[Tensor, ""]) -> Float[Tensor, " d"]:
    """Return t s + t² c."""
    return share * arc.step + share.square() * arc.second


def promise_at(
    trials: TrialSteps | FreeTrials, arc: Arc, share: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Return the decrease that the quadratic model promises for t s."""
    assert isinstance(trials, TrialSteps)
    linear = arc.columns[:, 0]
    slope = trials.model.gradient_weights @ linear
    curvature = trials.model.curvature_weights @ linear.square()
    return -share * (slope + share * curvature / 2)


def first_share(trials: TrialSteps | FreeTrials, arc: Arc) -> Float[Tensor, ""]:
    """Return the share of an arc to try first, a little beyond where its loss is predicted to fall.

    It is nan where the outputs are not finite.
    """
    assert isinstance(trials, TrialSteps)
    model = trials.model
    # The quadratic model of the loss in the outputs along the arc, a polynomial of t.
    slopes = model.gradient_weights @ arc.columns
    curvatures = arc.columns.mT @ (model.curvature_weights[:, None] * arc.columns)
    shares = torch.logspace(-2, 0, SHARES, dtype=slopes.dtype, device=slopes.device)
    powers = torch.stack([shares, shares.square(), shares**3], 1)
    change = powers @ slopes + ((powers @ curvatures) * powers).sum(1) / 2
    longest = torch.where(change < 0, shares, shares[0]).amax()
    # Where the arc bends too much.
    usable = (
        MOST_BENT * arc.step.norm() / arc.second.norm().clamp(min=torch.finfo(slopes.dtype).tiny)
    )
    return torch.minimum(HOPE * longest, usable).clamp(SHORTEST_ARC, LONGEST_ARC)


def _along_step(trials: TrialSteps, step: Float[Tensor, " d"]) -> Float[Tensor, " i"]:
    """Return the slopes of the columns of the curvature along a step."""
    model = trials.model
    return rmatmat(model.curvature_jacobians, range(len(model.sizes)), step[:, None])[:, 0]


def _changes(trials: TrialSteps, outputs: Sequence[Float[Tensor, "_ ..."]]) -> Float[Tensor, " i"]:
    """Return Lᵀ(f′ − f) along every column."""
    pairs = zip(trials.model.terms, outputs, strict=True)
    return torch.cat([_of_term(term, moved) for term, moved in pairs])


def _of_term(term: Term, outputs: Float[Tensor, "n ..."]) -> Float[Tensor, " i"]:
    """Return Lᵀ(f′ − f) along the columns of a term, in their order."""
    change = (outputs - term.linearization.outputs).to(term.z)
    along_columns = projected(term.basis, change.reshape(len(change), -1, 1))
    return along_columns[..., 0].T.reshape(-1)
