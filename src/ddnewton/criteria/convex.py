"""Any convex loss, differentiated by torch.func."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, jacrev
from torch.utils._pytree import tree_map

from ddnewton.criteria.record import Expansion, Loss
from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.precision import in_float64
from ddnewton.transforms import first_member, over_samples
from ddnewton.trees import as_batch, on_copies
from ddnewton.types import Criterion, PyTree

AGREEMENT = 1e-3
"""How far, relatively, a sample's gradient may stray from the mean's or the sum's share."""


def convex(criterion: Criterion) -> Loss:
    """Return the record of any convex ``criterion(outputs, y) -> scalar``.

    The Hessian of every sample's loss is decomposed, H = Q diag(h) Qᵀ; then L = Q and z = Qᵀ∇ℓ.
    Whether the criterion averages or sums over samples is found out on the batch. Where it does
    neither, or where a Hessian has a negative eigenvalue, a `ValueError` says so.

    Examples
    --------
    >>> import torch
    >>> log_cosh = convex(lambda outputs, y: torch.cosh(outputs - y).log().mean())
    >>> log_cosh.expand(torch.zeros(2), torch.zeros(2)).curvatures.tolist()
    [0.5, 0.5]
    """
    criterion = on_copies(criterion)

    def expand(f: Float[Tensor, "..."], y: PyTree) -> Expansion:
        function = in_float64(criterion) if f.dtype == torch.float64 else criterion

        def of_outputs(u: Float[Tensor, " c"]) -> Float[Tensor, ""]:
            return function(as_batch(u.reshape(f.shape)), as_batch(y))

        u = f.reshape(-1)
        curvatures, basis = torch.linalg.eigh(jacrev(grad(of_outputs))(u))
        # A flat direction must come out flat: a curvature of 1e-17 is still a curvature.
        rounding = torch.finfo(u.dtype).eps * 16 * u.shape[0] * curvatures.abs().amax()
        curvatures = torch.where(curvatures.abs() <= rounding, 0, curvatures)
        slopes = basis.mT @ grad(of_outputs)(u)
        return Expansion(*(x.double() for x in (of_outputs(u), basis, slopes, curvatures)))

    def denominator(outputs: Tensor, y: PyTree) -> float:
        return _denominator(criterion, first_member(outputs), tree_map(first_member, y))

    def check(outputs: Tensor, y: PyTree) -> None:
        _check_scalar(criterion(first_member(outputs), tree_map(first_member, y)))

    return Loss(expand, denominator, check)


def _denominator(criterion: Criterion, outputs: Float[Tensor, "n ..."], y: PyTree) -> float:
    """Return N for a criterion that averages over samples, 1 for one that sums.

    Decided by gradients, which a constant in the loss cannot confuse, at the outputs and at a
    point beside them, where a loss that is level at the outputs shows its slope.
    """
    n = outputs.shape[0]
    if n == 1:
        return 1.0
    ramp = torch.arange(outputs.numel(), dtype=outputs.dtype, device=outputs.device) + 1
    beside = outputs + (1 + outputs.abs().amax()) * ramp.sin().reshape(outputs.shape)
    verdicts = {
        verdict
        for point in (outputs, beside)
        for verdict in _verdicts(_slopes(criterion, point, y), grad(criterion)(point, y))
    }
    if verdicts <= {float(n)} or verdicts == {1.0}:
        return verdicts.pop() if verdicts else float(n)
    rule = "criterion must average or sum one loss over the samples"
    remedy = "Its gradient is neither the mean's nor the sum's: use a plain mean or sum on axis 0."
    raise BadValue(sentence(rule, "a criterion that does neither", remedy))


def _slopes(criterion: Criterion, outputs: Tensor, y: PyTree) -> Float[Tensor, "n ..."]:
    """Return the gradients of the criterion at every sample alone."""
    gradient = grad(lambda f, target: criterion(f[None], as_batch(target)))
    slopes: Tensor = over_samples(gradient, outputs, y)
    return slopes


def _verdicts(alone: Float[Tensor, "n ..."], together: Float[Tensor, "n ..."]) -> list[float]:
    """Return which denominators fit; none where every gradient vanishes; -1 where none fits."""
    scale = alone.abs().amax()
    if scale == 0 and together.abs().amax() == 0:
        return []
    fits = [
        divisor
        for divisor in (float(alone.shape[0]), 1.0)
        if (divisor * together - alone).abs().amax() <= AGREEMENT * scale
    ]
    return fits or [-1.0]


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
