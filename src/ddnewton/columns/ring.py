"""Products of the columns of several processes with each other, each pair of them made once.

Every rank multiplies its columns with its own, and then with those of others, which come by one
chunk after the other: at distance s every rank gets the columns of the rank s behind it, while its
own go to the one s before it. Of a symmetric matrix half of the distances are enough. Where two
ranks stand opposite, each of them makes half of their products: all of one by the first half of the
other, and all of that by the second half. So no rank holds more than its columns and a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

from torch import Tensor

from ddnewton.columns.alignment import Leaves
from ddnewton.columns.factors import Factor, Jacobian, of_samples
from ddnewton.columns.tiles import Tile, tiles_of
from ddnewton.distributed.team import Team
from ddnewton.distributed.wire import swap

FAILED = None
"""What is sent in place of factors that cannot be made."""


class Part(NamedTuple):
    """What is known everywhere of the columns that a rank has: of how many samples, and chunks."""

    samples: int
    columns: int  # of one sample
    chunks: Sequence[slice]


class Plan(NamedTuple):
    """What all ranks go by: of how many samples each has left columns, and its right ones.

    The right columns of all ranks have the same form; ``symmetric`` where they are the left ones.
    """

    left_samples: Sequence[int]
    right: Sequence[Part]
    symmetric: bool


class Turn(NamedTuple):
    """What a rank does at a distance: which of its samples go out, to whom, and what comes in."""

    to: int
    outgoing: slice
    source: int
    incoming: slice  # of the samples of the source
    left: slice | None  # of its own, which are multiplied with what comes in; None for all


class RankTile(NamedTuple):
    """A tile of the samples of two ranks, counted there."""

    left_rank: int
    right_rank: int
    tile: Tile


def ring(
    team: Team,
    left: Jacobian | None,
    right: Jacobian | None,
    blocks: Sequence[Leaves],
    plan: Plan,
) -> Iterator[RankTile]:
    """Yield the products that this rank makes, of its columns, None for none, with those of all.

    To a rank without left columns nothing is sent. What fails here is raised at the end, when all
    ranks have had their turns; what fails on another is raised there.
    """
    left_samples, parts, symmetric = plan
    failures: list[Exception] = []
    # Those of this rank with its own.
    if left is not None and right is not None:
        for tile in _until_failure(failures, tiles_of(left, right, blocks, symmetric=symmetric)):
            yield RankTile(team.rank, team.rank, tile)
    # Those of this rank with others', turn by turn, and chunk by chunk in each.
    for turn in _turns(team, [part.samples for part in parts], symmetric=symmetric):
        outgoing = _cuts(parts[team.rank].chunks, turn.outgoing) if left_samples[turn.to] else []
        incoming = _cuts(parts[turn.source].chunks, turn.incoming) if left is not None else []
        for sent, expected in zip_longest(outgoing, incoming):
            message = None if sent is None or right is None else _message(failures, right, sent)
            to = None if sent is None else turn.to
            source = None if expected is None else turn.source
            arrived = swap(team.wire, message, to, source, "columns")
            if left is None or expected is None or failures or arrived is FAILED:
                continue
            right_columns = _arrived(
                left if right is None else right, arrived, parts[turn.source], expected
            )
            left_columns = left if turn.left is None else narrowed(left, turn.left)
            tiles = tiles_of(left_columns, right_columns, blocks, symmetric=False)
            # So that they end before others come: products alone are left.
            del message, arrived, right_columns
            for tile in _until_failure(failures, tiles):
                right_samples = _moved(tile.right, expected.start)
                yield RankTile(team.rank, turn.source, tile._replace(right=right_samples))
    if failures:
        raise failures[0]


def narrowed(jacobian: Jacobian, samples: slice) -> Jacobian:
    """Return the columns of some samples that follow each other, which keep their numbers."""
    cuts = _cuts(jacobian.chunks, samples)
    return jacobian._replace(chunks=cuts, visit=partial(_visited, jacobian))


def _turns(team: Team, counts: Sequence[int], *, symmetric: bool) -> Iterator[Turn]:
    """Yield the turns of this rank, given the number of samples of every rank."""
    rank, size = team.rank, team.size
    every = [slice(0, count) for count in counts]
    for distance in range(1, (size + 1) // 2 if symmetric else size):
        to, source = (rank - distance) % size, (rank + distance) % size
        yield Turn(to, every[rank], source, every[source], None)
    if not symmetric or size % 2:
        return
    # Opposite ranks: the lower one takes the first half of the upper one's samples.
    opposite = (rank + size // 2) % size
    if rank < opposite:
        first = slice(0, counts[opposite] // 2)
        yield Turn(opposite, every[rank], opposite, first, None)
    else:
        half = counts[rank] // 2
        second = slice(half, counts[rank])
        yield Turn(opposite, slice(0, half), opposite, every[opposite], second)


def _until_failure(failures: list[Exception], tiles: Iterator[Tile]) -> Iterator[Tile]:
    """Yield tiles until one fails, which is put among the failures: the other ranks go on."""
    try:
        yield from tiles
    except Exception as error:  # noqa: BLE001 - it is raised when all have had their turns
        failures.append(error)


def _message(failures: list[Exception], jacobian: Jacobian, samples: slice) -> list[Factor] | None:
    """Return the factors of some samples for another rank; `FAILED` where something has here."""
    if not failures:
        try:
            return list(_visited(jacobian, samples))
        except Exception as error:  # noqa: BLE001 - as above
            failures.append(error)
    return FAILED


def _arrived(like: Jacobian, factors: Sequence[Factor], part: Part, chunk: slice) -> Jacobian:
    """Return the columns of a chunk of another rank."""
    n = chunk.stop - chunk.start
    return like._replace(
        visit=lambda _: factors, chunks=[slice(0, n)], samples=n, columns=part.columns
    )


def _cuts(chunks: Sequence[slice], samples: slice) -> list[slice]:
    """Return the parts of chunks that are among some samples."""
    cuts = [slice(max(c.start, samples.start), min(c.stop, samples.stop)) for c in chunks]
    return [cut for cut in cuts if cut.start < cut.stop]


def _visited(jacobian: Jacobian, samples: slice) -> Sequence[Factor]:
    """Return the factors of samples that are a part of a chunk."""
    (chunk,) = [c for c in jacobian.chunks if c.start <= samples.start and samples.stop <= c.stop]
    factors = jacobian.visit(chunk)
    if (samples.start, samples.stop) == (chunk.start, chunk.stop):
        return factors
    inside = slice(samples.start - chunk.start, samples.stop - chunk.start)
    return [of_samples(factor, inside, jacobian.columns) for factor in factors]


def _moved(samples: slice | Tensor, start: int) -> slice | Tensor:
    """Return samples that are counted from a number on."""
    if isinstance(samples, slice):
        return slice(samples.start + start, samples.stop + start)
    return samples + start
