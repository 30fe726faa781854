r"""The curvature itself: eigenvalues, eigenvectors, and derivatives along them.

With `newton_step` these are the four computations of Dangel, Tatzel, Hennig, "ViViT: Curvature
access through the generalized Gauss-Newton's low-rank structure", TMLR 2022, arXiv 2106.02624.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ddnewton.criteria import Criteria
from ddnewton.distributed.agreement import Processes
from ddnewton.inputs.groups import Group, grouped
from ddnewton.inputs.terms import TermIndices
from ddnewton.quadratic.arguments import arguments_of, leaves_of
from ddnewton.quadratic.compilable import compilable
from ddnewton.quadratic.derivatives import Derivatives
from ddnewton.quadratic.eigenpairs import all_eigenvalues, derivatives_along, eigenpairs
from ddnewton.quadratic.matrices import whole_gram_matrices
from ddnewton.quadratic.matrix_free.leading_directions import free_derivatives, free_eigenpairs
from ddnewton.quadratic.matrix_free.ways import either_way, on_all_ranks, refuse_free
from ddnewton.trees import unflatten
from ddnewton.types import AnyModelFn, GramWays, Precision, PyTree, Select


@compilable
def ggn_eigvalsh(
    model_fn: AnyModelFn,
    params: PyTree,
    X: PyTree,
    y: PyTree,
    criterion: Criteria,
    *,
    groups: Sequence[Group] | None = None,
    subsampling_ggn: TermIndices | None = None,
    gram: GramWays = "auto",
    chunk_size: int | None = None,
    precision: Precision = "auto",
    process_group: Processes = None,
) -> Float[Tensor, " i"] | Any:
    r"""Return the eigenvalues of the generalized Gauss-Newton matrix, ascending.

    .. math:: G = \frac{1}{N} \sum_n J_n^\top \nabla^2 \ell_n J_n = V V^\top

    They are those of the Gram matrix VᵀV, as many as V has columns: NM. All others of G's are zero;
    where NM > D, so are the first NM − D. Arguments and errors as for `ddnewton.newton_step`.

    Returns
    -------
    Tensor
        [NM], in the dtype of the outputs or float32 if that is narrower; above a gigaflop, what is
        below 1e-7 of the largest is known to `ggn_eigh` only. With ``groups`` a tuple of such.

    Examples
    --------
    >>> import torch
    >>> line = lambda p, x: p["slope"] * x + p["offset"]
    >>> zero = {"slope": torch.zeros(1), "offset": torch.zeros(1)}
    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> ggn_eigvalsh(line, zero, x, 3 * x + 1, torch.nn.MSELoss())
    tensor([0.0000, 0.5585, 4.7749])
    """
    arguments = arguments_of(
        *(model_fn, params, X, y, criterion),
        groups=groups,
        subsampling_ggn=subsampling_ggn,
        gram=gram,
        chunk_size=chunk_size,
        precision=precision,
        process_group=process_group,
        gradient=False,
    )
    refuse_free(arguments, "all eigenvalues", "For leading ones pass select=top_k(k) to ggn_eigh.")
    return grouped(on_all_ranks(arguments, all_eigenvalues, all_eigenvalues.__name__), groups)


@compilable
def ggn_eigh(
    model_fn: AnyModelFn,
    params: PyTree,
    X: PyTree,
    y: PyTree,
    criterion: Criteria,
    *,
    select: Select | None = None,
    groups: Sequence[Group] | None = None,
    subsampling_ggn: TermIndices | None = None,
    gram: GramWays = "auto",
    tol: float = 1e-2,
    chunk_size: int | None = None,
    precision: Precision = "auto",
    process_group: Processes = None,
) -> tuple[Float[Tensor, " k"], PyTree] | Any:
    r"""Return eigenvalues of the generalized Gauss-Newton matrix, and their eigenvectors.

    .. math:: G e_k = \lambda_k e_k, \qquad e_k^\top e_l = \delta_{kl}

    Arguments and errors as for `ddnewton.newton_step`. K vectors take K times the memory of the
    parameters: say which with ``select``; None means all above the rank tolerance.

    Returns
    -------
    tuple
        ``evals`` [K], in the order of ``select``, else ascending, and ``evecs``: a pytree like
        ``params`` whose leaves have K in front, orthonormal over all leaves together. An eigenvalue
        below the rank tolerance has no vector that the batch determines: it is zero. With
        ``groups`` a tuple of such pairs; the vectors of a group are zero outside it.

    Examples
    --------
    >>> import torch
    >>> from ddnewton import top_k
    >>> line = lambda p, x: p["slope"] * x + p["offset"]
    >>> zero = {"slope": torch.zeros(1), "offset": torch.zeros(1)}
    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> evals, evecs = ggn_eigh(line, zero, x, 3 * x + 1, torch.nn.MSELoss(), select=top_k(1))
    >>> evals, {name: e.abs() for name, e in evecs.items()}
    (tensor([4.7749]), {'slope': tensor([[0.8112]]), 'offset': tensor([[0.5847]])})
    """
    arguments = arguments_of(
        *(model_fn, params, X, y, criterion),
        select=select,
        groups=groups,
        subsampling_ggn=subsampling_ggn,
        gram=gram,
        tol=tol,
        chunk_size=chunk_size,
        precision=precision,
        process_group=process_group,
        gradient=False,
    )
    evals, vectors, dtype = either_way(arguments, eigenpairs, free_eigenpairs)
    evals = [of_block.to(dtype) for of_block in evals]
    pairs = zip(vectors, leaves_of(arguments), strict=True)
    evecs = [unflatten([of_block], [leaves], params) for of_block, leaves in pairs]
    return grouped(list(zip(evals, evecs, strict=True)), groups)


@compilable
def directional_derivatives(
    model_fn: AnyModelFn,
    params: PyTree,
    X: PyTree,
    y: PyTree,
    criterion: Criteria,
    *,
    select: Select | None = None,
    groups: Sequence[Group] | None = None,
    subsampling_grad: TermIndices | None = None,
    subsampling_ggn: TermIndices | None = None,
    subsampling_curvature: TermIndices | None = None,
    gram: GramWays = "auto",
    tol: float = 1e-2,
    chunk_size: int | None = None,
    precision: Precision = "auto",
    process_group: Processes = None,
) -> Derivatives | Any:
    r"""Return slopes and curvatures of every sample's loss along eigenvectors of the GGN.

    .. math:: \gamma_{nk} = e_k^\top \nabla \ell_n, \qquad
        \lambda_{nk} = e_k^\top J_n^\top \nabla^2 \ell_n J_n e_k

    Their means over the samples, of all terms, are the slope of the loss along e_k and, over those
    that G is made of, the eigenvalue. Arguments and errors as for `ddnewton.newton_step`.

    Returns
    -------
    Derivatives
        ``gammas`` [N, K], a row for every sample of ``subsampling_grad``, and ``lambdas`` [N, K],
        of ``subsampling_curvature``, or else of ``subsampling_ggn``. The sign of a direction, and
        so of its γ, is arbitrary, but that of `ggn_eigh`. With ``groups`` a tuple of such pairs.

    Examples
    --------
    >>> import torch
    >>> from ddnewton import top_k
    >>> line = lambda p, x: p["slope"] * x + p["offset"]
    >>> zero = {"slope": torch.zeros(1), "offset": torch.zeros(1)}
    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> problem = (line, zero, x, 3 * x + 1, torch.nn.MSELoss())
    >>> gammas, lambdas = directional_derivatives(*problem, select=top_k(1))
    >>> lambdas[:, 0], lambdas.mean()
    (tensor([0.6838, 3.8974, 9.7434]), tensor(4.7749))
    """
    arguments = arguments_of(
        *(model_fn, params, X, y, criterion),
        select=select,
        groups=groups,
        subsampling_grad=subsampling_grad,
        subsampling_ggn=subsampling_ggn,
        subsampling_curvature=subsampling_curvature,
        gram=gram,
        tol=tol,
        chunk_size=chunk_size,
        precision=precision,
        process_group=process_group,
    )
    pairs, dtype = either_way(arguments, derivatives_along, free_derivatives)
    pairs = [Derivatives(*(part.to(dtype) for part in pair)) for pair in pairs]
    return grouped(pairs, groups)


@compilable
def gram_matrix(
    model_fn: AnyModelFn,
    params: PyTree,
    X: PyTree,
    y: PyTree,
    criterion: Criteria,
    *,
    groups: Sequence[Group] | None = None,
    subsampling_ggn: TermIndices | None = None,
    gram: GramWays = "auto",
    chunk_size: int | None = None,
    precision: Precision = "auto",
    process_group: Processes = None,
) -> Float[Tensor, "i i"] | Any:
    r"""Return the Gram matrix VᵀV, which has the nonzero eigenvalues of the GGN VVᵀ.

    .. math:: V_{:, nm} = J_n^\top s_{nm} / \sqrt N,\; \nabla^2 \ell_n = \sum_m s_{nm} s_{nm}^\top

    Arguments and errors as for `ddnewton.newton_step`.

    Returns
    -------
    Tensor
        [NM, NM], in the dtype of the outputs or float32 if that is narrower, rows and columns by
        m·N + n, term after term. N is the number of samples, those of a sub-sample; M that of
        columns of a sample: the number of outputs, for cross-entropy C − 1 at every position, under
        `monte_carlo` that of draws, under `empirical_fisher` one. With ``groups`` a tuple of such.

    Examples
    --------
    >>> import torch
    >>> line = lambda p, x: p["slope"] * x + p["offset"]
    >>> zero = {"slope": torch.zeros(1), "offset": torch.zeros(1)}
    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> gram_matrix(line, zero, x, 3 * x + 1, torch.nn.MSELoss())
    tensor([[0.6667, 0.6667, 0.6667],
            [0.6667, 1.3333, 2.0000],
            [0.6667, 2.0000, 3.3333]])
    """
    arguments = arguments_of(
        *(model_fn, params, X, y, criterion),
        groups=groups,
        subsampling_ggn=subsampling_ggn,
        gram=gram,
        chunk_size=chunk_size,
        precision=precision,
        process_group=process_group,
        gradient=False,
        takes_batches=False,
    )
    refuse_free(arguments, "the Gram matrix", "ggn_eigh has its leading part, by select=top_k(k).")
    name = whole_gram_matrices.__name__
    return grouped(on_all_ranks(arguments, whole_gram_matrices, name), groups)
