r"""A loss as the library sees it: values, gradients and Hessians in the outputs, factored.

A convex loss enters the Gauss-Newton matrix through its gradient and Hessian in the outputs.
Every loss here gives both in one factored form,

    ∇ℓ = L z + R 1,        ∇²ℓ = L diag(h) Lᵀ,        h ≥ 0,

with L [c, m] of moderate size whatever the outputs. R [c, q] holds the part of the gradient that L
does not span; it has one column for curvature that is sampled, and none for any other. The
textbook root of the Hessian is S = L √h, and the gradient is S t with t = z / √h; but where a net
is confident h underflows and t overflows, while L and z keep their digits. So z and h are stored
apart. A sample whose loss is locally flat (h = 0) but not level (z ≠ 0) is no special case either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

from jaxtyping import Float
from torch import Tensor
from torch.func import grad_and_value

from ddnewton.criteria.root import PositionScores, RootOf
from ddnewton.errors import BadValue, sentence
from ddnewton.linearize.basis import Basis, combined
from ddnewton.records import Call, reduced
from ddnewton.types import PyTree

Reduction: TypeAlias = Literal["mean", "sum"]

SMALLEST_CURVATURE = 1e-200
"""Floor of h for a loss that is never flat: h must not underflow to 0, however sure the net."""


class Expansion(NamedTuple):
    """Losses around their outputs: ℓ(f + u) ≈ value + (L z + R 1)ᵀu + ½ uᵀL diag(h) Lᵀu."""

    value: Float[Tensor, " n"]
    basis: Basis  # L [n, c, m], or its blocks where the loss sums over positions
    z: Float[Tensor, "n m"]  # z
    h: Float[Tensor, "n m"]  # h
    R: Float[Tensor, "n c q"]  # R, with q = 0 or 1


Uniform: TypeAlias = Callable[[Sequence[int]], Tensor]
"""``uniform(shape)``: random numbers strictly between 0 and 1, in float64."""


class Loss(NamedTuple):
    """A convex loss as a record of functions.

    ``expand(outputs, y)`` returns the `Expansion` of every sample's loss ℓ_n, not yet averaged;
    ``denominator(outputs, y)`` is what the reduction divides Σ_n ℓ_n by; ``check(outputs, y)``
    raises where a batch does not fit the loss. ``scores(outputs, y, count, uniform)`` returns
    columns s [n c m], gradients of the loss at ``count`` targets drawn from the model's likelihood,
    with its Fisher information as their mean square E[s sᵀ]: ``count`` of them, or as many for each
    of several positions, one position after the other. It is None for a loss without a likelihood
    that can be drawn from. ``gradient(outputs, y)`` returns values [n] and gradients
    [n c] without the Hessian; it is None where they are taken from the expansion. ``value`` returns
    the values alone; it is None where they are taken from the gradient.
    ``fisher(outputs, y)`` is ``expand`` with the Fisher information for the Hessian; it is None
    where the two are the same, as they are for a loss with ``scores``, or where there is none.
    ``columns(outputs)`` is the largest m that a sample's L may have, which is asked for before L is
    made; it is None for as many as outputs. ``positions(outputs)`` is the number of blocks of equal
    size that L is made of, which are all that is stored of it; it is None for a single one.

    ``root(outputs, y)`` returns the `Root` of the same losses, not yet averaged either: products
    with their Hessian that need no L. It is None, or returns None, where the expansion is as good.
    ``fisher_root`` is the same for ``fisher``, and ``position_scores`` for the ``scores`` of a loss
    that sums over positions of its own. Whoever replaces ``expand``, ``fisher`` or ``scores`` of a
    record replaces these as well, by None if by nothing else.

    The samples of some losses have no values of their own, as where a mean divides by what all of
    them have in y. For such a batch ``joint(outputs, y)`` returns the batch's loss as a function of
    its outputs, and the expansion has it as the value of every sample; for any other it returns
    None. ``gradient`` is of samples that have values; `value_and_gradient` is of either.

    ``squares`` says whether the loss is a sum of squared residuals, with a noise whose variance it
    does not know; it is None where only a batch tells, for a function.

    ``redrawn(number)`` returns a loss that draws random numbers with others, for a further batch of
    the same data set, and ``redrawn(0, rows)`` one that draws what a larger batch draws for some of
    its samples; it is None for a loss that draws none. ``curvature_ratio(outputs, y)`` is by what
    the Hessian is multiplied because of what a batch divides by; it is None for none. The curvature
    of a sample ``depends_on_batch`` where other samples' outputs or targets have a part in it.
    """

    expand: Callable[[Tensor, PyTree], Expansion]
    denominator: Callable[[Tensor, PyTree], float | Tensor]
    check: Callable[[Tensor, PyTree], None]
    scores: Callable[[Tensor, PyTree, int, Uniform], Tensor] | None = None
    gradient: Callable[[Tensor, PyTree], tuple[Tensor, Tensor]] | None = None
    joint: Callable[[Tensor, PyTree], Callable[[Tensor], Tensor] | None] | None = None
    fisher: Callable[[Tensor, PyTree], Expansion] | None = None
    columns: Callable[[Tensor], int] | None = None
    positions: Callable[[Tensor], int] | None = None
    squares: bool | None = False
    root: RootOf | None = None
    fisher_root: RootOf | None = None
    position_scores: Callable[[Tensor, PyTree, int, Uniform], PositionScores] | None = None
    redrawn: Callable[..., Any] | None = None
    curvature_ratio: Callable[[Tensor, PyTree], Tensor] | None = None
    depends_on_batch: bool = False
    value: Callable[[Tensor, PyTree], Tensor] | None = None
    made_by: Call | None = None  # by which it is pickled

    def __reduce__(self) -> tuple[Any, ...]:
        return reduced(self)


PRODUCTS_OF = {
    "root": "expand",
    "fisher_root": "fisher",
    "position_scores": "scores",
    "positions": "expand",
    "value": "gradient",
}
"""Which functions of a record are another's by products or in part, or tell its results' form."""


def without_stale_products(loss: Loss) -> Loss:
    """Return a record without the products of functions that `_replace` put others in place of."""
    if loss.made_by is None:
        return loss
    made = Loss(*loss.made_by.fields)

    def is_as_made(name: str) -> bool:
        return getattr(loss, name) is getattr(made, name)

    stale: dict[str, Any] = {
        products: None
        for products, function in PRODUCTS_OF.items()
        if is_as_made(products) and not is_as_made(function)
    }
    return loss._replace(**stale) if stale else loss


def spanned(
    value: Float[Tensor, " n"],
    basis: Basis,
    z: Float[Tensor, "n m"],
    h: Float[Tensor, "n m"],
) -> Expansion:
    """Return the expansion of losses whose gradient is L z."""
    return Expansion(value, basis, z, h, R=z.new_zeros(*basis.shape[:2], 0))


def slopes_of(expansion: Expansion) -> Float[Tensor, "n c"]:
    """Return the gradients of the losses in the outputs, L z + R 1."""
    _, basis, z, _, R = expansion
    return combined(basis, z) + R.sum(2)


def value_and_gradient(
    loss: Loss, outputs: Float[Tensor, "n ..."], y: PyTree
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n c"]]:
    """Return the loss and gradient of every sample of a batch, without the Hessian if it allows it.

    Where samples have no losses of their own these are the batch's loss, and N times the sample's
    part of its gradient.
    """
    batch_loss = loss.joint(outputs, y) if loss.joint is not None else None
    if batch_loss is not None:
        n = outputs.shape[0]
        gradient, value = grad_and_value(batch_loss)(outputs)
        return value.double().expand(n), n * gradient.double().reshape(n, -1)
    return sample_gradient(loss, outputs, y)


def sample_gradient(
    loss: Loss, outputs: Float[Tensor, "n ..."], y: PyTree
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n c"]]:
    """Return loss and gradient of some samples, of a batch whose samples have their own losses."""
    if loss.gradient is not None:
        return loss.gradient(outputs, y)
    expansion = loss.expand(outputs, y)
    return expansion.value, slopes_of(expansion)


def sample_values(loss: Loss, outputs: Float[Tensor, "n ..."], y: PyTree) -> Float[Tensor, " n"]:
    """Return the losses of some samples, of a batch whose samples have their own."""
    if loss.value is not None:
        return loss.value(outputs, y)
    return sample_gradient(loss, outputs, y)[0]


def name_of(criterion: object) -> str:
    """Return the name of a criterion for messages: of a function its own, else that of its type."""
    function = criterion.func if isinstance(criterion, partial) else criterion
    return str(getattr(function, "__name__", type(function).__name__))


def per_element(reduction: Reduction) -> Callable[[Tensor, PyTree], float]:
    """Return the denominator of a loss whose "mean" runs over samples and outputs: N C, or 1."""
    check_reduction(reduction)
    return lambda outputs, y: float(outputs.numel()) if reduction == "mean" else 1.0


def check_reduction(reduction: str) -> None:
    """Require a reduction to one number: "mean" or "sum"."""
    if reduction not in ("mean", "sum"):
        rule = "the criterion must reduce to one number"
        raise BadValue(
            sentence(rule, f"reduction={reduction!r}", 'Use reduction="mean" or reduction="sum".')
        )
