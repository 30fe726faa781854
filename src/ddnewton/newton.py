r"""Directionally damped Newton steps: the whole method in one file.

    X → outputs f → loss expansions L, z, h → columns A = JᵀL → eigenpairs of A diag(h/N) Aᵀ
      → directions e_k → γ_nk, λ_nk → δ_k → s = Σ_k −γ_k / (λ_k + δ_k) e_k

Source: Dangel, Tatzel, Hennig, "ViViT: Curvature access through the generalized Gauss-Newton's
low-rank structure", TMLR 2022, arXiv 2106.02624.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.checks import check_batch, check_functions, check_options, check_params
from ddnewton.cholesky import damped_step
from ddnewton.complement import outside, stray, vanishing
from ddnewton.criteria import Loss, as_loss, expand_batch
from ddnewton.damping import as_rule, check_dampings
from ddnewton.derivatives import Derivatives, directional_derivatives
from ddnewton.errors import public
from ddnewton.gram import Columns, columns_of, is_gram, small_matrix
from ddnewton.jacobians import Linearization
from ddnewton.linearization import linearized
from ddnewton.select import Directions, Leading, keep
from ddnewton.spectrum import Spectrum, decompose
from ddnewton.transforms import surely
from ddnewton.trees import parameter_count, unflatten
from ddnewton.types import Criterion, DampingRule, ModelFn, PyTree, Select

RESOLUTION = 1e4
"""From the largest curvature down to which ratio float32 is enough."""


class NewtonInfo(NamedTuple):
    """What a step was made of, in the dtype of the model's outputs or float32 if that is narrower.

    λ, δ and ``evals`` have the units of curvature (loss per squared parameter), γ of slope.
    """

    loss: Float[Tensor, ""]
    evals: Float[Tensor, " k"]
    gammas: Float[Tensor, "n k"]
    lambdas: Float[Tensor, "n k"]
    dampings: Float[Tensor, " k"]
    coefficients: Float[Tensor, " k"]
    """−γ_k / (λ_k + δ_k): how far the step goes along each direction."""
    predicted_decrease: Float[Tensor, " k"]
    """−γ_k c_k − ½ λ_k c_k²: by how much the quadratic model falls along each direction."""
    gradient_norm: Float[Tensor, ""]
    gradient_share: Float[Tensor, ""]
    """Σ_k γ_k² / ‖g‖²: the share of the squared gradient norm inside the kept directions."""
    rank: Int[Tensor, ""]
    """Number of eigenvalues above the rank tolerance."""


@public
@torch.no_grad()
def newton_step(
    model_fn: ModelFn,
    params: PyTree,
    X: PyTree,
    y: PyTree,
    criterion: Criterion | Loss,
    damping: float | Tensor | DampingRule,
    *,
    select: Select | None = None,
    complement: float | None = None,
    gram: Literal["auto", "structured", "dense"] = "auto",
    chunk_size: int | None = None,
) -> PyTree:
    r"""Return the directionally damped Newton step, to be added to the parameters.

    .. math:: s = \sum_k \frac{-\gamma_k}{\lambda_k + \delta_k} e_k

    e_k and λ_k are eigenpairs of the generalized Gauss-Newton matrix G of the loss on the batch,
    γ_k = e_kᵀ∇ℓ the slope along e_k, and δ_k the damping. With one δ and all directions this is
    −(G + δI)⁻¹g on the range of G.

    Parameters
    ----------
    model_fn
        ``model_fn(params, X) -> outputs`` on a batch, samples on axis 0. Anything torch.func can
        differentiate in which one sample's output does not depend on another's.
    params
        Pytree of floating-point tensors.
    X, y
        Inputs and targets: tensors or pytrees of tensors with the samples on axis 0.
    criterion
        Loss module, function of `torch.nn.functional`, `ddnewton.criteria.Loss`, or any convex
        ``criterion(outputs, y) -> scalar`` that averages or sums over the samples.
    damping
        A number δ ≥ 0, or a rule ``damping(evals [K], evecs [NM, K], gammas [N, K],
        lambdas [N, K]) -> [K]``. Infinity skips a direction. Damping has the units of curvature.
    select
        Which directions: a function of the ascending eigenvalues that returns indices or a mask,
        such as `ddnewton.top_k`. None keeps all above the rank tolerance.
    complement
        Damping δ⊥ > 0 of the gradient's part outside the kept directions, which adds
        −(g − Pg) / δ⊥. None leaves that part out.
    gram
        How the Gram matrix is formed: "structured", from what goes into the layers and what is
        pulled back to them; "dense", from per-sample Jacobians; "auto", the faster of the two.
        "structured" refuses a model that cannot be traced. A model from `ddnewton.prepare` is
        structured unless this says "dense".
    chunk_size
        How many samples' temporaries may exist at once. None chooses from the memory at hand.
        Chunks are paired, so that time grows with their number where the samples do not fit.

    Returns
    -------
    PyTree
        Like ``params``: same structure, shapes, dtypes, devices. Zero for unused parameters.

    Raises
    ------
    ValueError, TypeError
        Where an argument breaks a rule; the message names it and says what to do.

    Examples
    --------
    A straight line through three points, in one undamped step:

    >>> import torch
    >>> line = lambda p, x: p["slope"] * x + p["offset"]
    >>> zero = {"slope": torch.zeros(1), "offset": torch.zeros(1)}
    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> step = newton_step(line, zero, x, 3 * x + 1, torch.nn.MSELoss(), damping=0.0)
    >>> {name: round(value.item(), 5) for name, value in step.items()}
    {'slope': 3.0, 'offset': 1.0}
    """
    check_functions(model_fn, select)
    check_options(damping, complement, gram, chunk_size)
    smallest = _smallest(select, damping)
    with _problem(model_fn, params, X, y, criterion, smallest, gram, chunk_size) as problem:
        flat = None
        if select is None and not callable(damping) and complement is None:
            flat = damped_step(*problem.system, problem.shares, damping)
        if flat is None:
            leading = select.k if isinstance(select, Leading) and complement is None else None
            spectrum = decompose(*problem.system, leading)
            flat = spectrum.lift(_solve(problem, spectrum, damping, select, complement).coordinates)
    return unflatten(flat, params)


@public
@torch.no_grad()
def newton_step_and_info(
    model_fn: ModelFn,
    params: PyTree,
    X: PyTree,
    y: PyTree,
    criterion: Criterion | Loss,
    damping: float | Tensor | DampingRule,
    *,
    select: Select | None = None,
    complement: float | None = None,
    gram: Literal["auto", "structured", "dense"] = "auto",
    chunk_size: int | None = None,
) -> tuple[PyTree, NewtonInfo]:
    """Return `newton_step` and a record of what it was made of.

    Parameters, errors and the step itself are those of `newton_step`.

    Examples
    --------
    >>> import torch
    >>> line = lambda p, x: p["slope"] * x + p["offset"]
    >>> zero = {"slope": torch.zeros(1), "offset": torch.zeros(1)}
    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> step, info = newton_step_and_info(line, zero, x, 3 * x + 1, torch.nn.MSELoss(), 0.0)
    >>> int(info.rank), [round(value, 4) for value in info.evals.tolist()]
    (2, [0.5585, 4.7749])
    """
    check_functions(model_fn, select)
    check_options(damping, complement, gram, chunk_size)
    smallest = _smallest(select, damping)
    with _problem(model_fn, params, X, y, criterion, smallest, gram, chunk_size) as problem:
        spectrum = decompose(*problem.system)
        solution = _solve(problem, spectrum, damping, select, complement)
        step = unflatten(spectrum.lift(solution.coordinates), params)
        return step, _info(problem, spectrum, solution)


class System(NamedTuple):
    """The Gauss-Newton matrix A diag(w) Aᵀ: the products of A, w = h / N, the smaller side."""

    columns: Columns
    weights: Float[Tensor, " i"]
    matrix: Float[Tensor, "side side"]


class Problem(NamedTuple):
    """The loss to second order on a batch: its values and factors per sample, and the matrix."""

    dtype: torch.dtype
    values: Float[Tensor, " n"]
    slopes: Float[Tensor, "m n"]  # z
    curvatures: Float[Tensor, "m n"]  # h
    shares: Float[Tensor, " i"]  # z / N: the gradient is A z / N
    system: System


class Solution(NamedTuple):
    """A step along the kept directions, and in the coordinates of the spectrum."""

    kept: Directions
    derivatives: Derivatives
    dampings: Float[Tensor, " k"]
    coefficients: Float[Tensor, " k"]
    coordinates: Float[Tensor, " j"]


@contextmanager
def _problem(  # noqa: PLR0917 - the public functions' arguments, in their order
    model_fn: ModelFn,
    params: PyTree,
    X: PyTree,
    y: PyTree,
    criterion: Criterion | Loss,
    smallest: float | Tensor | None,
    gram: str,
    chunk_size: int | None,
) -> Iterator[Problem]:
    """Go down from the batch to its Gauss-Newton matrix.

    Curvatures matter down to the size of ``smallest``, None for those of the leading directions.
    """
    check_params(params)
    check_batch(X=X, y=y)
    loss, d = as_loss(criterion), parameter_count(params)
    with linearized(model_fn, params, X, gram, chunk_size) as model:
        problem = _expanded(model, loss, y, d)
        if model.precisely and smallest is not None and _unresolved(problem.system, smallest):
            problem = _expanded(model.precisely(), loss, y, d)
        yield problem


def _expanded(model: Linearization, loss: Loss, y: PyTree, d: int) -> Problem:
    """Expand the loss around the outputs, and pull it back to the parameters."""
    values, basis, slopes, curvatures, _ = expand_batch(loss, model.outputs, model.precise, y)
    n = basis.shape[0]
    weights, shares = curvatures.T.reshape(-1) / n, slopes.T.reshape(-1) / n  # the mean's 1/N
    columns = columns_of(model.jacobian(basis))
    system = System(columns, weights, small_matrix(columns, weights, d))
    dtype = torch.promote_types(model.outputs.dtype, torch.float32)
    return Problem(dtype, values, slopes.T, curvatures.T, shares, system)


def _smallest(
    select: Select | None, damping: float | Tensor | DampingRule
) -> float | Tensor | None:
    """Return down to which size curvatures count: to δ where all directions do, or to none."""
    if select is not None:
        return None
    return 0.0 if callable(damping) else damping


def _unresolved(system: System, smallest: float | Tensor) -> bool:
    """Return whether curvatures that small are lost in the rounding of float32."""
    diagonal = system.matrix.diagonal()
    if is_gram(system.matrix, system.weights):
        diagonal = system.weights * diagonal
    return surely(~torch.as_tensor(smallest * RESOLUTION >= diagonal.sum()))


def _solve(
    problem: Problem,
    spectrum: Spectrum,
    damping: float | Tensor | DampingRule,
    select: Select | None,
    complement: float | None,
) -> Solution:
    """Choose the directions, ask for their dampings, and walk along them."""
    kept = keep(spectrum, select, problem.dtype)
    derivatives = directional_derivatives(kept.slopes, problem.slopes, problem.curvatures)
    known = [kept.evals, kept.evecs, *derivatives]
    if callable(damping):  # the rule's own copies, to be changed as it likes
        known = [tensor.to(problem.dtype, copy=True) for tensor in known]
    dampings = as_rule(damping)(*known)
    check_dampings(dampings, kept.evals.shape[0])
    gamma, curvature = derivatives.gammas.mean(0), derivatives.lambdas.mean(0)
    coefficients = torch.where(kept.live, -gamma / (curvature + dampings.double()), 0)
    coordinates = kept.span @ coefficients
    if complement is not None:
        coordinates = coordinates - outside(spectrum, problem.shares, kept) / complement
    elif select is None and not callable(damping):
        curved = problem.curvatures.reshape(-1) > 0
        coordinates = coordinates - vanishing(spectrum, problem.shares, curved, damping)
    return Solution(kept, derivatives, dampings, coefficients, coordinates)


def _info(problem: Problem, spectrum: Spectrum, solution: Solution) -> NewtonInfo:
    """Return the record of a step."""
    kept = solution.kept
    gammas, lambdas = solution.derivatives
    gamma, curvature = gammas.mean(0), lambdas.mean(0)
    slopes = torch.where(spectrum.live, spectrum.slopes.mT @ problem.shares, 0)
    square = slopes.square().sum()
    square = square + spectrum.lift(stray(spectrum, problem.shares)).square().sum()
    inside = torch.where(kept.live, gamma, 0).square().sum()
    c = solution.coefficients
    info = NewtonInfo(
        loss=problem.values.mean(),
        evals=kept.evals,
        gammas=gammas,
        lambdas=lambdas,
        dampings=solution.dampings,
        coefficients=c,
        predicted_decrease=-c * (gamma + curvature * c / 2),
        gradient_norm=square.sqrt(),
        gradient_share=torch.where(square > 0, inside / square, 1),
        rank=spectrum.live.sum(),
    )
    cast = (x if x.dtype == torch.int64 else x.to(problem.dtype) for x in info)
    return NewtonInfo(*cast)
