r"""Products with the Hessian of a criterion, by differentiating its gradient along a vector.

Where the samples of a loss have many outputs, neither their Hessians [n, c, c] nor eigenvectors fit
into memory, and ∇²L v costs two evaluations of the loss by reverse mode (Pearlmutter, "Fast exact
multiplication by the Hessian", Neural Computation 6, 1994). Where no outputs of two samples
interact, one product with the Hessian of a batch has those of all samples in it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.criteria.hessian_blocks import (
    HESSIAN_ROUNDINGS,
    Derivatives,
    derivatives_of,
    interaction_message,
)
from ddnewton.criteria.root import Root, Rows
from ddnewton.errors import BadValue
from ddnewton.linearize.precision import in_dtype_of, ramp
from ddnewton.transforms import any_known
from ddnewton.trees import take
from ddnewton.types import Criterion, PyTree

DENSE_ENTRIES = 2**24
"""Up to how many entries the Hessians of all samples are decomposed, and give a root."""


def criterion_root(
    criterion: Criterion,
    outputs: Float[Tensor, "n ..."],
    y: PyTree,
    of_samples: Callable[[Tensor, PyTree], float | None],
    gradient: Callable[[Tensor, PyTree], tuple[Tensor, Tensor]],
) -> Root | None:
    """Return products with Hessians that are too large to be made, and else None.

    ``of_samples`` says what divides the sum of the samples' losses; None where they have none.
    """
    if not too_many_outputs(outputs):
        return None
    function, d = in_dtype_of(outputs, criterion), of_samples(outputs, y)
    if d is None:
        return joint_root(lambda f: function(f, y), outputs)
    return samples_root(function, outputs, y, *gradient(outputs, y), summed=d == 1)


def too_many_outputs(outputs: Float[Tensor, "n ..."]) -> bool:
    """Return whether the Hessians of a batch's samples are too large to be decomposed."""
    return outputs.numel() * outputs[0].numel() > DENSE_ENTRIES


def samples_root(
    criterion: Criterion,
    outputs: Float[Tensor, "n ..."],
    y: PyTree,
    value: Float[Tensor, " n"],
    gradient: Float[Tensor, "n c"],
    *,
    summed: bool,
) -> Root:
    """Return the products of losses of which a criterion is the mean, or the sum.

    Those of some samples are by the criterion on these samples.
    """
    derivatives = derivatives_of(lambda f: criterion(f, y), outputs)
    factor = 1 / outputs.shape[0] if summed else 1.0

    def at(samples: Rows) -> Root:
        return samples_root(
            criterion,
            outputs[samples],
            take(y, samples),
            value[samples],
            gradient[samples],
            summed=summed,
        )

    return _root(value, gradient, lambda v: factor * _product(derivatives, outputs, v), at)


def joint_root(loss: Callable[[Tensor], Tensor], outputs: Float[Tensor, "n ..."]) -> Root:
    """Return the products of a batch's loss: N times its Hessian; every value is the batch's.

    Those of some samples are of vectors that are zero at all others.

    Raises
    ------
    ValueError
        Where samples interact in the loss.
    """
    n = outputs.shape[0]
    derivatives = derivatives_of(loss, outputs)
    _check_samples_apart(derivatives, outputs)
    value = derivatives.value.double().expand(n)
    gradient = derivatives.slopes.double().reshape(n, -1)

    # A vector of some samples is one of all that is zero elsewhere.
    def of_rows(rows: Int[Tensor, " n2"]) -> Root:
        def product(v: Float[Tensor, "n2 c"]) -> Float[Tensor, "n2 c"]:
            whole = torch.zeros_like(gradient).index_copy(0, rows, v.to(gradient))
            return _product(derivatives, outputs, whole)[rows]

        return _root(value[rows], gradient[rows], product, lambda samples: of_rows(rows[samples]))

    everyone = torch.arange(n, device=outputs.device)
    return _root(
        value,
        gradient,
        lambda v: _product(derivatives, outputs, v),
        lambda samples: of_rows(everyone[samples]),
    )


def _root(
    value: Float[Tensor, " n"],
    gradient: Float[Tensor, "n c"],
    product: Callable[[Tensor], Tensor],
    at: Callable[[Rows], Root],
) -> Root:
    """Return products with Hessians of which no root is had."""
    return Root(
        value=value,
        gradient=gradient,
        columns=gradient.shape[1],
        times=None,
        transposed=None,
        product=product,
        spans=True,
        at=at,
    )


def _product(
    derivatives: Derivatives, outputs: Float[Tensor, "n ..."], v: Float[Tensor, "n c"]
) -> Float[Tensor, "n c"]:
    """Return N ∂²L v in float64, of vectors of flat outputs."""
    vectors = v.reshape(outputs.shape).to(outputs.dtype)
    return derivatives.product(vectors[None])[0].double().reshape(v.shape)


def _check_samples_apart(derivatives: Derivatives, outputs: Float[Tensor, "n ..."]) -> None:
    """Require the Hessian of a batch to have no entries between samples.

    Then a product with a vector, each sample's part of it times another number, is the product with
    the vector, each sample's part of it times this number.
    """
    n, probe = outputs.shape[0], ramp(outputs)
    factors = ramp(outputs.reshape(n, -1)[:, 0]).reshape(n, *[1] * (outputs.ndim - 1))
    images = derivatives.product(torch.stack([probe, factors * probe]))
    distance, size = (images[1] - factors * images[0]).abs().amax(), images.abs().amax()
    # What is left is compared with the rounding of the products, and of the gradient where these
    # vanish; nan is left for the check of the products themselves.
    eps, c = torch.finfo(outputs.dtype).eps, outputs[0].numel()
    slopes = derivatives.slopes.abs().amax()
    within = ~(distance > eps**0.5 * size + HESSIAN_ROUNDINGS * eps * c * slopes)
    if torch.compiler.is_compiling():  # which cannot choose by values, but raises when it runs
        torch._assert_async(within, interaction_message())
    if any_known(~within):
        raise BadValue(interaction_message())
