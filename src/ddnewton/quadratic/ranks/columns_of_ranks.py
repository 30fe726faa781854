"""The columns of several processes on their leader: what is asked of all of them together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from ddnewton.columns.alignment import Leaves
from ddnewton.columns.factors import Jacobian
from ddnewton.columns.normal_equations import NormalEquations
from ddnewton.columns.ring import Part, Plan
from ddnewton.columns.tiles import Tile
from ddnewton.distributed.service import Leader
from ddnewton.distributed.shared_factor import PANEL, Panels, panel_starts
from ddnewton.quadratic.ranks.messages import Form, Rows


class RankColumns(NamedTuple):
    """Columns of samples that are on several ranks, under one number on all of them.

    ``rows`` are where the samples of every rank are among all of them.
    """

    leader: Leader
    number: int
    samples: int
    columns: int  # of one sample
    forms: Sequence[Form | None]
    rows_on_ranks: Sequence[Rows]

    def sums(
        self, blocks: Sequence[Leaves], weights: Sequence[Float[Tensor, "_ i"]], /
    ) -> list[Float[Tensor, "_ _"]]:
        """Return W Aᵀ for every block."""
        by_sample = [of_block.unflatten(1, self._shape) for of_block in weights]
        sums: list[Tensor] = self.leader.order("sums", self.number, blocks, by_sample)
        return sums

    def slopes(self, block: Leaves, vectors: Float[Tensor, "k d"], /) -> Float[Tensor, "i k"]:
        """Return AᵀE for vectors of a block."""
        return self._assembled(self.leader.order("slopes", self.number, block, vectors))

    def tiles(
        self, other: Jacobian, blocks: Sequence[Leaves], /, *, symmetric: bool
    ) -> Iterator[Tile]:
        """Yield the tiles of the inner products with other columns."""
        right = other.of_ranks
        assert isinstance(right, RankColumns)
        none = Part(0, right.columns, [])
        parts = [none if form is None else form.part for form in right.forms]
        counts = [0 if form is None else form.part.samples for form in self.forms]
        numbers, dense = (self.number, right.number), not _have_one_form(self, right)
        plan = Plan(counts, parts, symmetric)
        tiles = self.leader.order("tiles", numbers, blocks, plan, other.scale, dense)
        for left_rank, right_rank, tile in tiles:
            yield tile._replace(
                left=_among(self.rows_on_ranks[left_rank], tile.left),
                right=_among(right.rows_on_ranks[right_rank], tile.right),
            )

    def equations(
        self, blocks: Sequence[Leaves], root_and_z: Float[Tensor, "2 i"], /
    ) -> list[NormalEquations]:
        """Return A diag(w) Aᵀ and A z for every block."""
        by_sample = root_and_z.unflatten(1, self._shape)
        sums = iter(self.leader.order("equations", self.number, blocks, by_sample))
        return [NormalEquations(next(sums), next(sums)) for _ in blocks]

    def rows(self, block: Leaves, weights: Float[Tensor, " i"], /) -> Float[Tensor, "i d"]:
        """Return the rows √w_i a_i of a block."""
        by_sample = weights.unflatten(0, self._shape)
        return self._assembled(self.leader.order("rows", self.number, block, by_sample))

    def factorized(
        self, matrix: Float[Tensor, "side side2"], shifts: Float[Tensor, " side"], /
    ) -> Bool[Tensor, ""]:
        """Factorize a symmetric matrix with shifts of its diagonal, over its lower triangle.

        Returned is whether it has no factor.
        """
        # Its panels with the shifts, for the ranks in turn.
        size = self.leader.team.size
        panels: list[Panels] = [{} for _ in range(size)]
        for number, start in enumerate(panel_starts(len(matrix))):
            panel = matrix[start:, start : start + PANEL].clone()
            panel.diagonal().add_(shifts[start : start + PANEL])
            panels[number % size][number] = panel

        def write(number: int, panel: Float[Tensor, "n b"]) -> None:
            start, width = PANEL * number, panel.shape[1]
            end = start + width
            corner = matrix[start:end, start:end]
            corner.copy_(panel[:width].tril() + corner.triu(1))
            matrix[end:, start:end] = panel[width:]

        self.leader.order("factorized", len(matrix), panels=panels, write=write)
        return matrix.diagonal().isnan().any()

    def triangles(
        self, block: Leaves, root: Float[Tensor, " i"], /
    ) -> Iterator[Float[Tensor, "_ d"]]:
        """Yield no more rows of every process than it has parameters, with the same products."""
        by_sample = root.unflatten(0, self._shape)
        factors = self.leader.order("triangles", self.number, block, by_sample)
        yield from (factor for factor in factors if factor is not None)

    @property
    def _shape(self) -> tuple[int, int]:
        """The shape of what there is of every column: columns of a sample, samples."""
        return self.columns, self.samples

    def _assembled(self, parts: Sequence[Float[Tensor, "_ k"] | None]) -> Float[Tensor, "i k"]:
        """Return the parts of the ranks, a row a column, in the order of all columns."""
        first = next(part for part in parts if part is not None)
        whole = first.new_empty(*self._shape, first.shape[1])
        for rows, part in zip(self.rows_on_ranks, parts, strict=True):
            if part is not None:
                whole[:, rows] = part.unflatten(0, (self.columns, -1))
        return whole.flatten(0, 1)


def _have_one_form(left: RankColumns, right: RankColumns) -> bool:
    """Return whether every rank's columns have the same form, and where they are is known."""
    if left is not right:
        pairs = zip(left.forms, right.forms, strict=True)
        if any(x is not None and y is None for x, y in pairs):
            return False
    # The same factors, on the same digits.
    sides = [[form for form in side.forms if form is not None] for side in (left, right)]
    return all(len({form[1:] for form in side}) == 1 for side in sides)


def _among(rows: Rows, samples: slice | Tensor) -> Rows:
    """Return where samples of a rank are among all samples."""
    if isinstance(rows, slice) and isinstance(samples, slice):
        return slice(rows.start + samples.start, rows.start + samples.stop)
    places: Tensor = rows.start + samples if isinstance(rows, slice) else rows[samples]
    return places
