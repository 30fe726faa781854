r"""Slopes without curvature: what no Gauss-Newton step can follow, and is not to hide.

A sample whose loss has a slope and no curvature, h = 0 and z ≠ 0, pulls on the parameters by its
column a, but the matrix G does not know of it. Of the gradient g, the part

    g_⊥ = (I − P) A z_flat / N,        P the projection onto the directions with curvature,

has none at all. A step along the directions leaves it out; a loss that has nothing else, such as an
absolute error or the mean of −log p of a model that returns log p, would never move.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ddnewton.errors import BadValue, sentence
from ddnewton.inputs.checks import check_dependence
from ddnewton.linearize.use_of_parameters import depends_on_parameters
from ddnewton.quadratic.complement import outside_live
from ddnewton.quadratic.gauss_newton import GaussNewton
from ddnewton.quadratic.kept import BlockDirections
from ddnewton.quadratic.quadratic_model import QuadraticModel, gradients
from ddnewton.quadratic.spectrum import Spectrum, decompose
from ddnewton.transforms import any_known, any_possible, unwrapped

LEAST_SLOPE = 1e-13
"""Slopes of a loss along its outputs up to this size count as none: where a net is right and
certain, slope and curvature of its loss vanish together, and rounding may leave a slope alone."""

WAYS_OUT = (
    "In place of log_softmax in the model and NLLLoss return logits and pass CrossEntropyLoss. Of "
    "an absolute error, a pinball loss, or Huber's far from the data pass majorized(criterion); of "
    "another log-likelihood fisher(criterion). Or follow the gradient: pass a number as complement."
)


def check_slopes(model: QuadraticModel, matrices: Sequence[GaussNewton], *, curved: bool) -> None:
    """Require outputs that depend on parameters; if ``curved``, some curvature where slopes are.

    Both are looked at only where there is no curvature at all. A derivative may be zero by value,
    as in a dead net, but not for want of parameters.
    """
    largest = _largest_trace(matrices)
    if not any_known(largest <= 0):
        return
    if not any(any_known(g != 0) for g in gradients(model, matrices)):
        check_outputs_depend(model, matrices)
    if not curved:
        return
    # What no direction with curvature explains of the gradient.
    weights = steep_weights(model)
    norm = torch.stack([_square(decompose(matrix), weights) for matrix in matrices]).sum().sqrt()
    if any_known((largest <= 0) & (norm > 0)):
        raise without_curvature(model.names, float(unwrapped(norm).amax()))


def without_curvature(names: str, size: float) -> BadValue:
    """Return the error of a loss that has nothing but slopes of some norm."""
    rule = "the loss must have curvature where its gradient is not zero"
    got = f"{names} with a gradient of norm {size:.3g} and no curvature at all"
    return BadValue(sentence(rule, got, WAYS_OUT))


def steep_weights(model: QuadraticModel) -> Float[Tensor, " a"]:
    """Return the weights of all that the gradient is made of but slopes of rounding."""
    count = len(model.curvature_weights)
    steep = F.pad(_steep(model), (0, len(model.gradient_weights) - count), value=True)
    return torch.where(steep, model.gradient_weights, 0)


def check_outputs_depend(
    model: QuadraticModel, matrices: Sequence[GaussNewton] | Sequence[Tensor]
) -> None:
    """Require outputs that depend on a parameter. Looked at only where there is no curvature."""
    if any_known(_largest_trace(matrices) <= 0):
        check_dependence(any(depends_on_parameters(term.linearization) for term in model.terms))


def _largest_trace(matrices: Sequence[GaussNewton] | Sequence[Tensor]) -> Float[Tensor, ""]:
    """Return the trace of the matrix that has the largest."""
    return torch.stack([matrix.trace() for matrix in matrices]).amax()


def flat_square(
    model: QuadraticModel, spectrum: Spectrum, gradient_weights: Float[Tensor, " a"]
) -> Float[Tensor, ""]:
    """Return the squared norm of the part of a block's gradient that has no curvature, ‖g_⊥‖²."""
    flat = (model.curvature_weights <= 0) & _steep(model)
    padding = (0, len(gradient_weights) - len(flat))
    return _square(spectrum, torch.where(F.pad(flat, padding), gradient_weights, 0))


def flat_share(
    model: QuadraticModel, blocks: Sequence[BlockDirections], norm: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Return ‖g_⊥‖² / ‖g‖², of all blocks together."""
    squares = [flat_square(model, block.spectrum, model.gradient_weights) for block in blocks]
    share: Tensor = torch.stack(squares).sum() / norm.square()
    return torch.where(norm > 0, share, 0).clamp(max=1)


def has_flat_samples(model: QuadraticModel) -> bool:
    """Return whether a sample has, or may have, a slope without curvature."""
    return torch.compiler.is_compiling() or any_known(any_flat(model))


def any_flat(model: QuadraticModel) -> Bool[Tensor, ""]:
    """Return whether a sample has a slope without curvature, unread."""
    return ((model.curvature_weights <= 0) & _steep(model)).any()


def _steep(model: QuadraticModel) -> Bool[Tensor, " i"]:
    """Return a mask of the columns along which the loss has a slope beyond rounding."""
    return model.z.abs() > LEAST_SLOPE


def _square(spectrum: Spectrum, weights: Float[Tensor, " a"]) -> Float[Tensor, ""]:
    """Return the squared norm of Σ_i w_i a_i outside the directions with curvature."""
    if not any_possible(weights != 0):
        return weights.new_zeros(())
    return spectrum.to_parameters(outside_live(spectrum, weights)[None]).square().sum()
