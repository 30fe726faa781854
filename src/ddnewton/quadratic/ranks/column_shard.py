"""The columns of one rank's samples, and what is made of them at the leader's orders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.columns.alignment import Leaves
from ddnewton.columns.factors import Jacobian
from ddnewton.columns.gram import slopes_of, sums_of
from ddnewton.columns.normal_equations import equations_of_one, scaled_rows, weighted_rows
from ddnewton.columns.ring import Plan, RankTile, ring
from ddnewton.columns.units import densely
from ddnewton.distributed.shared_factor import Panels, WritePanel, factorized_together
from ddnewton.quadratic.ranks.shard import Shard
from ddnewton.trees import as_real, tree_leaves


class ColumnShard(Shard):
    """The samples of this rank, and products with the columns that have been made of them."""

    def sums(
        self, number: int, blocks: Sequence[Leaves], weights: Sequence[Float[Tensor, "k m n"]]
    ) -> list[Float[Tensor, "k d"]]:
        """Return the sums of columns with weights, for every block."""
        jacobian, rows = self._columns[number]

        def make() -> list[Tensor]:
            if jacobian is None:
                return []
            of_rank = [of_block[:, :, rows].flatten(1) for of_block in weights]
            return sums_of([jacobian], blocks, [of_rank])

        lengths = [sum(self._sizes[leaf] for leaf in block) for block in blocks]
        shapes = [(len(w), d) for w, d in zip(weights, lengths, strict=True)]
        return self._team.summed(make, shapes, "sums")

    def slopes(
        self, number: int, block: Leaves, vectors: Float[Tensor, "k d"]
    ) -> list[Float[Tensor, "i k"] | None]:
        """Return the slopes of columns along vectors of a block."""
        jacobian, _ = self._columns[number]
        return self._collected(jacobian, lambda x: slopes_of(x, block, vectors), "slopes")

    def equations(
        self, number: int, blocks: Sequence[Leaves], root_and_z: Float[Tensor, "2 m n"]
    ) -> list[Tensor]:
        """Return G and g of every block, one after the other."""
        jacobian, rows = self._columns[number]

        def make() -> list[Tensor]:
            if jacobian is None:
                return []
            of_rank = root_and_z[:, :, rows].flatten(1)
            return [part for block in equations_of_one(jacobian, blocks, of_rank) for part in block]

        lengths = [sum(self._sizes[leaf] for leaf in block) for block in blocks]
        shapes = [shape for d in lengths for shape in ((d, d), (d,))]
        return self._team.summed(make, shapes, "matrices")

    def rows(
        self, number: int, block: Leaves, weights: Float[Tensor, "m n"]
    ) -> list[Float[Tensor, "i d"] | None]:
        """Return the rows √w_i a_i of a block."""
        jacobian, rows = self._columns[number]

        def make(jacobian: Jacobian) -> Tensor:
            return scaled_rows([jacobian], block, weights[:, rows].flatten())

        return self._collected(jacobian, make, "rows")

    def triangles(
        self, number: int, block: Leaves, root: Float[Tensor, "m n"]
    ) -> list[Float[Tensor, "r d"] | None]:
        """Return no more rows than a block has parameters, with the products of its own rows."""
        jacobian, rows = self._columns[number]

        def make(jacobian: Jacobian) -> Tensor:
            factor = root.new_zeros(0, sum(self._sizes[leaf] for leaf in block))
            for piece in weighted_rows([jacobian], block, root[:, rows].flatten().square()):
                factor = torch.linalg.qr(torch.cat([factor, piece]), mode="r").R
            return factor

        return self._collected(jacobian, make, "rows")

    def tiles(
        self,
        numbers: tuple[int, int],
        blocks: Sequence[Leaves],
        plan: Plan,
        scale: Float[Tensor, " d"] | None,
        dense: bool,
    ) -> Iterator[RankTile]:
        """Return the tiles that this rank makes on the leader, and pass them to it elsewhere."""
        left, right = (self._columns[number].jacobian for number in numbers)

        def make() -> list[RankTile]:
            scaled = [None if x is None else x._replace(scale=scale) for x in (left, right)]
            a, b = (None if x is None else densely(x) if dense else x for x in scaled)
            return list(ring(self._team, a, b, blocks, plan))

        return self._team.streamed(make, "tiles")

    def factorized(
        self, side: int, panels: Sequence[Panels] = (), write: WritePanel | None = None
    ) -> None:
        """Factorize a matrix whose panels the leader has, and is to write, all ranks together."""
        of_rank = self._team.scattered(panels, "panels")
        factorized_together(self._team.wire, side, of_rank, write)

    @property
    def _sizes(self) -> list[int]:
        """The number of entries of every parameter, as reals."""
        return [leaf.numel() for leaf in tree_leaves(as_real(self._arguments.params))]
