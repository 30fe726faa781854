"""The progress of a fit on the screen: a bar of tqdm where that is installed, else lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TypeAlias

SECONDS_BETWEEN_LINES = 1.0
"""How long after a line the next one is written, at the least."""

Tell: TypeAlias = Callable[[int, float, float], None]
"""``tell(updates, loss, damping)``, after every update."""


@contextmanager
def progress_of(shown: bool, total: int | None) -> Iterator[Tell]:
    """Show the progress of a fit of at most ``total`` updates, or do nothing."""
    if not shown:
        yield lambda updates, loss, damping: None
    elif find_spec("tqdm") is None:
        yield _lines()
    else:
        from tqdm import tqdm  # noqa: PLC0415 - importing ddnewton must stay light

        with tqdm(total=total, desc="fit", unit="update") as bar:

            def tell(updates: int, loss: float, damping: float) -> None:
                bar.set_postfix(loss=f"{loss:.3g}", damping=f"{damping:.1g}", refresh=False)
                bar.update(updates - bar.n)

            yield tell


def _lines() -> Tell:
    """Return a function that writes a line where the one before is old enough."""
    last = -float("inf")

    def tell(updates: int, loss: float, damping: float) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            sys.stderr.write(f"fit: update {updates}, loss {loss:.3g}, damping {damping:.1g}\n")

    return tell
