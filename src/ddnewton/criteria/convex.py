"""Any convex loss, differentiated by torch.func."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, jacrev

from ddnewton.criteria.loss import Expansion, Loss, spanned
from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.linearize.precision import in_float64
from ddnewton.transforms import first_member, over_samples
from ddnewton.trees import as_batch, on_copies, tree_map
from ddnewton.types import Criterion, PyTree

HESSIAN_ROUNDINGS = 16.0
"""How many roundings of a Hessian an eigenvalue must have to count."""

GRADIENT_AGREEMENT = 1e-3
"""How far, relatively, a sample's gradient may stray from the mean's or the sum's share."""


def convex(criterion: Criterion) -> Loss:
    """Return the record of any convex ``criterion(outputs, y) -> scalar``.

    The Hessian of every sample's loss is decomposed, H = Q diag(h) Qᵀ; then L = Q and z = Qᵀ∇ℓ.
    Whether the criterion averages or sums over samples is found out on the batch. Where it does
    neither, or where a Hessian has a negative eigenvalue, a `ValueError` says so. A curvature that
    is no larger than the rounding of the Hessian counts as zero; the closed forms know better.

    Examples
    --------
    >>> import torch
    >>> log_cosh = convex(lambda outputs, y: torch.cosh(outputs - y).log().mean())
    >>> log_cosh.expand(torch.zeros(1, 2), torch.zeros(1, 2)).h.tolist()
    [[0.5, 0.5]]
    """
    criterion = on_copies(criterion)

    def of_outputs(f: Float[Tensor, "..."], y: PyTree) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        function = _in_dtype(criterion, f)
        return f.reshape(-1), lambda u: function(as_batch(u.reshape(f.shape)), as_batch(y))

    def of_sample(f: Float[Tensor, "..."], y: PyTree) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        u, loss = of_outputs(f, y)
        r, H = grad(loss)(u), jacrev(grad(loss))(u)
        curvatures, basis = torch.linalg.eigh(H)
        # A flat direction must come out flat: a curvature of 1e-17 is still a curvature. Where all
        # of H vanishes, its rounding shows beside the gradient, or, where a net is right and
        # certain of it, beside H at the origin; there it may also diverge.
        origin = jacrev(grad(loss))(0 * u).nan_to_num(0, 0, 0).abs().amax().clamp(max=1)
        size = torch.stack([H.abs().amax(), r.abs().amax(), origin]).amax()
        rounding = HESSIAN_ROUNDINGS * torch.finfo(u.dtype).eps * u.shape[0] * size
        curvatures = torch.where(curvatures.abs() <= rounding, 0, curvatures)
        return loss(u), basis, basis.mT @ r, curvatures

    def slopes(f: Float[Tensor, "..."], y: PyTree) -> tuple[Tensor, Tensor]:
        u, loss = of_outputs(f, y)
        return loss(u), grad(loss)(u)

    def expand(outputs: Float[Tensor, "n ..."], y: PyTree) -> Expansion:
        return spanned(*(part.double() for part in over_samples(of_sample, outputs, y)))

    def gradient(outputs: Float[Tensor, "n ..."], y: PyTree) -> tuple[Tensor, Tensor]:
        value, slope = (part.double() for part in over_samples(slopes, outputs, y))
        return value, slope

    def denominator(outputs: Tensor, y: PyTree) -> float:
        outputs = first_member(outputs)
        return _denominator(_in_dtype(criterion, outputs), outputs, tree_map(first_member, y))

    def check(outputs: Tensor, y: PyTree) -> None:
        _check_scalar(criterion(first_member(outputs), tree_map(first_member, y)))

    return Loss(expand, denominator, check, gradient=gradient)


def _in_dtype(criterion: Criterion, outputs: Tensor) -> Criterion:
    """Return the criterion in the outputs' dtype, constants included, where that is float64."""
    return in_float64(criterion) if outputs.dtype == torch.float64 else criterion


def _denominator(criterion: Criterion, outputs: Float[Tensor, "n ..."], y: PyTree) -> float:
    """Return N for a criterion that averages over samples, 1 for one that sums.

    Decided by gradients, which a constant in the loss cannot confuse: at the outputs, or, where
    the loss is level there, a little beside them.
    """
    n = outputs.shape[0]
    if n == 1:
        return 1.0
    ramp = torch.arange(1, outputs.numel() + 1, dtype=outputs.dtype, device=outputs.device)
    aside = (1 + outputs.abs()) * ramp.sin().reshape(outputs.shape) / 64
    for point in (outputs, outputs + aside):
        alone, together = _slopes(criterion, point, y), grad(criterion)(point, y)
        if alone.abs().amax() > 0 or together.abs().amax() > 0:
            return _verdict(alone, together)
    return float(n)


def _slopes(criterion: Criterion, outputs: Tensor, y: PyTree) -> Float[Tensor, "n ..."]:
    """Return the gradients of the criterion at every sample alone."""
    gradient = grad(lambda f, target: criterion(f[None], as_batch(target)))
    slopes: Tensor = over_samples(gradient, outputs, y)
    return slopes


def _verdict(alone: Float[Tensor, "n ..."], together: Float[Tensor, "n ..."]) -> float:
    """Return the denominator that turns the gradients of the samples into the batch's."""
    tolerance = max(GRADIENT_AGREEMENT, 16 * torch.finfo(alone.dtype).eps) * alone.abs().amax()
    for divisor in (float(alone.shape[0]), 1.0):
        if (divisor * together - alone).abs().amax() <= tolerance:
            return divisor
    rule = "criterion must average or sum one loss over the samples"
    remedy = "Its gradient is neither the mean's nor the sum's: use a plain mean or sum on axis 0."
    raise BadValue(sentence(rule, "a criterion that does neither", remedy))


def _check_scalar(value: object) -> None:
    """Require a criterion to return one finite number, as a tensor."""
    if not isinstance(value, Tensor):
        rule = "criterion must return a scalar tensor"
        raise BadType(sentence(rule, type(value).__name__, "Compute the loss with torch."))
    if value.ndim != 0:
        rule, got = "criterion must return one number", f"a tensor of shape {list(value.shape)}"
        raise BadValue(sentence(rule, got, 'Use reduction="mean" or reduction="sum".'))
    if not value.isfinite():
        raise BadValue(sentence("the loss must be finite", value.item(), "Check outputs and y."))
