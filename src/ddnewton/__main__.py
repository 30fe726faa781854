"""Reproduce the reference example, fit and train two networks, and save a figure."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo or a command; return 0, or 1 if the reference example does not match."""
    # The demo is what runs without a command.
    parser = argparse.ArgumentParser(
        prog="python -m ddnewton",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seconds", type=positive, default=8, help="seconds of each fit")
    parser.add_argument("--epochs", type=positive, default=10, help="epochs of each training")
    parser.add_argument("--seed", type=int, default=0, help="of data, starts and mini-batches")
    parser.add_argument("--out", type=Path, default="ddnewton-demo", help="folder for the figure")
    # The command: plot.
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="instead of the demo", metavar="")
    text = "draw the log of a run"
    plot = commands.add_parser("plot", help=text, description=f"{text.capitalize()}.")
    plot.add_argument("run", type=Path, help="a .jsonl file, or the folder of run.jsonl")
    kinds = "history.png in the folder, or the file's name with .png"
    plot.add_argument("--out", type=Path, dest="figure", help=f"the figure (default: {kinds})")
    # Only the command sets a run.
    options = parser.parse_args(arguments)
    if options.run is not None:
        return draw(options.run, options.figure)
    return demo(options)


def demo(options: argparse.Namespace) -> int:
    """Run the examples, and save the figure in a folder."""
    try:  # here, because other commands do not need the packages of the demo
        from ddnewton.demo import (  # noqa: PLC0415
            digits_example,
            draw_demo,
            poisson_example,
            reference_example,
        )
    except ImportError as missing:
        sys.exit(str(missing))
    if not reference_example():
        return 1
    poisson = poisson_example(options.seconds, options.seed)
    digits = digits_example(options.epochs, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "demo.png"
    draw_demo(poisson, digits, path)
    print(f"Figure: {path}")
    return 0


def draw(run: Path, figure: Path | None) -> int:
    """Save a figure of a run, beside its file or in its folder if no other place is given."""
    try:
        from ddnewton import plotting  # noqa: PLC0415 - as above
        from ddnewton.diagnostics import read  # noqa: PLC0415
    except ImportError as missing:
        sys.exit(str(missing))
    if figure is None:
        figure = run.with_suffix(".png") if run.suffix == ".jsonl" else run / "history.png"
    try:
        lines = read(run)
        plotting.overview(lines, figure)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    print(f"Figure of {len(lines)} steps: {figure}")
    return 0


def positive(text: str) -> int:
    """Return an argument of the command line as an integer of at least 1."""
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {count}")
    return count


if __name__ == "__main__":
    # On a busy machine a second thread can make a small eigendecomposition take seconds.
    torch.set_num_threads(1)
    sys.exit(main())
