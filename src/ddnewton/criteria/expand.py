"""From a criterion as users pass it to a `Loss`, its expansions on a batch, and their scale."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.criteria.hessian_blocks import joint_expansion
from ddnewton.criteria.loss import Expansion, Loss, name_of, sample_values
from ddnewton.criteria.monte_carlo import AnyCriterion, MonteCarlo, sampled
from ddnewton.criteria.residuals import is_robust
from ddnewton.criteria.torch_losses import record_of
from ddnewton.errors import BadType, BadValue, NotFinite, sentence
from ddnewton.inputs.memory import NEVER_ASKED_BYTES, check_fits, free_bytes
from ddnewton.linearize.basis import Basis, stored
from ddnewton.linearize.calls import first_line
from ddnewton.linearize.precision import loss_in_float64
from ddnewton.transforms import any_known, any_not_finite, first_member, unwrapped
from ddnewton.trees import take, tree_map
from ddnewton.types import Criterion, PyTree

T = TypeVar("T")

COMPLEX_RULE = "criterion must be a function of complex outputs, as model_fn returns them"
COMPLEX_REMEDY = (
    "Pass lambda outputs, y: (outputs - y).abs().square().mean(), say, or return "
    "torch.view_as_real(outputs) and pass y likewise, as pairs of reals."
)

DIFFERENTIABLE_RULE = "criterion must be one that torch.func differentiates twice"
DIFFERENTIABLE_REMEDY = (
    "empirical_fisher(criterion) and with_curvature(criterion, metric) need its gradient alone. An "
    "autograd.Function needs a setup_context, and a backward that can be differentiated."
)

CONVEXITY_RULE = "criterion must be convex in the outputs"
ROBUST_REMEDY = (
    "This one is a robust loss of residuals, outputs − y: pass majorized(criterion), whose steps "
    "are those of iteratively reweighted least squares; clipped(criterion), for losses of other "
    "kinds, would only leave the negative curvature out."
)
CONVEXITY_REMEDY = (
    "The Gauss-Newton matrix needs a convex loss: pass clipped(criterion), which leaves negative "
    "curvature out, or move what bends the loss into the model. A robust loss, such as Cauchy's, "
    "write as a function of the residuals outputs − y, and pass majorized(criterion)."
)

CONVEXITY_TOLERANCE = 1e-6
"""How negative an eigenvalue of a loss Hessian may be, relative to the largest of the batch."""


class NotConvex(BadValue):
    """A loss with negative curvature somewhere in the batch."""


def as_loss(criterion: AnyCriterion) -> Loss:
    """Return the record of a criterion; every call for `monte_carlo` draws a seed.

    A public function calls it once, so that all it computes sees the same drawn targets.
    """
    return sampled(criterion) if isinstance(criterion, MonteCarlo) else record_of(criterion)


def on_complex(criterion: AnyCriterion) -> Criterion:
    """Return a function of complex outputs as one of pairs of reals, along the last axis."""
    if isinstance(criterion, (Loss, MonteCarlo)):
        got = "a record, which is of real outputs"
        raise BadType(sentence(COMPLEX_RULE, got, COMPLEX_REMEDY))

    def on_reals(outputs: Float[Tensor, "n ... 2"], y: PyTree) -> Tensor:
        try:
            return criterion(torch.view_as_complex(outputs.contiguous()), y)
        except (RuntimeError, NotImplementedError) as error:
            got = f"{name_of(criterion)}, which raises: {error}"
            raise BadType(sentence(COMPLEX_RULE, got, COMPLEX_REMEDY)) from error

    on_reals.__name__ = name_of(criterion)
    return on_reals


def expand_batch(
    loss: Loss, outputs: Float[Tensor, "n ..."], precise: Float[Tensor, "n ..."], y: PyTree
) -> Expansion:
    """Return the expansions of all samples, scaled so that the batch's loss is their values' mean.

    They are taken at the ``precise`` outputs in float64, or at ``outputs`` if the loss refuses.
    """
    loss.check(outputs, y)
    return checked_expansion(loss, outputs, precise, y)


def checked_expansion(
    loss: Loss, outputs: Float[Tensor, "n ..."], precise: Float[Tensor, "n ..."], y: PyTree
) -> Expansion:
    """Return the expansions of a batch that fits the loss, as `expand_batch` scales them."""
    _check_basis_fits(loss, outputs, precise, y)
    expansion, denominator = differentiated(lambda f: loss.expand(f, y), loss, outputs, precise, y)
    every = (expansion.value, stored(expansion.basis), *expansion[2:])
    parts = [part for part in every if part.numel()]
    # Both checks by one look, which mostly is all.
    total = reduce(torch.add, (part.sum() for part in parts))
    if any_known((total * 0 != 0) | (expansion.h < 0).any()):
        check_finite(*parts)
        _check_convex(loss, outputs, y, expansion.h)
    # ℓ, ∇ℓ and ∇²ℓ all scale, and L stays; an eigenvalue h below zero is rounding by now.
    scale = outputs.shape[0] / denominator
    return Expansion(
        value=scale * expansion.value,
        basis=expansion.basis,
        z=scale * expansion.z,
        h=scale * expansion.h.clamp(min=0),
        R=scale * expansion.R if expansion.R.numel() else expansion.R,
    )


def differentiated(
    derivatives: Callable[[Tensor], T],
    loss: Loss,
    outputs: Float[Tensor, "n ..."],
    precise: Float[Tensor, "n ..."],
    y: PyTree,
) -> tuple[T, float | Tensor]:
    """Return derivatives as they are and what divides them, of a criterion that was called."""
    try:
        return loss_in_float64(lambda f: (derivatives(f), loss.denominator(f, y)), precise, outputs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        if torch.compiler.is_compiling() or "memory" in str(error):
            raise
        got = f"a criterion that raises {first_line(error)}"
        raise BadValue(sentence(DIFFERENTIABLE_RULE, got, DIFFERENTIABLE_REMEDY)) from error


def losses(loss: Loss, outputs: Float[Tensor, "n ..."], y: PyTree) -> Float[Tensor, " n"]:
    """Return every sample's loss, unscaled and unchecked: it may be infinite or nan.

    For samples of a batch that have losses of their own; for any other there is `joint_loss`.
    """
    return loss_in_float64(lambda f: sample_values(loss, f, y).double(), outputs, outputs)


def joint_loss(
    loss: Loss, outputs: Float[Tensor, "n ..."], precise: Float[Tensor, "n ..."], y: PyTree
) -> Callable[[Float[Tensor, "n ..."]], Float[Tensor, ""]] | None:
    """Return the loss of a batch at other outputs, unscaled; None where samples have their own."""
    if loss.joint is None:
        return None
    joint = loss.joint
    batch_loss = loss_in_float64(lambda f: joint(f, y), precise, outputs)
    if batch_loss is None:
        return None
    return lambda f: loss_in_float64(batch_loss, f, f).double()


def weight(
    loss: Loss, outputs: Float[Tensor, "n ..."], precise: Float[Tensor, "n ..."], y: PyTree
) -> float | Tensor:
    """Return N / d: multiplied with it, the samples' losses have the batch's loss as their mean."""
    denominator = loss_in_float64(lambda f: loss.denominator(f, y), precise, outputs)
    return outputs.shape[0] / denominator


def _check_basis_fits(
    loss: Loss, outputs: Float[Tensor, "n ..."], precise: Float[Tensor, "n ..."], y: PyTree
) -> None:
    """Require the bases L of all samples, and as many cotangents, to fit into memory."""
    n, c = outputs.shape[0], outputs[0].numel()
    m = c if loss.columns is None else loss.columns(outputs)
    blocks = 1 if loss.positions is None else max(1, loss.positions(outputs))
    size = 2 * n * c * (m // blocks) * torch.float64.itemsize
    if torch.compiler.is_compiling() or size <= NEVER_ASKED_BYTES:
        return
    # It may be fewer columns, or one basis for all samples: two of them show it, if they fit.
    if n > 2 and 2 * size // n <= free_bytes(outputs.device):
        basis = _basis_of_two(loss, *tree_map(first_member, (precise, y)))
        entries = stored(basis)
        m, shared = basis.shape[2], entries.stride(0) == 0
        size = 2 * (1 if shared else n) * entries[0].nbytes
    what = f"the basis of the loss, {m} columns for each of {n} samples of {c} outputs"
    remedy = (
        'Pass gram="free", which needs no basis; monte_carlo(criterion, 1, generator) or '
        "empirical_fisher(criterion), which have few columns; or fewer samples. Make one sample's "
        "many outputs samples of their own."
    )
    check_fits(size, what, remedy, outputs.device)


def _basis_of_two(loss: Loss, f: Float[Tensor, "n ..."], y: PyTree) -> Basis:
    """Return the basis of the first two samples, without those of the others."""

    def basis(two: Float[Tensor, "2 ..."]) -> Basis:
        # Of samples that have no losses of their own, the others stay at their outputs.
        unmoved = f[2:].to(two.dtype)
        batch_loss = None
        if loss.joint is not None:
            batch_loss = loss.joint(torch.cat([two, unmoved]), y)
        if batch_loss is None:
            return loss.expand(two, take(y, slice(0, 2))).basis
        return joint_expansion(lambda u: batch_loss(torch.cat([u, unmoved])), two).basis

    return loss_in_float64(basis, f[:2], f[:2])


def check_finite(*parts: Tensor) -> None:
    """Require a finite loss with finite derivatives."""
    if any_not_finite(*parts):
        got = "nan or inf in the loss or its derivatives"
        raise NotFinite(sentence("the loss must be finite", got, "Check the outputs and y."))


def _check_convex(
    loss: Loss, outputs: Float[Tensor, "n ..."], y: PyTree, h: Float[Tensor, "n m"]
) -> None:
    """Require Hessians without eigenvalues h below zero, beyond the rounding of the largest."""
    if any_known(h < 0) and any_known(h < -CONVEXITY_TOLERANCE * unwrapped(h).abs().amax()):
        got = f"a Hessian eigenvalue of {unwrapped(h).min().item():.3g}"
        raise not_convex(loss, outputs, y, got)


def not_convex(loss: Loss, outputs: Float[Tensor, "n ..."], y: PyTree, got: str) -> NotConvex:
    """Return the error of a loss with negative curvature."""
    remedy = ROBUST_REMEDY if is_robust(loss, outputs, y) else CONVEXITY_REMEDY
    return NotConvex(sentence(CONVEXITY_RULE, got, remedy))
