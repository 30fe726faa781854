r"""Products with the Hessian of a softmax, its root and its scores, without a matrix of classes.

With the likeliest class last and the others in any order, the tail sums q_j = Σ_{i≥j} p_i are at
least 1 / C, and H = τ (diag(p) − ppᵀ) = L diag(h) Lᵀ as in `cross_entropy`, whatever the order:

    h_j = τ p_j q_{j+1} / q_j,   (Lᵀv)_j = v_j − Σ_{i>j} p_i v_i / q_{j+1},   j = 1 … C−1,
    (L u)_i = u_i − p_i Σ_{j<i} u_j / q_{j+1}.

These are cumulative sums. A tail sum of p v is a mean of the v_i behind j, times q_{j+1}: what is
subtracted from v_j is of its size, so that no product loses a digit to the size of p. The product
with H itself takes a single sum, and loses none either where the likeliest class, l, is the zero:

    (H v)_i = τ p_i (w_i − Σ_j p_j w_j),   w_i = v_i − v_l.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.criteria.loss import SMALLEST_CURVATURE, Uniform
from ddnewton.criteria.root import (
    PositionScores,
    Root,
    diagonal_root,
    root_of_parts,
    squares_over,
)


def softmax_root(
    value: Float[Tensor, " n"],
    gradient: Float[Tensor, "n c"],
    logits: Float[Tensor, "n t v"],
    totals: Float[Tensor, "n t"],
) -> Root:
    """Return the root of softmaxes at t positions with Hessians τ (diag(p) − ppᵀ), τ a total."""
    # A single class is certain.
    if logits.shape[2] == 1:
        return diagonal_root(value, gradient, 0 * gradient)
    # p with the likeliest class last, and the tail sums behind every class but that.
    p, likeliest = logits.softmax(2).contiguous(), logits.argmax(2, keepdim=True)
    p = _swapped(p, likeliest)
    q = tail_sums(p)
    h = totals[..., None] * (p[..., :-1] * (q[..., 1:] / q[..., :-1])).clamp(min=SMALLEST_CURVATURE)
    columns = h.shape[1] * h.shape[2]
    # In the order of the outputs τ p, and 1 / τ, for the products with H itself.
    curvatures = (totals[..., None] * _swapped(p, likeliest)).mT.contiguous()
    inverse = torch.where(totals > 0, 1 / totals, 0)[:, None]
    parts = (h.sqrt(), p, q[..., 1:], likeliest, curvatures, inverse)
    # On vectors whose entries sum to zero, as r does, H⁺ is that of diag(τ p).
    squares = squares_over(gradient, curvatures.flatten(1))
    return root_of_parts(
        value, gradient, parts, columns, _times, _transposed, product=_product, squares=squares
    )


def _product(v: Float[Tensor, "n c"], *parts: Tensor) -> Float[Tensor, "n c"]:
    """Return H v."""
    *_, likeliest, curvatures, inverse = parts
    v = v.reshape(curvatures.shape)
    w = v - v.gather(1, likeliest.mT)
    means = inverse * (curvatures * w).sum(1, keepdim=True)
    return (curvatures * (w - means)).flatten(1)


def _times(
    u: Float[Tensor, "n m"],
    s: Float[Tensor, "n t m2"],
    p: Float[Tensor, "n t v"],
    q: Float[Tensor, "n t m2"],
    likeliest: Int[Tensor, "n t 1"],
    *_: Tensor,
) -> Float[Tensor, "n c"]:
    """Return L √h u."""
    w = s * u.reshape(s.shape)
    before = F.pad((w / q).cumsum(2), (1, 0))
    return outputs_of(_swapped(F.pad(w, (0, 1)) - p * before, likeliest))


def _transposed(
    v: Float[Tensor, "n c"],
    s: Float[Tensor, "n t m2"],
    p: Float[Tensor, "n t v"],
    q: Float[Tensor, "n t m2"],
    likeliest: Int[Tensor, "n t 1"],
    *_: Tensor,
) -> Float[Tensor, "n m"]:
    """Return √h Lᵀ v."""
    x = _swapped(_classes_of(v, p), likeliest)
    means = tail_sums((p * x)[..., 1:]) / q
    return (s * (x[..., :-1] - means)).flatten(1)


def softmax_scores(
    logits: Float[Tensor, "n t v"], totals: Float[Tensor, "n t"], count: int, uniform: Uniform
) -> PositionScores:
    """Return the scores √τ (p − e) at as many drawn classes, by products.

    At the drawn class, p − 1 is minus the sum of all other p.
    """
    p = logits.softmax(2).contiguous()
    drawn = _drawn_classes(p, uniform((*p.shape[:2], count)))
    missed = leave_one_out_sums(p).gather(2, drawn)
    parts = (p, drawn, missed, totals.sqrt()[..., None])
    return PositionScores(parts, p.shape[1], _score_times, _score_transposed, _score_sums)


def _score_times(
    u: Float[Tensor, "n t s"],
    p: Float[Tensor, "n t v"],
    drawn: Int[Tensor, "n t s"],
    missed: Float[Tensor, "n t s"],
    size: Float[Tensor, "n t 1"],
) -> Float[Tensor, "n c"]:
    """Return Σ_s √τ (p − e_s) u_s."""
    zeros = torch.zeros_like(p)
    # A class takes part in the draws of all others by p: u of those is the sum of all, less its
    # own; and exactly zero where it was drawn every time, as there p is near 1.
    here = zeros.scatter_add(2, drawn, u)
    always = zeros.scatter_add(2, drawn, torch.ones_like(u)) == u.shape[2]
    elsewhere = torch.where(always, 0, u.sum(2, keepdim=True) - here)
    return outputs_of(size * (p * elsewhere - zeros.scatter_add(2, drawn, missed * u)))


def _score_transposed(
    v: Float[Tensor, "n c"],
    p: Float[Tensor, "n t v"],
    drawn: Int[Tensor, "n t s"],
    missed: Float[Tensor, "n t s"],
    size: Float[Tensor, "n t 1"],
) -> Float[Tensor, "n t s"]:
    """Return √τ (p − e_s)ᵀ v for every draw."""
    x = _classes_of(v, p)
    return size * (leave_one_out_sums(p * x).gather(2, drawn) - missed * x.gather(2, drawn))


def _score_sums(
    p: Float[Tensor, "n t v"],
    drawn: Int[Tensor, "n t s"],
    missed: Float[Tensor, "n t s"],
    size: Float[Tensor, "n t 1"],
) -> Float[Tensor, "n c s"]:
    """Return the scores of all positions of a sample as one column a draw."""
    columns = score_columns(p, drawn, missed, size)
    return columns.movedim(1, 2).flatten(1, 2)


def score_columns(
    p: Float[Tensor, "n t v"],
    drawn: Int[Tensor, "n t s"],
    missed: Float[Tensor, "n t s"],
    size: Float[Tensor, "n t 1"],
) -> Float[Tensor, "n t v s"]:
    """Return the score √τ (p − e) of every position and draw."""
    everywhere = p[..., None].expand(*p.shape, drawn.shape[2])
    columns = everywhere.scatter(2, drawn[:, :, None], -missed[:, :, None])
    return size[..., None] * columns


def _drawn_classes(p: Float[Tensor, "n t v"], u: Float[Tensor, "n t s"]) -> Int[Tensor, "n t s"]:
    """Draw classes with probabilities p at uniform numbers u."""
    # The index drawn is how many entries of the distribution function u passes. It is scaled by the
    # last of them, which rounding may have made other than 1.
    cdf = p.cumsum(2).contiguous()
    index = torch.searchsorted(cdf, (cdf[..., -1:] * u).contiguous(), right=True)
    return index.clamp(max=p.shape[2] - 1)


def leave_one_out_sums(x: Float[Tensor, "n t v"]) -> Float[Tensor, "n t v"]:
    """Return Σ_{i≠c} x_i for every class c, without subtracting x_c from the sum of all."""
    before, after = x[..., :-1].cumsum(2), tail_sums(x[..., 1:])
    return F.pad(before, (1, 0)) + F.pad(after, (0, 1))


def tail_sums(x: Float[Tensor, "n t v"]) -> Float[Tensor, "n t v"]:
    """Return Σ_{i≥j} x_i for every class j."""
    return x.flip(2).cumsum(2).flip(2)


def outputs_of(x: Float[Tensor, "n t v"]) -> Float[Tensor, "n c"]:
    """Return numbers of positions and classes in the order of the outputs, positions fastest."""
    return x.mT.flatten(1)


def _classes_of(v: Float[Tensor, "n c"], p: Float[Tensor, "n t v"]) -> Float[Tensor, "n t v"]:
    """Return numbers of outputs by position and class."""
    n, t, classes = p.shape
    return v.reshape(n, classes, t).mT.contiguous()


def _swapped(x: Float[Tensor, "n t v"], c: Int[Tensor, "n t 1"]) -> Float[Tensor, "n t v"]:
    """Return numbers of classes with those of class c and of the last class exchanged."""
    last = torch.full_like(c, x.shape[2] - 1)
    return x.scatter(2, c, x.gather(2, last)).scatter(2, last, x.gather(2, c))
