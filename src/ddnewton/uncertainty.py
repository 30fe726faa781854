r"""How uncertain fitted parameters are: their covariance, and their standard errors.

    rows √w_i a_i of G = BᵀB → B = Q R → G⁻¹ = W Wᵀ → s² W Wᵀ        `inverse_root`

They are what `scipy.optimize.curve_fit` returns, for any pytree of parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddnewton.criteria import Criteria
from ddnewton.criteria.noise import about_noise, of_likelihood
from ddnewton.distributed.agreement import Processes, agreeing, team_of
from ddnewton.distributed.fingerprints import options_told
from ddnewton.edge import computing
from ddnewton.errors import BadType, sentence
from ddnewton.inputs.term_names import about_term
from ddnewton.quadratic.arguments import arguments_of
from ddnewton.quadratic.covariance_root import Uncertainty, uncertainty_of
from ddnewton.quadratic.matrix_free.ways import on_all_ranks, refuse_free
from ddnewton.trees import named_leaves, tree_flatten, tree_unflatten, unflattened
from ddnewton.types import AnyModelFn, GramWays, Precision, PyTree


@computing
def covariance(
    model_fn: AnyModelFn,
    params: PyTree,
    X: PyTree,
    y: PyTree,
    criterion: Criteria = F.mse_loss,
    *,
    absolute_sigma: bool = False,
    gram: GramWays = "auto",
    chunk_size: int | None = None,
    precision: Precision = "auto",
    process_group: Processes = None,
) -> PyTree:
    r"""Return the covariance of fitted parameters.

    For squared errors with weights w it is, with N residuals r and D parameters,

    .. math:: s^2 (J^\top W J)^{-1}, \qquad s^2 = \frac{r^\top W r}{N - D},

    what `scipy.optimize.curve_fit` returns, and NIST certifies: the noise has variance s² / w, with
    s² estimated from the residuals. For the negative log-likelihoods of noise that is known, such
    as `torch.nn.GaussianNLLLoss`, PoissonNLLLoss or CrossEntropyLoss, it is the inverse of the
    Fisher information of all samples together, whether the criterion averages or sums,

    .. math:: \Bigl(\sum_n J_n^\top F_n J_n\Bigr)^{-1}.

    Of several terms it is that of all together, with their weights and reductions taken at their
    word: so that every residual counts alike, let each term have ``reduction="sum"``.

    Both hold at a minimum and for many samples, as far as the model is linear between estimates
    that differ by their standard errors. Keep a parameter that a bound holds in ``model_fn``.

    Parameters
    ----------
    model_fn, params, X, y
        As for `ddnewton.newton_step`; ``params`` are the fitted ones.
    criterion
        That of the fit, squared errors by default: these, a function of ``outputs`` and ``y`` that
        is a sum of squares, or a likelihood with Fisher information, as `ddnewton.fisher` takes it.
    absolute_sigma
        As for `scipy.optimize.curve_fit`: whether the weights of squared errors are 1/σ² of the
        noise itself, ``mse(weight=1 / sigma**2)``, so that s² is 1 and not estimated. The weights
        of likelihoods always are what they say.
    gram, chunk_size, precision, process_group
        As for `ddnewton.newton_step`; gram not "free".

    Returns
    -------
    PyTree
        Nested as `torch.func.hessian` nests: ``covariance["a"]["b"]`` has the shape of
        ``params["a"]`` followed by that of ``params["b"]``; for one tensor it is one tensor. Its
        units are those of both parameters. Infinite, with a warning, where the data do not tell
        all parameters, or where N ≤ D leaves nothing to estimate s² from.

    Raises
    ------
    ValueError, TypeError
        Where an argument breaks a rule, and for criteria that say nothing of the noise.

    Notes
    -----
    Sources: Seber, Wild, *Nonlinear Regression*, 1989, section 2.1; McCullagh, Nelder, *Generalized
    Linear Models*, 2nd ed., 1989, appendix A. The rows of J are factorized; JᵀJ is never formed.

    Examples
    --------
    >>> import torch
    >>> line = lambda p, x: p["slope"] * x + p["offset"]
    >>> x = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    >>> y = torch.tensor([0.9, 3.1, 5.1, 6.9], dtype=torch.float64)
    >>> fitted = {"slope": torch.tensor(2.0).double(), "offset": torch.tensor(1.0).double()}
    >>> cov = covariance(line, fitted, x, y)
    >>> cov["slope"]["slope"].item(), cov["slope"]["offset"].item()
    (0.004, -0.006)
    """
    uncertainty = _uncertainty(
        *(model_fn, params, X, y, criterion),
        absolute_sigma=absolute_sigma,
        gram=gram,
        chunk_size=chunk_size,
        precision=precision,
        process_group=process_group,
    )
    matrix = uncertainty.root @ uncertainty.root.mT
    matrix = torch.where(uncertainty.finite, matrix, torch.inf)
    # A tree of trees: rows of every leaf, cut into the columns of every leaf.
    leaves, spec = tree_flatten(params)
    sizes = [leaf.numel() for leaf in leaves]
    nested = []
    for leaf, rows in zip(leaves, matrix.split(sizes), strict=True):
        parts = zip(leaves, rows.split(sizes, 1), strict=True)
        dtypes = [torch.promote_types(leaf.dtype, other.dtype) for other in leaves]
        shaped = (part.reshape((*leaf.shape, *other.shape)) for other, part in parts)
        pairs = zip(shaped, dtypes, strict=True)
        blocks = [part.to(dtype=dtype, device=leaf.device) for part, dtype in pairs]
        nested.append(tree_unflatten(blocks, spec))
    return tree_unflatten(nested, spec)


@computing
def standard_errors(
    model_fn: AnyModelFn,
    params: PyTree,
    X: PyTree,
    y: PyTree,
    criterion: Criteria = F.mse_loss,
    *,
    absolute_sigma: bool = False,
    gram: GramWays = "auto",
    chunk_size: int | None = None,
    precision: Precision = "auto",
    process_group: Processes = None,
) -> PyTree:
    r"""Return the standard errors of fitted parameters, the roots of `covariance`'s diagonal.

    Parameters, errors and warnings are those of `covariance`.

    Returns
    -------
    PyTree
        Like ``params``: same structure, shapes, dtypes, devices.

    Examples
    --------
    A mean and its standard error, s / √N:

    >>> import torch
    >>> y = torch.tensor([[4.0], [6.0], [5.0], [5.0]])
    >>> mean = lambda p, x: p.expand(len(x), 1)
    >>> error = standard_errors(mean, torch.tensor(5.0), y, y)
    >>> error.item(), (y.std() / 2).item()
    (0.4082, 0.4082)
    """
    uncertainty = _uncertainty(
        *(model_fn, params, X, y, criterion),
        absolute_sigma=absolute_sigma,
        gram=gram,
        chunk_size=chunk_size,
        precision=precision,
        process_group=process_group,
    )
    errors = torch.linalg.vector_norm(uncertainty.root, dim=1)
    return unflattened(torch.where(uncertainty.finite, errors, torch.inf), params)


def _uncertainty(
    model_fn: AnyModelFn,
    params: PyTree,
    X: PyTree,
    y: PyTree,
    criterion: Criteria,
    *,
    absolute_sigma: bool,
    gram: GramWays,
    chunk_size: int | None,
    precision: Precision,
    process_group: Processes,
) -> Uncertainty:
    """Return the root of the covariance of fitted parameters."""
    team = team_of(process_group, params)
    with agreeing(team, lambda: options_told({"absolute_sigma": absolute_sigma})):
        _check_arguments(params, absolute_sigma)
        ways: Any = {"gram": gram, "chunk_size": chunk_size, "precision": precision}
        ways |= {"process_group": team, "gradient": False, "takes_batches": False}
        with about_noise():
            arguments = arguments_of(model_fn, params, X, y, _likelihoods(criterion), **ways)
            refuse_free(arguments, "a covariance", 'Leave gram at "auto".')
    call = partial(uncertainty_of, absolute_sigma=absolute_sigma)
    return on_all_ranks(arguments, call, uncertainty_of.__name__)


def _likelihoods(criterion: Criteria) -> Criteria:
    """Return the criteria with the curvature that a covariance follows from."""
    if not isinstance(criterion, Mapping):
        return of_likelihood(criterion)
    likelihoods = {}
    for name, of_term in criterion.items():
        with about_term(name):
            likelihoods[name] = of_likelihood(of_term)
    return likelihoods


def _check_arguments(params: PyTree, absolute_sigma: object) -> None:
    """Require real parameters, and a choice that is true or false."""
    if not isinstance(absolute_sigma, bool):
        rule, remedy = "absolute_sigma must be True or False", "Weights are those of the criterion."
        raise BadType(sentence(rule, repr(absolute_sigma), remedy))
    for path, leaf in named_leaves(params):
        if isinstance(leaf, Tensor) and leaf.is_complex():
            rule, got = "params must be real for a covariance", f"params{path}: {leaf.dtype}"
            remedy = "Let params be torch.view_as_real of them, and model_fn view_as_complex them."
            raise BadType(sentence(rule, got, remedy))
