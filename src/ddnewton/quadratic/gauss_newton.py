"""The Gauss-Newton matrix of every block, on the smaller of its two sides.

With the columns of the curvature A₁ [d, i] and their weights w = h / N it is

    G = A₁ diag(w) A₁ᵀ  [d, d],      K = √w A₁ᵀA₁ √w  [i, i]

on the side of the parameters and on that of the columns, where it is the Gram matrix. Both have the
same nonzero eigenvalues. Whoever needs the matrix asks for it here; no shape tells the side.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.columns.alignment import Leaves
from ddnewton.columns.asked_of_ranks import ColumnsOfRanks
from ddnewton.columns.factors import Jacobian
from ddnewton.columns.gram import Columns, columns_of, matmat
from ddnewton.columns.normal_equations import NormalEquations, normal_equations
from ddnewton.columns.tiles import side_by_side
from ddnewton.inputs.checks import check_derivatives
from ddnewton.inputs.groups import Block
from ddnewton.inputs.memory import NEVER_ASKED_BYTES, check_fits

FACTORIZE = (
    "One number δ > 0 as damping, without select, is a factorization in place of eigenpairs. "
)

FEWER_COLUMNS = (
    'Pass gram="free", which forms no matrix; monte_carlo(criterion, 1, generator) or '
    "empirical_fisher(criterion) for fewer columns, subsampling_ggn for fewer samples, or groups "
    "for smaller matrices."
)
"""The ways out where matrices do not fit: all that is told of them, in one place."""


class GaussNewton(NamedTuple):
    """The Gauss-Newton matrix of a block: K on the side of the columns, else G.

    ``entries`` are AᵀA₁ [a, i] on the side of the columns, where the rows after the first i belong
    to columns of the gradient alone, and G [d, d] on that of the parameters. ``gradient`` is in the
    coordinates of that side: the weights of all columns, or g itself.
    """

    on_columns: bool
    columns: Columns
    weights: Float[Tensor, " i"]
    gradient_weights: Float[Tensor, " a"]
    entries: Float[Tensor, "side side2"]
    gradient: Float[Tensor, " side"]
    of_ranks: ColumnsOfRanks | None = None  # those that can factorize it, where there are several

    @property
    def side(self) -> int:
        """How many eigenvalues can be positive."""
        return len(self.weights) if self.on_columns else len(self.entries)

    def matrix(self) -> Float[Tensor, "side2 side2"]:
        """Return K or G, a copy that may be written to."""
        if not self.on_columns:
            return self.entries.clone()
        root = self.weights.sqrt()
        return (root[:, None] * self.entries[: len(root)]).mul_(root)

    def matvec(self, vector: Float[Tensor, " side2"]) -> Float[Tensor, " side2"]:
        """Return K u or G v."""
        if not self.on_columns:
            return self.entries @ vector
        root = self.weights.sqrt()
        return root * (self.entries[: len(root)] @ (root * vector))

    def diagonal(self) -> Float[Tensor, " side2"]:
        """Return the diagonal of K or G."""
        diagonal = self.entries.diagonal()
        return self.weights * diagonal if self.on_columns else diagonal

    def trace(self) -> Float[Tensor, ""]:
        """Return the trace, the same on both sides."""
        return self.diagonal().sum()

    def coordinates(self, weights: Float[Tensor, " a"]) -> Float[Tensor, " side"]:
        """Return the sum of all columns with some weights, in the coordinates of the side.

        With the weights of the gradient it is at hand.
        """
        if self.on_columns:
            return weights
        if weights is self.gradient_weights:
            return self.gradient
        return self.columns.matmat(weights[None])[0]

    def scaled(self, columns: Columns, scale: Float[Tensor, " d"] | None) -> GaussNewton:
        """Return S G S and S g, with the columns S A; None leaves matrix and gradient alone."""
        if scale is None:
            return self._replace(columns=columns)
        entries = scale[:, None] * self.entries * scale
        return self._replace(columns=columns, entries=entries, gradient=scale * self.gradient)

    def to_parameters(self, coordinates: Float[Tensor, "k j"]) -> Float[Tensor, "k d"]:
        """Return vectors of parameters from weights of all columns, or from themselves."""
        return self.columns.matmat(coordinates) if self.on_columns else coordinates


def check_matrices_fit(
    leaves: Sequence[Tensor], blocks: Sequence[Block], curvatures: Sequence[Float[Tensor, "_ _"]]
) -> None:
    """Require the matrices of the blocks, and what their steps make of them, to fit into memory.

    With a number as damping that is a factorization in place, else eigenpairs. ``curvatures`` are
    h [n, m] of every term, one for each column.
    """
    # What their steps hold at a time.
    lengths = [sum(leaves[leaf].numel() for leaf in block.leaves) for block in blocks]
    count = sum(h.numel() for h in curvatures)
    by_eigenpairs = not all(map(_is_factorized, blocks))
    device = curvatures[0].device
    copies = [_copies(count, d, device, by_eigenpairs=by_eigenpairs) for d in lengths]
    sides = [min(count, d) for d in lengths]
    pairs = zip(copies, sides, strict=True)
    size = int(sum(number * side**2 for number, side in pairs) * torch.float64.itemsize)
    if size <= NEVER_ASKED_BYTES:
        return
    # Refuse what does not fit, with its figures and the ways out.
    shapes = [h.shape for h in curvatures]
    what = (
        f"Gauss-Newton matrices of side {', '.join(map(str, sides))}, "
        f"{'with copies and eigenvectors of each' if by_eigenpairs else 'factorized'}, "
        f"of N·M = {' + '.join(f'{n}·{m}' for n, m in shapes)} columns along "
        f"{', '.join(map(str, lengths))} parameters"
    )
    remedy = FACTORIZE + FEWER_COLUMNS if by_eigenpairs else FEWER_COLUMNS
    check_fits(size, what, remedy, device)


def check_eigenpairs_fit(matrix: GaussNewton) -> None:
    """Require the eigenpairs of a matrix that is there to fit into memory beside that."""
    side, count, device = matrix.entries.shape[1], len(matrix.weights), matrix.weights.device
    d = count if matrix.on_columns else side
    copies = _copies(count, d, device, by_eigenpairs=True) - 1
    what = f"copies and eigenvectors of a Gauss-Newton matrix of side {side}"
    size = int(copies * side**2 * torch.float64.itemsize)
    check_fits(size, what, FACTORIZE + FEWER_COLUMNS, device)


def _is_factorized(block: Block) -> bool:
    """Return whether the step of a block is asked for by a factorization, if it has one."""
    damping = block.damping
    undamped = isinstance(damping, Real) and damping <= 0
    return block.select is None and not (callable(damping) or undamped)


def _copies(count: int, d: int, device: torch.device, *, by_eigenpairs: bool) -> float:
    """Return how many matrices of a block's side its step holds at a time, at least.

    On the side of the columns a factorization takes K and a few tiles of it, on that of the
    parameters G and G in their order; off a CPU a copy of either, and its factor. Eigenpairs take
    K, the matrix that is decomposed, and the decomposition's three; or G and these, and the slopes
    of all columns twice.
    """
    if not by_eigenpairs:
        in_place = 1.125 if count <= d else 2
        return in_place if device.type == "cpu" else 3
    return 5 if count <= d else 4 + 2 * count / max(1, d)


def check_sums_fit(lengths: Sequence[int], device: torch.device) -> None:
    """Require sums over the batches of the matrices of blocks of parameters to fit into memory."""
    size = 3 * sum(d**2 for d in lengths) * torch.float64.itemsize
    sides = ", ".join(map(str, lengths))
    what = f"Gauss-Newton matrices of side {sides}, a copy and vectors of each"
    check_fits(size, what, 'Pass gram="free", or groups for smaller matrices.', device)


def block_matrices(
    jacobians: Sequence[Jacobian],
    count: int,
    blocks: Sequence[Leaves],
    weights: Float[Tensor, " i"],
    gradient_weights: Float[Tensor, " a"],
) -> list[GaussNewton]:
    """Return the matrix of every block, on the side of the columns where that is no longer.

    The first ``count`` Jacobians are those of the curvature.
    """
    curved, sizes = jacobians[:count], jacobians[0].sizes
    lengths = [sum(sizes[leaf] for leaf in block) for block in blocks]
    on_columns = [len(weights) <= d or d == 0 for d in lengths]
    # One visit of the model for all blocks of a side: AᵀA₁ of one, G and g of the other.
    sided_blocks = list(zip(blocks, on_columns, strict=True))
    column_blocks = [block for block, is_on_columns in sided_blocks if is_on_columns]
    parameter_blocks = [block for block, is_on_columns in sided_blocks if not is_on_columns]
    products = iter(side_by_side(jacobians, curved, column_blocks) if column_blocks else [])
    equations = iter(
        equations_of(jacobians, count, parameter_blocks, weights, gradient_weights)
        if parameter_blocks
        else []
    )
    sides = [
        (next(products), gradient_weights) if is_on_columns else next(equations)
        for is_on_columns in on_columns
    ]
    for matrix, _ in sides:
        # What is not finite in a column shows in its square: no need to look at every product.
        check_derivatives(matrix.diagonal())
        if len(matrix) > matrix.shape[1]:
            check_derivatives(matrix[matrix.shape[1] :])
    return [
        GaussNewton(
            on_columns=is_on_columns,
            columns=columns_of(jacobians, block),
            weights=weights,
            gradient_weights=gradient_weights,
            entries=matrix,
            gradient=gradient,
            of_ranks=jacobians[0].of_ranks,
        )
        for (block, is_on_columns), (matrix, gradient) in zip(sided_blocks, sides, strict=True)
    ]


def equations_of(
    jacobians: Sequence[Jacobian],
    count: int,
    blocks: Sequence[Leaves],
    weights: Float[Tensor, " i"],
    gradient_weights: Float[Tensor, " a"],
) -> list[NormalEquations]:
    """Return G and g of blocks on the side of the parameters, g with columns of its own."""
    i = len(weights)
    equations = normal_equations(jacobians[:count], blocks, weights, gradient_weights[:i])
    if len(jacobians) == count:
        return equations
    sums = matmat(jacobians[count:], blocks, [gradient_weights[None, i:] for _ in blocks])
    return [
        of_block._replace(gradient=of_block.gradient + block_sum[0])
        for of_block, block_sum in zip(equations, sums, strict=True)
    ]


def block_vectors(
    jacobians: Sequence[Jacobian],
    blocks: Sequence[Leaves],
    matrices: Sequence[GaussNewton],
    coordinates: Sequence[Float[Tensor, "... _"]],
) -> list[Float[Tensor, "... _"]]:
    """Return the parameters that coordinates stand for, of all blocks in one visit of the model."""
    vectors = list(coordinates)
    numbers = [b for b, matrix in enumerate(matrices) if matrix.on_columns]
    if numbers:
        weights = [coordinates[b].reshape(-1, coordinates[b].shape[-1]) for b in numbers]
        sums = matmat(jacobians, [blocks[b] for b in numbers], weights)
        for b, vector in zip(numbers, sums, strict=True):
            vectors[b] = vector.reshape((*coordinates[b].shape[:-1], vector.shape[-1]))
    return vectors
