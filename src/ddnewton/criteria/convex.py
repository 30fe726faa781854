"""Any convex loss, differentiated twice by torch.func."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, jacrev

from ddnewton.criteria.loss import Expansion, Loss, spanned
from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.linearize.precision import in_dtype_of
from ddnewton.transforms import first_member, over_samples
from ddnewton.trees import as_batch, on_copies, tree_map
from ddnewton.types import Criterion, PyTree

HESSIAN_ROUNDINGS = 16.0
"""Eigenvalues of a loss Hessian up to this many of its roundings count as zero."""

GRADIENT_AGREEMENT = 1e-3
"""Relative tolerance to which a batch's gradient must be the mean or the sum of the samples'."""


def convex(criterion: Criterion) -> Loss:
    """Return the record of any convex ``criterion(outputs, y) -> scalar``.

    The Hessian of every sample's loss is decomposed, H = Q diag(h) Qᵀ; then L = Q and z = Qᵀ∇ℓ.
    Whether the criterion averages or sums over samples is measured on the batch. Where it does
    neither, or where a Hessian has a negative eigenvalue, a `ValueError` says so. An eigenvalue
    within the rounding error of its Hessian counts as zero; closed forms have no such error.

    Examples
    --------
    >>> import torch
    >>> log_cosh = convex(lambda outputs, y: torch.cosh(outputs - y).log().mean())
    >>> log_cosh.expand(torch.zeros(1, 2), torch.zeros(1, 2)).h.tolist()
    [[0.5, 0.5]]
    """
    criterion = on_copies(criterion)

    def of_outputs(f: Float[Tensor, "..."], y: PyTree) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        function = in_dtype_of(f, criterion)
        return f.reshape(-1), lambda u: function(as_batch(u.reshape(f.shape)), as_batch(y))

    def sample_expansion(
        f: Float[Tensor, "..."], y: PyTree
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Gradient r and Hessian H = Q diag(h) Qᵀ of one sample's loss, its outputs flat in u.
        u, loss = of_outputs(f, y)
        r, H = grad(loss)(u), jacrev(grad(loss))(u)
        h, basis = torch.linalg.eigh(H)
        # A flat direction must get h = 0: along h = 1e-17 an undamped step would be huge. Rounding
        # is relative to the largest entry of H, or, where all of H vanishes, to that of the
        # gradient, or, where a net is right and certain, to that of H at the origin, which may
        # diverge there and counts up to 1.
        origin = jacrev(grad(loss))(0 * u).nan_to_num(0, 0, 0).abs().amax().clamp(max=1)
        size = torch.stack([H.abs().amax(), r.abs().amax(), origin]).amax()
        rounding = HESSIAN_ROUNDINGS * torch.finfo(u.dtype).eps * u.shape[0] * size
        h = torch.where(h.abs() <= rounding, 0, h)
        return loss(u), basis, basis.mT @ r, h

    def sample_gradient(f: Float[Tensor, "..."], y: PyTree) -> tuple[Tensor, Tensor]:
        u, loss = of_outputs(f, y)
        return loss(u), grad(loss)(u)

    def expand(outputs: Float[Tensor, "n ..."], y: PyTree) -> Expansion:
        return spanned(*(part.double() for part in over_samples(sample_expansion, outputs, y)))

    def gradient(outputs: Float[Tensor, "n ..."], y: PyTree) -> tuple[Tensor, Tensor]:
        value, r = (part.double() for part in over_samples(sample_gradient, outputs, y))
        return value, r

    def denominator(outputs: Tensor, y: PyTree) -> float:
        outputs = first_member(outputs)
        return _denominator(in_dtype_of(outputs, criterion), outputs, tree_map(first_member, y))

    def check(outputs: Tensor, y: PyTree) -> None:
        _check_scalar(criterion(first_member(outputs), tree_map(first_member, y)))

    return Loss(expand, denominator, check, gradient=gradient)


def _denominator(criterion: Criterion, outputs: Float[Tensor, "n ..."], y: PyTree) -> float:
    """Return N for a criterion that averages over samples, 1 for one that sums.

    Gradients decide, as a constant in the loss does not change them: those at the outputs, or,
    where all of these are zero, those at slightly shifted outputs.
    """
    n = outputs.shape[0]
    if n == 1:
        return 1.0
    # The shift is 1/64 of 1 + |f| at most, and different for every output.
    ramp = torch.arange(1, outputs.numel() + 1, dtype=outputs.dtype, device=outputs.device)
    shift = (1 + outputs.abs()) * ramp.sin().reshape(outputs.shape) / 64
    for point in (outputs, outputs + shift):
        sample_gradients = _sample_gradients(criterion, point, y)
        batch_gradient = grad(criterion)(point, y)
        if sample_gradients.abs().amax() > 0 or batch_gradient.abs().amax() > 0:
            return _matching_denominator(sample_gradients, batch_gradient)
    return float(n)


def _sample_gradients(criterion: Criterion, outputs: Tensor, y: PyTree) -> Float[Tensor, "n ..."]:
    """Return the gradient of the criterion on every sample as a batch of one."""
    gradient = grad(lambda f, target: criterion(f[None], as_batch(target)))
    gradients: Tensor = over_samples(gradient, outputs, y)
    return gradients


def _matching_denominator(
    sample_gradients: Float[Tensor, "n ..."], batch_gradient: Float[Tensor, "n ..."]
) -> float:
    """Return d, N or 1, for which the batch's gradient is the samples' gradients divided by d."""
    eps = torch.finfo(sample_gradients.dtype).eps
    tolerance = max(GRADIENT_AGREEMENT, 16 * eps) * sample_gradients.abs().amax()
    for denominator in (float(sample_gradients.shape[0]), 1.0):
        if (denominator * batch_gradient - sample_gradients).abs().amax() <= tolerance:
            return denominator
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
