r"""The directions that a selection asks for, without the eigenvectors of all others.

What `top_k`, `above` and `energy` take are leading eigenpairs, and `iterative.dense_lanczos` finds
these. Any other function gets all eigenvalues first, and where it takes some leading ones, theirs
are the only eigenvectors. The eigenvalues tell the rank as well: an eigenvalue is live above the
rounding of its own columns, which is that of all columns at most. Where this does not decide, or
the directions that are asked for are too many, all eigenpairs are computed.
"""

from __future__ import annotations

from numbers import Real

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.iterative.dense_lanczos import PAIRS_SHARE, LeadingPairs, leading_pairs
from ddnewton.quadratic.flat import has_flat_samples
from ddnewton.quadratic.gauss_newton import GaussNewton
from ddnewton.quadratic.kept import Selection, checked_selection, selection_of
from ddnewton.quadratic.quadratic_model import QuadraticModel
from ddnewton.quadratic.spectrum import (
    Decomposition,
    Spectrum,
    column_rounding,
    decompose,
    padded,
    resolved_matrix,
    rounding_of,
    spectrum_of,
)
from ddnewton.select import Above, Energy, Leading
from ddnewton.transforms import is_batched
from ddnewton.types import Select

LEADING_FROM, EIGENVALUES_FROM = 256, 384
"""From which side on leading eigenpairs are computed, and all eigenvalues with these: on smaller
matrices all eigenpairs are as cheap. On an H100 all eigenvalues take 0.9 times what all pairs do,
so that only rules go by leading pairs there."""


def spectrum_and_selection(
    model: QuadraticModel, matrix: GaussNewton, select: Select | None, *, ranked: bool
) -> tuple[Spectrum, Selection]:
    """Return the spectrum of a matrix, which may lack what ``select`` does not ask for.

    ``ranked`` is whether its rank must be known, and the gradient's part without curvature. With
    a function of the caller's they always are.
    """
    side, answer = matrix.entries.shape[1], None
    # Leading eigenpairs as the rule says, or as it takes of all eigenvalues.
    if select is not None and side >= LEADING_FROM and not is_batched(matrix.entries):
        rule = _rule(select)
        if rule is not None and not ranked:
            answer = _by_rule(matrix, rule)
        elif (
            matrix.entries.is_cpu
            and side >= EIGENVALUES_FROM
            and not (_is_of_many(rule, side) or has_flat_samples(model))
        ):
            answer = _by_eigenvalues(matrix, select, model.dtype)
    if answer is not None:
        return answer
    # All eigenpairs.
    spectrum = decompose(matrix)
    return spectrum, selection_of(spectrum, select, model.dtype)


def _rule(select: Select) -> Leading | Above | Energy | None:
    """Return a rule that tells how many leading eigenvalues it takes; None for other functions."""
    if isinstance(select, Leading):
        return select
    # A tensor may have several values, under ``vmap``.
    number = select.threshold if isinstance(select, Above) else 0.0
    number = select.fraction if isinstance(select, Energy) else number
    return select if isinstance(select, Above | Energy) and isinstance(number, Real) else None


def _is_of_many(rule: Leading | Above | Energy | None, side: int) -> bool:
    """Return whether a rule takes more directions than are cheaper than all, as far as is known."""
    return isinstance(rule, Leading) and rule.k * PAIRS_SHARE > side


def _by_rule(
    matrix: GaussNewton, rule: Leading | Above | Energy
) -> tuple[Spectrum, Selection] | None:
    """Return the leading directions that a rule takes; None if that would be dear."""
    if _is_of_many(rule, matrix.entries.shape[1]):
        return None
    pairs = leading_pairs(resolved_matrix(matrix), rule.asked)
    if pairs is None:
        return None
    spectrum = spectrum_of(matrix, Decomposition(pairs.evals, pairs.vectors, None))
    count = len(spectrum.evals)
    indices = torch.arange(count - min(pairs.asked_for, count), count, device=pairs.evals.device)
    return spectrum, (indices, torch.ones_like(indices, dtype=torch.bool))


def _by_eigenvalues(
    matrix: GaussNewton, select: Select, dtype: torch.dtype
) -> tuple[Spectrum, Selection] | None:
    """Return the directions that a function of all eigenvalues takes; None if the rank is unclear.

    The function is called once, whatever becomes of its answer.
    """
    decomposed = resolved_matrix(matrix)
    evals = torch.linalg.eigvalsh(decomposed)
    rank = _rank(matrix, evals)
    if rank is None:
        return None
    # All NM eigenvalues; of how many leading ones the eigenvectors are asked for.
    shown = padded(evals, len(matrix.weights))
    selection = checked_selection(select(shown.to(dtype, copy=True)), shown)
    count = min(len(shown) - int(selection[0].min()) if len(selection[0]) else 1, len(evals))
    pairs = _leading_of(decomposed, evals, count)
    if pairs is None:
        return decompose(matrix), selection
    # These, and the eigenvalues of all others.
    below = evals[: len(evals) - count]
    spectrum = spectrum_of(matrix, Decomposition(pairs.evals, pairs.vectors, below))
    return spectrum._replace(rank=rank), selection


def _leading_of(
    matrix: Float[Tensor, "side side"], evals: Float[Tensor, " side"], count: int
) -> LeadingPairs | None:
    """Return so many leading eigenpairs of a matrix with these eigenvalues; None if it is dear."""
    if count * PAIRS_SHARE > len(matrix):
        return None
    return leading_pairs(matrix, Leading(count).asked, evals)


def _rank(matrix: GaussNewton, evals: Float[Tensor, " side"]) -> Tensor | None:
    """Return how many directions are live, by the eigenvalues; None where these do not decide.

    The columns of a direction weigh λ_max at most.
    """
    rounding = rounding_of(evals, len(evals))
    largest = column_rounding(matrix.columns) * evals[-1].abs()
    candidates = evals[max(0, len(evals) - len(matrix.weights)) :]
    rank = (candidates > rounding + largest).sum()
    return rank if bool(rank == (candidates > rounding).sum()) else None
