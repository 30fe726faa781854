r"""Directionally damped Newton steps: the method from top to bottom, a room to a line.

    X → outputs f → loss expansions L, z, h → columns A = JᵀL       `quadratic_model`
      → the smaller side of A diag(h/N) Aᵀ                          `gauss_newton_matrices`
      → eigenpairs → directions e_k → γ_nk, λ_nk                    `directions_of`
      → δ_k → −γ_k / (λ_k + δ_k)                                    `solve`
      → s = Σ_k −γ_k / (λ_k + δ_k) e_k                              `to_parameters`

Source: Dangel, Tatzel, Hennig, "ViViT: Curvature access through the generalized Gauss-Newton's
low-rank structure", TMLR 2022, arXiv 2106.02624.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ddnewton.criteria import Criteria
from ddnewton.distributed.agreement import Processes
from ddnewton.inputs.groups import Group, grouped
from ddnewton.inputs.scale import Scale
from ddnewton.inputs.terms import TermIndices
from ddnewton.quadratic.arguments import Arguments, arguments_of, leaves_of
from ddnewton.quadratic.compilable import compilable
from ddnewton.quadratic.directions import directions_of
from ddnewton.quadratic.flat import check_slopes
from ddnewton.quadratic.info import NewtonInfo
from ddnewton.quadratic.matrix_free.steps import free_steps, free_steps_and_infos
from ddnewton.quadratic.matrix_free.ways import either_way
from ddnewton.quadratic.quadratic_model import gradients, in_params_units, to_parameters
from ddnewton.quadratic.solution import info_of, solve, without_eigenpairs
from ddnewton.quadratic.summed_model import model_and_matrices
from ddnewton.trees import unflatten
from ddnewton.types import AnyModelFn, DampingRule, GramWays, Precision, PyTree, Select


@compilable
def newton_step(
    model_fn: AnyModelFn,
    params: PyTree,
    X: PyTree,
    y: PyTree,
    criterion: Criteria,
    damping: float | Tensor | DampingRule,
    *,
    select: Select | None = None,
    complement: float | None = None,
    groups: Sequence[Group] | None = None,
    subsampling_grad: TermIndices | None = None,
    subsampling_ggn: TermIndices | None = None,
    subsampling_curvature: TermIndices | None = None,
    gram: GramWays = "auto",
    tol: float = 1e-2,
    chunk_size: int | None = None,
    precision: Precision = "auto",
    scale: Scale = None,
    process_group: Processes = None,
) -> PyTree:
    r"""Return the directionally damped Newton step, to be added to the parameters.

    .. math:: s = \sum_k \frac{-\gamma_k}{\lambda_k + \delta_k} e_k

    e_k and λ_k are eigenpairs of the generalized Gauss-Newton matrix G of the loss on the batch,
    γ_k = e_kᵀ∇ℓ the slope along e_k, and δ_k the damping. With one δ for all this is −(G + δI)⁻¹g.

    Parameters
    ----------
    model_fn
        ``model_fn(params, X) -> outputs`` on a batch, samples on axis 0. Anything torch.func can
        differentiate in which one sample's output does not depend on another's. Or a dict of such
        functions, the terms of a loss that is their sum: X, y and, unless one serves all, criterion
        are dicts of the same keys, and each term has its own samples and its own mean.
    params
        Pytree of floating-point tensors; complex ones, and outputs, count as pairs of reals.
    X, y
        Pytrees of tensors, samples on axis 0, on any device: a chunk at a time goes to that of the
        parameters. Or `ddnewton.Batches` as X, and None as y.
    criterion
        Loss module, function of `torch.nn.functional`, `ddnewton.criteria.Loss`, or any convex
        ``criterion(outputs, y) -> scalar`` whose Hessian has no entries between samples, such as a
        mean over valid labels, or Σwℓ / Σw; or one with other curvature, as `ddnewton.monte_carlo`,
        or, of losses that are not convex, `ddnewton.majorized` or `ddnewton.clipped`.
    damping
        A number δ ≥ 0 in the units of curvature, or a rule ``damping(evals [K], evecs [NM, K],
        gammas [N, K], lambdas [N, K]) -> [K]``, as in `ddnewton.damping`. ∞ skips a direction.
    select
        Which directions: a function of the ascending eigenvalues that returns indices or a mask,
        such as `ddnewton.top_k`. None keeps all above the rank tolerance.
    complement
        Damping δ⊥ > 0 of the gradient's part outside the kept directions, which adds
        −(g − Pg) / δ⊥. None leaves that part out.
    groups
        `ddnewton.Group` records: each has a block of G, directions and damping of its own, as if
        there were no curvature between them. Parameters in no group get a zero step.
    subsampling_grad, subsampling_ggn
        Indices of the samples whose mean is the gradient, and of those that G is the mean over,
        directions and curvatures; None for all. What is summed or averaged is still the loss of
        the whole batch, so that both are estimates of its derivatives. Of terms, dicts of indices.
    subsampling_curvature
        Indices of the samples whose mean curvature along the directions is λ_k, instead of those
        of ``subsampling_ggn``. On samples that the directions have not seen, λ is free of the bias
        that makes it too large on those they are made of (Tatzel et al., 2024, arXiv 2410.14325);
        with ``subsampling_grad`` so is γ. Directions are coupled there, so that an undamped step
        along all may overshoot; one without curvature there, and without damping, is skipped.
    gram
        How the Gram matrix is formed: "structured", from what goes into the layers and what is
        pulled back to them, of a model that can be traced; "dense", from per-sample Jacobians;
        "free", not at all: solvers multiply with it. "auto" is the faster of the first two, or,
        with a warning, "free" where they do not fit into memory.
    tol
        With "free", the share of the exact step's decrease that may be given away; residuals of
        eigenpairs are up to 1e-4 tol λ_max. `NewtonInfo` tells.
    chunk_size
        How many samples' temporaries may exist at once; None fills some 256 MiB.
    precision
        "float64": the model is evaluated in float64 from end to end, or refused where that is
        another function. "model": in its own dtype, never in float64; sums over parameters are
        exact, and `NewtonInfo.rounding` says what is lost. "auto": in float64 where that costs
        little or a small damping asks for it; where it costs more on a GPU whose float64 is slow,
        as "model". Float32 is never rounded to TF32 meanwhile, whatever torch's switches say.
    scale
        The units of the parameters (SciPy's ``x_scale``): with s / scale in place of s, directions
        are eigenvectors, damping acts, and the rank tolerance counts. A positive number; a pytree
        like ``params`` of numbers or tensors that can be broadcast to the leaves; or "jac", for
        parameters of different sizes: the inverse of the columns' lengths √G_jj, 1 for a parameter
        that changes nothing. "jac" leaves blocks as they are that have no more columns N·M than
        parameters, where it would lower the samples' loss and raise the error between them.
    process_group
        A `torch.distributed` group, or DeviceMesh of one axis, whose ranks make this call together:
        X and y are this rank's samples, any number; params are the same on all, and so is the
        result, to the bit. Indices count the samples of all ranks in order. None: this process.

    Returns
    -------
    PyTree
        Like ``params``: same structure, shapes, dtypes, devices. Zero for unused parameters.

    Raises
    ------
    ValueError, TypeError
        Where an argument breaks a rule; the message names it.

    Examples
    --------
    A straight line through three points:

    >>> import torch
    >>> line = lambda p, x: p["slope"] * x + p["offset"]
    >>> zero = {"slope": torch.zeros(1), "offset": torch.zeros(1)}
    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> step = newton_step(line, zero, x, 3 * x + 1, torch.nn.MSELoss(), damping=0.0)
    >>> {name: round(value.item(), 5) for name, value in step.items()}
    {'slope': 3.0, 'offset': 1.0}
    """
    arguments = arguments_of(
        *(model_fn, params, X, y, criterion),
        damping=damping,
        select=select,
        complement=complement,
        groups=groups,
        subsampling_grad=subsampling_grad,
        subsampling_ggn=subsampling_ggn,
        subsampling_curvature=subsampling_curvature,
        gram=gram,
        tol=tol,
        chunk_size=chunk_size,
        precision=precision,
        scale=scale,
        process_group=process_group,
        by_sample=False,
    )
    vectors = either_way(arguments, _steps, free_steps)
    return unflatten(vectors, leaves_of(arguments), params)


def _steps(arguments: Arguments) -> list[Float[Tensor, " _"]]:
    """Return the steps of all blocks, by their matrices."""
    with model_and_matrices(arguments) as (model, matrices):
        complement = arguments.complement
        check_slopes(model, matrices, curved=complement is None)
        coordinates = without_eigenpairs(model, matrices, [complement] * len(matrices))
        if coordinates is None:
            blocks = directions_of(model, matrices, only_kept=complement is None)
            coordinates = [solve(model, block, complement).coordinates for block in blocks]
        return in_params_units(model, to_parameters(model, matrices, coordinates))


@compilable
def newton_step_and_info(
    model_fn: AnyModelFn,
    params: PyTree,
    X: PyTree,
    y: PyTree,
    criterion: Criteria,
    damping: float | Tensor | DampingRule,
    *,
    select: Select | None = None,
    complement: float | None = None,
    groups: Sequence[Group] | None = None,
    subsampling_grad: TermIndices | None = None,
    subsampling_ggn: TermIndices | None = None,
    subsampling_curvature: TermIndices | None = None,
    gram: GramWays = "auto",
    tol: float = 1e-2,
    chunk_size: int | None = None,
    precision: Precision = "auto",
    scale: Scale = None,
    process_group: Processes = None,
) -> tuple[PyTree, NewtonInfo | Any]:
    """Return `newton_step` and a record of its parts; with groups, a record for each.

    Parameters, errors and the step are those of `newton_step`.

    Examples
    --------
    >>> import torch
    >>> line = lambda p, x: p["slope"] * x + p["offset"]
    >>> zero = {"slope": torch.zeros(1), "offset": torch.zeros(1)}
    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> _, info = newton_step_and_info(line, zero, x, 3 * x + 1, torch.nn.MSELoss(), 0.0)
    >>> int(info.rank), info.evals
    (2, tensor([0.5585, 4.7749]))
    """
    arguments = arguments_of(
        *(model_fn, params, X, y, criterion),
        damping=damping,
        select=select,
        complement=complement,
        groups=groups,
        subsampling_grad=subsampling_grad,
        subsampling_ggn=subsampling_ggn,
        subsampling_curvature=subsampling_curvature,
        gram=gram,
        tol=tol,
        chunk_size=chunk_size,
        precision=precision,
        scale=scale,
        process_group=process_group,
    )
    vectors, infos = either_way(arguments, _steps_and_infos, free_steps_and_infos)
    return unflatten(vectors, leaves_of(arguments), params), grouped(infos, groups)


def _steps_and_infos(arguments: Arguments) -> tuple[list[Float[Tensor, " _"]], list[NewtonInfo]]:
    """Return the steps of all blocks and their records, by their matrices."""
    with model_and_matrices(arguments) as (model, matrices):
        complement = arguments.complement
        check_slopes(model, matrices, curved=complement is None)
        blocks = directions_of(model, matrices, only_kept=complement is None, ranked=True)
        solutions = [solve(model, block, complement) for block in blocks]
        vectors = to_parameters(model, matrices, [step.coordinates for step in solutions])
        vectors = in_params_units(model, vectors)
        infos = map(partial(info_of, model), blocks, gradients(model, matrices), solutions)
        return vectors, list(infos)
