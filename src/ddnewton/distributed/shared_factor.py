"""Cholesky's factorization of one matrix by all ranks, panel by panel.

A panel is some columns of the lower triangle, from the diagonal down. Every rank has each of so
many panels as there are ranks, in turn. The rank that has the next one factorizes it and tells it
to all; every rank takes from its later panels what that one explains of them. So all work as long
as there are panels, and what a rank holds of the matrix is its share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from ddnewton.distributed.wire import Wire

PANEL = 192
"""How many columns a panel has at most."""

Panels: TypeAlias = dict[int, Float[Tensor, "_ _"]]
"""Panels of a matrix by their numbers."""

WritePanel: TypeAlias = Callable[[int, Float[Tensor, "_ _"]], None]
"""What is done with a panel of the factor, by its number."""


def panel_starts(side: int) -> range:
    """Return where the panels of a matrix start."""
    return range(0, side, PANEL)


def factorized_together(wire: Wire, side: int, panels: Panels, write: WritePanel | None) -> None:
    """Factorize a matrix of which this rank has some ``panels``, which are written over.

    All panels of the factor are passed to ``write``. Where there is no factor they hold nan.
    """
    rank, size = dist.get_rank(wire.group), dist.get_world_size(wire.group)
    panels = {number: panel.to(wire.home) for number, panel in panels.items()}
    for number, start in enumerate(panel_starts(side)):
        # The next panel of the factor, of the rank that has it.
        owner, width = number % size, min(PANEL, side - start)
        if owner == rank:
            panel = _factorized(panels.pop(number)).to(wire.device)
            wire.traffic["panels"] += panel.nbytes
        else:
            panel = torch.empty(side - start, width, dtype=torch.float64, device=wire.device)
        dist.broadcast(panel, group_src=owner, group=wire.group)
        panel = panel.to(wire.home)
        if write is not None:
            write(number, panel)
        # What it explains of this rank's later panels.
        for later, columns in panels.items():
            below = panel[PANEL * (later - number) :]
            columns.addmm_(below, below[: columns.shape[1]].mT, alpha=-1)


def _factorized(panel: Float[Tensor, "n b"]) -> Float[Tensor, "n b"]:
    """Return a panel of the factor, in the memory of what is left of the matrix there."""
    width = panel.shape[1]
    corner, failed = torch.linalg.cholesky_ex(panel[:width])
    corner = torch.where(failed > 0, torch.nan, corner)
    panel[:width] = corner
    panel[width:] = torch.linalg.solve_triangular(corner.mT, panel[width:], upper=True, left=False)
    return panel
