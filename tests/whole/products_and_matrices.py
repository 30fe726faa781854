"""What the tests of steps by products share: how these are compared with steps by matrices."""

import torch

from ddnewton import newton_step_and_info
from tests.linearize.layer_cases import basis_free
from tests.reference import Dense, error, flat

FREE = {"gram": "free", "tol": 1e-20}
"""On, until a step is off by 1e-10; eigenpairs of small sides are those of the whole space."""

WITHOUT_DIRECTIONS = ("loss", "losses", "gradient_norm")
OF_DIRECTIONS = (*WITHOUT_DIRECTIONS, "gradient_share", "evals")


def lost_share(truth: Dense, step, delta: float, exact: torch.Tensor) -> float:
    """The share of the damped model's decrease that a step gives away, beside the exact one."""
    metric = truth.ggn + delta * torch.eye(len(exact), dtype=exact.dtype)
    apart = flat(step) - exact
    return float(apart @ metric @ apart / (exact @ metric @ exact))


def compared(given, damping, tolerance: float, **options):
    """Take a step by products and one by matrices, and see that steps and records are alike.

    A ``damping`` is a function that makes one anew.
    """
    step, info = newton_step_and_info(*given, damping(), **options, **FREE)
    exact, other = newton_step_and_info(*given, damping(), **options)
    assert error(step, exact) < tolerance
    pairs = zip(info, other, strict=True) if "groups" in options else [(info, other)]
    for record, expected in pairs:
        check_record(record, expected, tolerance)
    return step, info


def check_record(info, other, tolerance: float) -> None:
    """Compare a record of products with one of matrices, whose directions may be more."""
    assert bool(info.products > 0) == bool(info.gradient_norm > 0)
    assert int(other.products) == 0
    assert len(other.residuals) == 0
    by_direction = bool(info.lost.isnan())
    for field in OF_DIRECTIONS if by_direction else WITHOUT_DIRECTIONS:
        assert error(*map(numbers, (getattr(info, field), getattr(other, field)))) < tolerance, (
            field
        )
    decreases = info.predicted_decrease.sum(), other.predicted_decrease.sum()
    if not by_direction:
        # One direction, which is the step.
        assert len(info.evals) == len(info.residuals) == 1
        assert int(info.rank) == -1
        assert torch.equal(info.evals, info.lambdas.mean(0))
        return
    assert error(*decreases) < tolerance
    assert int(info.rank) in (-1, int(other.rank))
    assert info.residuals.shape == info.evals.shape
    largest = other.evals.amax() if len(other.evals) else 1
    assert (info.residuals <= 1e-6 * largest).all()
    if not len(other.evals):
        return
    ascending = other.evals.argsort(stable=True)
    for found, true in zip(
        basis_free(*of(info, ascending)), basis_free(*of(other, ascending)), strict=True
    ):
        assert error(found, true) < tolerance


def of(info, order):
    """A record with its directions in another order, and the eigenvalues."""
    along = {name: getattr(info, name)[..., order] for name in ("evals", "gammas", "lambdas")}
    record = info._replace(**along)
    return record, record.evals


def numbers(value) -> torch.Tensor:
    """A number, or those of all terms, in one tensor."""
    return torch.stack(list(value.values())) if isinstance(value, dict) else value
