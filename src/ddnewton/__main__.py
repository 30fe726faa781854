"""Reproduce the reference example, train a network on digits, and save a figure."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

try:
    from ddnewton.demo import digits_example, reference_example
except ImportError as missing:
    sys.exit(str(missing))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return 0, or 1 if the reference example does not match."""
    parser = argparse.ArgumentParser(
        prog="python -m ddnewton",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=positive, default=10, help="epochs of each training")
    parser.add_argument("--seed", type=int, default=0, help="of data, start and mini-batches")
    parser.add_argument("--out", type=Path, default="ddnewton-demo", help="folder for the figure")
    chosen = parser.parse_args(arguments)
    if not reference_example():
        return 1
    chosen.out.mkdir(parents=True, exist_ok=True)
    digits_example(chosen.epochs, chosen.seed, chosen.out / "demo.png")
    return 0


def positive(text: str) -> int:
    """Return a count of at least 1 from the command line."""
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {count}")
    return count


if __name__ == "__main__":
    # On a busy machine a second thread can make a small eigendecomposition take seconds.
    torch.set_num_threads(1)
    sys.exit(main())
