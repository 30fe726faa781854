"""Any convex loss, differentiated twice by torch.func."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, grad_and_value, jacrev

from ddnewton.criteria.hessian_blocks import HESSIAN_ROUNDINGS, joint_expansion
from ddnewton.criteria.hessian_products import criterion_root
from ddnewton.criteria.loss import Expansion, Loss, spanned
from ddnewton.errors import BadType, BadValue, NotFinite, sentence
from ddnewton.linearize.independence import Watch
from ddnewton.linearize.module_state import restoring
from ddnewton.linearize.precision import in_dtype_of
from ddnewton.records import pickled_as_call
from ddnewton.transforms import first_member, over_samples
from ddnewton.trees import as_batch, on_copies, take, tree_map
from ddnewton.types import Criterion, PyTree

logger = logging.getLogger(__name__)

FIRST_SAMPLES = 16
"""How many samples are looked at before all of them, where a criterion has to go one by one."""

GRADIENT_ROUNDINGS = 64.0
"""Up to how many roundings of the largest gradient those of single samples may differ."""


@pickled_as_call
def convex(criterion: Criterion) -> Loss:
    """Return the record of any convex ``criterion(outputs, y) -> scalar``.

    Where it averages or sums one loss over the samples, as is measured on the batch, the Hessian of
    every sample's loss is decomposed, H = Q diag(h) Qᵀ; then L = Q and z = Qᵀ∇ℓ. Where it divides
    by anything else, such as the number of valid labels or the sum of the weights, the samples have
    no losses of their own. Then r_n = N ∂L/∂f_n and H_n = N ∂²L/∂f_n∂f_n take their place, whose
    means are the derivatives of the criterion as it is written, and the value of every sample is
    the batch's; what the criterion reads besides its arguments may be of one size with the batch.
    The loss of a sub-sample at other parameters is that of the batch, with the samples outside it
    left at their outputs, and its change counted as often as their number goes into N.

    An eigenvalue within the rounding error of its Hessian counts as zero; closed forms have no such
    error. Where the Hessians of all samples would have more than 2²⁴ entries, products with them
    are to be had all the same, of the criterion's gradient along a vector: `Loss.root`. What
    `torch.compile` compiles cannot choose by values, and takes every criterion in the
    second way.

    Raises
    ------
    ValueError
        On a batch in which samples interact, ∂²L/∂f_n∂f_m ≠ 0, or a Hessian has a negative
        eigenvalue.

    Examples
    --------
    >>> import torch
    >>> log_cosh = convex(lambda outputs, y: torch.cosh(outputs - y).log().mean())
    >>> log_cosh.expand(torch.zeros(1, 2), torch.zeros(1, 2)).h.tolist()
    [[0.5, 0.5]]

    One of three targets is missing, and the mean is over the other two:

    >>> valid = convex(lambda outputs, y: (outputs - y)[~y.isnan()].square().mean())
    >>> y = torch.tensor([[1.0], [torch.nan], [3.0]])
    >>> expansion = valid.expand(torch.zeros(3, 1), y)
    >>> expansion.value.tolist(), expansion.z.tolist()
    ([5.0, 5.0, 5.0], [[-3.0], [0.0], [-9.0]])
    """
    criterion = on_copies(restoring(criterion))

    # The expansions of all samples, by themselves or together.
    def expand(outputs: Float[Tensor, "n ..."], y: PyTree) -> Expansion:
        batch_loss = joint(outputs, y)
        if batch_loss is not None:
            return joint_expansion(batch_loss, outputs)
        return sample_expansions(criterion, outputs, y)

    def gradient(outputs: Float[Tensor, "n ..."], y: PyTree) -> tuple[Tensor, Tensor]:
        parts = over_samples(partial(_sample_gradient, criterion), outputs, y)
        value, r = (part.double() for part in parts)
        return value, r

    # Which of these it is, of the first member of an ensemble.
    def of_samples(outputs: Float[Tensor, "n ..."], y: PyTree) -> float | None:
        if torch.compiler.is_compiling():  # what is compiled cannot tell, and both are right
            return None
        outputs = first_member(outputs)
        return _denominator(in_dtype_of(outputs, criterion), outputs, tree_map(first_member, y))

    def denominator(outputs: Tensor, y: PyTree) -> float:
        return of_samples(outputs, y) or float(outputs.shape[0])

    def joint(outputs: Tensor, y: PyTree) -> Callable[[Tensor], Tensor] | None:
        if of_samples(outputs, y) is not None:
            return None
        return lambda f: in_dtype_of(f, criterion)(f, y)

    check = partial(_check, criterion)
    return Loss(
        expand,
        denominator,
        check,
        gradient=gradient,
        joint=joint,
        squares=None,
        root=lambda outputs, y: criterion_root(criterion, outputs, y, of_samples, gradient),
    )


def sample_expansions(
    criterion: Criterion, outputs: Float[Tensor, "n ..."], y: PyTree
) -> Expansion:
    """Return the expansions of samples whose losses a criterion has, of batches of one."""
    parts = over_samples(partial(_sample_expansion, criterion), outputs, y)
    return spanned(*(part.double() for part in parts))


def _of_flat_outputs(
    criterion: Criterion, f: Float[Tensor, "..."], y: PyTree
) -> tuple[Float[Tensor, " c"], Callable[[Float[Tensor, " c"]], Float[Tensor, ""]]]:
    """Return one sample's outputs as a vector u, and its loss as a function of u."""
    function = in_dtype_of(f, criterion)
    return f.reshape(-1), lambda u: function(as_batch(u.reshape(f.shape)), as_batch(y))


def _sample_expansion(
    criterion: Criterion, f: Float[Tensor, "..."], y: PyTree
) -> tuple[Float[Tensor, ""], Float[Tensor, "c c"], Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Return value, L, z and h of one sample's loss."""
    # Gradient r and Hessian H = Q diag(h) Qᵀ of one sample's loss, its outputs flat in u.
    u, loss = _of_flat_outputs(criterion, f, y)
    r, H = grad(loss)(u), jacrev(grad(loss))(u)
    h, basis = torch.linalg.eigh(H.nan_to_num(0, 0, 0))
    # A flat direction must get h = 0: along h = 1e-17 an undamped step would be huge. Rounding is
    # relative to the largest entry of H, or, where all of H vanishes, to that of the gradient, or,
    # where a net is right and certain, to that of H at the origin, which may diverge there and
    # counts up to 1.
    origin = jacrev(grad(loss))(0 * u).nan_to_num(0, 0, 0).abs().amax().clamp(max=1)
    size = torch.stack([H.abs().amax(), r.abs().amax(), origin]).amax()
    rounding = HESSIAN_ROUNDINGS * torch.finfo(u.dtype).eps * u.shape[0] * size
    # What is not finite is left for the check of the whole expansion, as eigh raises its own error.
    h = torch.where(H.isfinite().all(), torch.where(h.abs() <= rounding, 0, h), torch.nan)
    return loss(u), basis, basis.mT @ r, h


def _sample_gradient(
    criterion: Criterion, f: Float[Tensor, "..."], y: PyTree
) -> tuple[Float[Tensor, ""], Float[Tensor, " c"]]:
    """Return the value and the gradient of one sample's loss."""
    u, loss = _of_flat_outputs(criterion, f, y)
    return loss(u), grad(loss)(u)


def _denominator(criterion: Criterion, outputs: Float[Tensor, "n ..."], y: PyTree) -> float | None:
    """Return N for a criterion that averages one loss over samples, 1 for one that sums it.

    None stands for any other. Gradients and values decide: those at slightly shifted outputs, where
    no residual vanishes and no two are the same, or, where the criterion does not take these or is
    flat there, those at the outputs.
    """
    if outputs.shape[0] == 1:
        return 1.0
    # The shift is 1/64 of 1 + |f| at most, and different for every output.
    ramp = torch.arange(1, outputs.numel() + 1, dtype=outputs.dtype, device=outputs.device)
    shifted = outputs + (1 + outputs.abs()) * ramp.sin().reshape(outputs.shape) / 64
    try:
        of_batch = grad_and_value(criterion)(shifted, y)
        if 0 < of_batch[0].abs().amax() < torch.inf:
            return _matching_denominator(criterion, shifted, y, *of_batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as reason:  # noqa: BLE001 - outputs may have bounds, which a shift crosses
        logger.info("the criterion does not take shifted outputs: %s", reason)
    of_batch = grad_and_value(criterion)(outputs, y)
    return _matching_denominator(criterion, outputs, y, *of_batch)


def _matching_denominator(
    criterion: Criterion,
    outputs: Float[Tensor, "n ..."],
    y: PyTree,
    gradient: Float[Tensor, "n ..."],
    value: Float[Tensor, ""],
) -> float | None:
    """Return d, N or 1, for which a batch's loss and gradient are the samples' divided by d."""
    n, eps = outputs.shape[0], torch.finfo(outputs.dtype).eps
    denominators, values = [float(n), 1.0], outputs.new_empty(0)
    # A few samples first, as those that vmap refuses are slow.
    for part in (slice(0, FIRST_SAMPLES), slice(FIRST_SAMPLES, n))[: 1 + (n > FIRST_SAMPLES)]:
        try:
            r, sample_values = _of_samples(criterion, outputs[part], take(y, part))
        except torch.OutOfMemoryError:
            raise
        except Exception as reason:  # noqa: BLE001 - it was never asked to take one sample
            logger.info("the criterion does not take single samples: %s", reason)
            return None
        values = torch.cat([values, sample_values])
        r, of_batch = r.reshape(len(r), -1), gradient[part].reshape(len(r), -1)
        largest = r.abs().amax(1, keepdim=True)
        tolerance = eps**0.5 * largest + GRADIENT_ROUNDINGS * eps * largest.amax()
        denominators = [
            d for d in denominators if bool(((d * of_batch - r).abs() <= tolerance).all())
        ]
        if not denominators or not bool(r.isfinite().all()):
            return None
    # What is constant in the samples' losses must be divided in the same way.
    total, tolerance = values.sum(), eps**0.5 * values.abs().sum()
    agreeing = (d for d in denominators if bool((total - d * value).abs() <= tolerance))
    return next(agreeing, None)


def _of_samples(
    criterion: Criterion, outputs: Float[Tensor, "n ..."], y: PyTree
) -> tuple[Float[Tensor, "n ..."], Float[Tensor, " n"]]:
    """Return the gradients and values of the criterion on every sample as a batch of one."""
    function = grad_and_value(lambda f, target: criterion(f[None], as_batch(target)))
    r, values = over_samples(function, outputs, y)
    return r, values


def _check(criterion: Criterion, outputs: Tensor, y: PyTree) -> None:
    """Require a criterion to draw no random numbers, and to return one finite number."""
    if torch.compiler.is_compiling():  # a mode would be left out of the graph
        return
    with Watch("criterion must not depend on chance or on the call before"):
        value = criterion(first_member(outputs), tree_map(first_member, y))
    _check_scalar(value)


def _check_scalar(value: object) -> None:
    """Require a criterion to return one finite number, as a tensor."""
    if not isinstance(value, Tensor):
        rule = "criterion must return a scalar tensor"
        raise BadType(sentence(rule, type(value).__name__, "Compute the loss with torch."))
    if value.ndim != 0:
        rule, got = "criterion must return one number", f"a tensor of shape {list(value.shape)}"
        remedy = 'Return its .mean() or .sum(); of a torch loss, use reduction="mean" or "sum".'
        raise BadValue(sentence(rule, got, remedy))
    if not value.isfinite():
        raise NotFinite(sentence("the loss must be finite", value.item(), "Check outputs and y."))
