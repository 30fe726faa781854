"""The log of a run: a file with a line for every step, each a JSON object.

    {"loss": 0.71, "damping": 0.1, "ratio": null, "accepted": true, "epoch": 3}

Numbers are exact. JSON has no nan, which is written as ``null``, and no infinity, such as the
damping of a skipped direction, which is written as ``"inf"``; `read` turns both back into numbers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from os import SEEK_END
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ddnewton.diagnostics.direction_summary import Info, Summary, summary
from ddnewton.diagnostics.json_records import as_plain, from_json, to_json
from ddnewton.errors import BadType, BadValue, public, sentence
from ddnewton.quadratic.info import NewtonInfo

logger = logging.getLogger(__name__)

SMALLEST_SQUARE = 1e-300
"""In place of the square of a gradient that is zero."""


@public
def append(
    path: str | Path,
    info: tuple[Any, ...] | Sequence[Info],
    directions: Info | Sequence[Info] | None = None,
    **more: float | Tensor,
) -> None:
    """Append a line for a step to the log of a run.

    Parameters
    ----------
    path
        A file whose name ends in ``.jsonl``, or a folder for the file ``run.jsonl``; made if
        missing. A last line that was cut off by a crash is removed.
    info
        The info of an optimizer's ``update``, or any NamedTuple of scalars. Or the info of
        `newton_step_and_info`, of which the loss, the predicted decrease (of the full step),
        gradient norm, gradient share, rank and flat share are written: those of all groups
        together, and the smallest gradient share of a group. Losses of several terms are an object
        of numbers by name, ``"losses"``.
    directions
        The info of `newton_step_and_info`, to write the `summary` of every direction as well.
    more
        Further numbers by name, such as ``epoch=3, test_loss=0.2``.

    Raises
    ------
    TypeError
        If a value is not a number, or an info not a record.
    ValueError
        If a value is several numbers, or a further number has the name of another.

    Examples
    --------
    >>> import tempfile, torch
    >>> from typing import NamedTuple
    >>> class Told(NamedTuple):
    ...     loss: torch.Tensor
    ...     accepted: torch.Tensor
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     append(folder, Told(torch.tensor(0.5), torch.tensor(True)), epoch=1)
    ...     append(folder, Told(torch.tensor(0.25), torch.tensor(False)), epoch=2)
    ...     read(folder)[1]
    {'loss': 0.25, 'accepted': False, 'epoch': 2}
    """
    # One number a name: those of the step, and the further ones.
    line = _scalars(info)
    if taken := more.keys() & {*line, "directions"}:
        rule, remedy = "a further number must have a name of its own", "Choose another name."
        raise BadValue(sentence(rule, ", ".join(sorted(taken)), remedy))
    line |= {name: to_json(name, value) for name, value in more.items()}
    for name, value in line.items():
        if isinstance(value, list):
            rule, remedy = f"{name} must be one number", "Write a line for each member or entry."
            raise BadValue(sentence(rule, f"{len(value)} of them", remedy))
    # The directions of every block.
    if directions is not None:
        blocks = _blocks(directions)
        if not blocks:
            rule = "directions must be what newton_step_and_info returned, or None"
            raise BadType(sentence(rule, type(directions).__name__, "Pass its second value."))
        line["directions"] = [as_plain(summary(block)) for block in blocks]
    # A whole line at the end of the file, below whole lines.
    text = json.dumps(line, allow_nan=False)
    file = run_file(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as stream:
        _mend_last_line(stream, file)
        stream.write(f"{text}\n".encode())


@public
def read(path: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a run, from the path that `append` was given.

    A last line that was cut off by a crash is left out, with a warning of ``logging``.

    Raises
    ------
    ValueError
        If there is no such file, or one of its lines is not a JSON object.
    """
    # Every whole line ends in a newline; after the last one there is nothing, or a line cut off.
    file = run_file(path)
    try:
        *whole_lines, unfinished = file.read_bytes().split(b"\n")
    except OSError as error:
        rule, got = "path must name a run, a .jsonl file or its folder", f"{file}: {error.strerror}"
        raise BadValue(sentence(rule, got, "Pass what append was given.")) from error
    # Whole lines must be objects.
    lines = []
    for number, text in enumerate(whole_lines, 1):
        try:
            lines.append(_parsed(text))
        except ValueError as error:
            rule, got = f"line {number} of {file} must be a JSON object", f"{text[:40]!r} ({error})"
            raise BadValue(sentence(rule, got, "Mend it, or take it out.")) from error
    # The last one may be one too, without its newline.
    if unfinished:
        try:
            lines.append(_parsed(unfinished))
        except ValueError:
            logger.warning("%s: line %d was cut off, and is left out", file, len(whole_lines) + 1)
    return lines


def run_file(path: str | Path) -> Path:
    """Return the file of a run: the path itself if it ends in ``.jsonl``, else one inside it.

    Examples
    --------
    >>> run_file("tanh-0.1").as_posix(), run_file("tanh-0.1.jsonl").as_posix()
    ('tanh-0.1/run.jsonl', 'tanh-0.1.jsonl')
    """
    path = Path(path)
    return path if path.suffix == ".jsonl" else path / "run.jsonl"


def _scalars(info: object) -> dict[str, Any]:
    """Return the scalars of a step; of a step in blocks, those of all blocks together."""
    blocks = _blocks(info)
    losses = getattr(blocks[0] if blocks else info, "losses", None)
    of_terms = {"losses": to_json("losses", losses)} if isinstance(losses, dict) else {}
    if not blocks:
        line = as_plain(info)
        line.pop("losses", None)  # of one term, which is the loss
        return line | of_terms
    norms = torch.stack([block.gradient_norm.double() for block in blocks])
    decreases = torch.stack([block.predicted_decrease.double().sum(-1) for block in blocks])
    flat = [
        block.flat_share.double() * norm.square() for block, norm in zip(blocks, norms, strict=True)
    ]
    # A rank of −1 is not known, nor is then that of all.
    ranks = torch.stack([block.rank for block in blocks])
    totals = {
        "loss": blocks[0].loss,
        "predicted_decrease": decreases.sum(0),
        "gradient_norm": norms.square().sum(0).sqrt(),
        "gradient_share": torch.stack([block.gradient_share for block in blocks]).amin(0),
        "rank": torch.where((ranks < 0).any(0), -1, ranks.sum(0)),
        "flat_share": torch.stack(flat).sum(0) / norms.square().sum(0).clamp(min=SMALLEST_SQUARE),
    }
    return {name: to_json(name, value) for name, value in totals.items()} | of_terms


def _blocks(info: object) -> list[Info]:
    """Return the records of the blocks of a step; [] if this is not from a Newton step."""
    if isinstance(info, NewtonInfo | Summary):
        return [info]
    if isinstance(info, list | tuple) and all(isinstance(x, NewtonInfo | Summary) for x in info):
        return list(info)
    return []


def _parsed(text: bytes) -> dict[str, Any]:
    """Return a line as a dict; a ValueError if it is not a JSON object."""
    line = from_json(json.loads(text))
    if not isinstance(line, dict):
        raise ValueError("no object")  # noqa: TRY004 - like all that is wrong with a line
    return line


def _mend_last_line(stream: BinaryIO, name: Path) -> None:
    """Give the last line of a file the newline that it lacks, or remove it if it was cut off."""
    # Nothing to do where the file is empty or ends in a newline.
    end = stream.seek(0, SEEK_END)
    stream.seek(max(0, end - 1))
    if stream.read() in {b"", b"\n"}:
        return
    # A line that lacks but the newline is whole.
    stream.seek(0)
    unfinished = stream.read().rpartition(b"\n")[2]
    try:
        _parsed(unfinished)
    except ValueError:
        logger.warning("%s: its last line was cut off, and is taken out", name)
        stream.truncate(end - len(unfinished))
    else:
        stream.write(b"\n")
