"""Every direction in a few numbers: means and variances of the samples' slopes and curvatures."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.errors import BadType, BadValue, public, sentence
from ddnewton.quadratic.info import NewtonInfo


class Summary(NamedTuple):
    """A `NewtonInfo` with means and variances in place of its [N, K] matrices.

    Numbers are float64: the square of a slope may be too small for float32.
    """

    loss: Float[Tensor, ""]
    evals: Float[Tensor, " k"]
    slope: Float[Tensor, " k"]
    """γ_k, the mean of γ_nk over the samples."""
    slope_variance: Float[Tensor, " k"]
    """Variance of γ_nk between samples, unbiased; nan if there is only one."""
    curvature: Float[Tensor, " k"]
    """λ_k, the mean of λ_nk over the samples; with ``subsampling_curvature`` over those samples."""
    curvature_variance: Float[Tensor, " k"]
    """Variance of λ_nk between samples, unbiased; nan if there is only one."""
    dampings: Float[Tensor, " k"]
    coefficients: Float[Tensor, " k"]
    predicted_decrease: Float[Tensor, " k"]
    gradient_norm: Float[Tensor, ""]
    gradient_share: Float[Tensor, ""]
    rank: Int[Tensor, ""]
    samples: Int[Tensor, ""]
    """Number of samples of the slopes."""
    curvature_samples: Int[Tensor, ""]
    """Number of samples of the curvatures."""
    flat_share: Float[Tensor, ""]


Info: TypeAlias = NewtonInfo | Summary


@public
def summary(info: Info) -> Summary:
    """Return the summary of a step's record; a summary is returned as it is.

    Raises
    ------
    TypeError
        If ``info`` is not a record, but a list of them, as with groups: pass these one by one.
    ValueError
        If ``info`` is the record of an ensemble: pass its members one by one.

    Examples
    --------
    >>> import torch
    >>> from ddnewton import newton_step_and_info
    >>> x, line = torch.tensor([[0.0], [1.0], [2.0]]), lambda p, x: p * x
    >>> problem = (line, torch.zeros(1), x, 3 * x + 1, torch.nn.MSELoss())
    >>> _, info = newton_step_and_info(*problem, damping=0.0)
    >>> directions = summary(info)
    >>> directions.curvature.item(), directions.curvature_variance.item(), directions.samples.item()
    (3.3333, 17.3333, 3)
    """
    # One record, of one model.
    if isinstance(info, Summary):
        return info
    if not isinstance(info, NewtonInfo):
        rule, got = "info must be a NewtonInfo or a Summary", type(info).__name__
        raise BadType(sentence(rule, got, "With groups, pass their records one by one."))
    if info.evals.ndim != 1:
        rule, got = "info must be one record", f"evals of shape {list(info.evals.shape)}"
        raise BadValue(sentence(rule, got, "Take a member: tree_map(lambda x: x[0], info)."))
    # The moments over the samples stand for γ_nk and λ_nk; the fields without samples stay.
    slope, slope_variance = _moments(info.gammas)
    curvature, curvature_variance = _moments(info.lambdas)
    return Summary(
        loss=info.loss.double(),
        evals=info.evals.double(),
        slope=slope,
        slope_variance=slope_variance,
        curvature=curvature,
        curvature_variance=curvature_variance,
        dampings=info.dampings.double(),
        coefficients=info.coefficients.double(),
        predicted_decrease=info.predicted_decrease.double(),
        gradient_norm=info.gradient_norm.double(),
        gradient_share=info.gradient_share.double(),
        rank=info.rank,
        samples=torch.full_like(info.rank, info.gammas.shape[0]),
        curvature_samples=torch.full_like(info.rank, info.lambdas.shape[0]),
        flat_share=info.flat_share.double(),
    )


def _moments(values: Float[Tensor, "n k"]) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Return the mean and the unbiased variance over samples; nan, without a warning, for one."""
    mean = values.double().mean(0)
    return mean, (values - mean).square().sum(0) / (values.shape[0] - 1)
