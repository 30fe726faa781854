"""(G + δI) x = b by products with G: conjugate gradients, which a sketch helps if they take long.

A sketch costs as many products as its rank, and pays where δ lies far below the leading eigenvalues
or where many systems with one G are solved. So the first iterations go without. Where they are not
enough, the sketch is made, and the iteration goes on from where it is.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.iterative.conjugate_gradients import Solution, conjugate_gradients
from ddnewton.iterative.products import BlockProduct, Product
from ddnewton.iterative.sketch import Sketch, largest_rank, preconditioner, sketch

PLAIN_PRODUCTS = 100
"""After as many products a sketch is made."""

SKETCH_RANK = 200
"""Of a sketch, where there are the products, the memory and the side for it."""

SMALLEST_RANK = 8
"""A sketch of less is not worth its products."""


def solve(
    product: Product,
    right: Float[Tensor, " side"],
    delta: float,
    *,
    tol: float,
    limit: int,
    generator: torch.Generator,
    rounding: float = 0.0,
    memory: float | None = None,
    approximation: Sketch | None = None,
    start: Float[Tensor, " side"] | None = None,
    squared: float = math.inf,
) -> tuple[Solution, Sketch | None]:
    """Return the solution of (G + δI) x = b, and the sketch of G that was used.

    With a sketch, of an earlier call or a G nearby, it is used from the beginning; that of a G that
    is another one bounds nothing. Otherwise one is made, with the random numbers of ``generator``,
    after a hundred products, if there is ``memory`` for it, in bytes. Its products are counted with
    the others. The other arguments are those of `conjugate_gradients`.

    Raises
    ------
    NotFinite
        A product has nan or inf.
    BadValue
        A product shows a negative curvature.

    >>> G = torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64).diag()
    >>> b, generator = torch.tensor([5.0, 4.0, 1.0], dtype=torch.float64), torch.Generator()
    >>> solution, made = solve(lambda v: G @ v, b, 1.0, tol=1e-12, limit=10, generator=generator)
    >>> solution.x, made
    (tensor([1., 2., 1.], dtype=torch.float64), None)
    """
    # With a sketch at once, or without one for a hundred products.
    precondition = None if approximation is None else preconditioner(approximation, delta)
    unaided = approximation is None and delta > 0
    norm = 0.0 if approximation is None else float(approximation.evals[0])
    first = conjugate_gradients(
        product,
        right,
        delta,
        tol=tol,
        limit=min(limit, PLAIN_PRODUCTS) if unaided else limit,
        preconditioner=precondition,
        rounding=rounding,
        start=start,
        norm=norm,
        squared=squared,
    )
    if first.converged or first.products >= limit or not unaided:
        return first, approximation
    # A sketch, that leaves half of the products for the rest of the way.
    made = affordable(product, right, limit - first.products, generator, rounding, memory)
    spent = first.products + (made.products if made else 0)
    second = conjugate_gradients(
        product,
        right,
        delta,
        tol=tol,
        limit=limit - spent,
        preconditioner=preconditioner(made, delta) if made else None,
        rounding=rounding,
        start=first.x,
        norm=first.norm,
    )
    return second._replace(products=spent + second.products, curved=first.curved), made


def affordable(
    product: Product,
    right: Float[Tensor, " side"],
    products: int,
    generator: torch.Generator,
    rounding: float,
    memory: float | None,
) -> Sketch | None:
    """Return a sketch of G as large as there are products and memory for, or none."""
    side = len(right)
    rank = min(SKETCH_RANK, products // 2, side // 2)
    if memory is not None:
        rank = min(rank, largest_rank(memory, side))
    if rank < SMALLEST_RANK:
        return None
    return sketch(
        by_columns(product), side, rank, generator, device=right.device, rounding=rounding
    )


def by_columns(product: Product) -> BlockProduct:
    """Return V ↦ G V, one column after the other."""
    return lambda V: torch.stack([product(column) for column in V.unbind(1)], 1)
