r"""The Fisher information of functions that are quadratic in y: Gaussian likelihoods of any form.

Where ℓ(f, y) is quadratic in y with Hessian C, it is that of y ~ N(μ, C⁻¹), μ = y − C⁻¹ ∂ℓ/∂y, if
the gradient ∂ℓ/∂f is zero in expectation. F = E ∂²ℓ/∂f² is an expectation over y as well; both
derivatives are quadratic in y, so that the mean over the 2k points μ ± √k C^{-1/2} is exact for k
targets. A mean over several outputs, or a weight, make ℓ = a (−log p), and y ~ N(μ, a C⁻¹): the
factor a is found as that which makes the expected gradient zero.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad

from ddnewton.criteria.eigenvectors import hessians_of, in_eigenvectors
from ddnewton.criteria.loss import Expansion, Loss, slopes_of, value_and_gradient
from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.transforms import any_known
from ddnewton.types import PyTree

LIKELIHOOD_AGREEMENT = 1e-6
"""Relative tolerance to which a loss must be quadratic in y, and its expected gradient zero."""

NO_SPREAD = 1e-9
"""Up to which share of its size a gradient counts as linear in y."""

LIKELIHOOD_RULE = "criterion must have a likelihood whose Fisher information is known"
LIKELIHOOD_REMEDY = (
    "Of functions, those have one that are quadratic in y: Gaussian likelihoods, log-variances "
    "included. torch's likelihoods and heteroscedastic_nll() have one themselves."
)


def with_gaussian_fisher(loss: Loss) -> Loss:
    """Return a record with the Fisher information that it has where it is quadratic in y."""

    def fisher(f: Float[Tensor, "n ..."], y: PyTree) -> Expansion:
        if not isinstance(y, Tensor) or not y.is_floating_point():
            got = f"{y.dtype} as y" if isinstance(y, Tensor) else f"a {type(y).__name__} as y"
            raise BadType(sentence(LIKELIHOOD_RULE, f"a function, and {got}", LIKELIHOOD_REMEDY))
        # Gradients and Hessians at the mean of y, and what its spread adds to them for a = 1.
        mean, points = _mean_and_points(loss, f, y.to(f.dtype))
        s, H = _derivatives(loss, f, mean)
        spread = [_derivatives(loss, f, point) for point in points]
        s_spread = torch.stack([slopes for slopes, _ in spread]).mean(0) - s
        H_spread = torch.stack([hessians for _, hessians in spread]).mean(0) - H
        size = torch.stack([slopes.abs().amax() for slopes, _ in spread]).amax()
        a = _factor(s, s_spread, size)
        if any_known((s + a * s_spread).abs() > LIKELIHOOD_AGREEMENT * size) or any_known(a <= 0):
            got = "one that is quadratic in y, and no likelihood: its expected gradient is not zero"
            raise BadValue(sentence(LIKELIHOOD_RULE, got, LIKELIHOOD_REMEDY))
        return in_eigenvectors(*value_and_gradient(loss, f, y), H + a * H_spread)

    return loss._replace(fisher=fisher)


def _derivatives(
    loss: Loss, f: Float[Tensor, "n ..."], y: Tensor
) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n c c"]]:
    """Return gradients and Hessians of the samples in the outputs."""
    expansion = loss.expand(f, y)
    return slopes_of(expansion), hessians_of(expansion)


def _mean_and_points(
    loss: Loss, f: Float[Tensor, "n ..."], y: Float[Tensor, "n ..."]
) -> tuple[Tensor, list[Tensor]]:
    """Return μ and μ ± √k C^{-1/2} of every sample, for a loss quadratic in its k targets."""
    n, k = y.shape[0], y[0].numel()

    def slopes(t: Tensor) -> Float[Tensor, "n k"]:
        derivative: Tensor = grad(lambda u: value_and_gradient(loss, f, u)[0].sum())(t)
        return derivative.reshape(n, k)

    def hessians(t: Tensor) -> Float[Tensor, "n k k"]:
        rows = [grad(lambda u, j=j: slopes(u)[:, j].sum())(t).reshape(n, k) for j in range(k)]
        return torch.stack(rows, 1)

    # The same Hessian C at other targets, and one with an inverse.
    C, size = hessians(y), y.abs().amax() + 1
    spread = torch.arange(n * k, dtype=y.dtype, device=y.device).sin().reshape(y.shape)
    elsewhere = hessians(y + size * (spread + 2))
    if any_known((C - elsewhere).abs() > LIKELIHOOD_AGREEMENT * C.abs().amax()):
        raise BadValue(
            sentence(LIKELIHOOD_RULE, "a function that is not quadratic in y", LIKELIHOOD_REMEDY)
        )
    least = torch.linalg.eigvalsh(C)
    if any_known(~(least[:, 0] > NO_SPREAD * least[:, -1])):
        raise BadValue(
            sentence(
                LIKELIHOOD_RULE,
                "a function that is flat in y, or no minimum there",
                LIKELIHOOD_REMEDY,
            )
        )
    # C = ℒ ℒᵀ: the columns of ℒ⁻ᵀ are a root of C⁻¹.
    lower = torch.linalg.cholesky(C)
    mean = y - torch.cholesky_solve(slopes(y)[..., None], lower)[..., 0].reshape(y.shape)
    identity = torch.eye(k, dtype=C.dtype, device=C.device).expand(n, k, k)
    root = k**0.5 * torch.linalg.solve_triangular(lower.mT, identity, upper=True)
    offsets = [column.reshape(y.shape) for column in root.unbind(2)]
    return mean, [mean + sign * offset for offset in offsets for sign in (1, -1)]


def _factor(
    s: Float[Tensor, "n c"], s_spread: Float[Tensor, "n c"], size: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Return a, for which s + a s_spread is zero; 1 where the spread does not matter."""
    matters = s_spread.abs().amax() > NO_SPREAD * size
    squares = s_spread.square().sum()
    return torch.where(matters, -(s * s_spread).sum() / torch.where(matters, squares, 1), 1)
