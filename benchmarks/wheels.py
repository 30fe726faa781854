"""Gather the wheels that a GPU machine without a package index lacks: all but torch, one folder.

Run with ``python -m benchmarks.wheels``, by a Python that has pip, where there is an index. Then
carry the folder over, with the repository, and name it to ``python -m benchmarks.gpu --wheels``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from zipfile import ZipFile

FOLDER = Path(__file__).with_name("wheelhouse")
MEBIBYTES = 60
"""More than this is refused: what carries the folder over may have a limit."""

LIBRARY = ("beartype", "jaxtyping", "numpy", "opt_einsum", "wadler-lindig")
TESTS = (
    "attrs",
    "hypothesis",
    "iniconfig",
    "packaging",
    "pluggy",
    "pygments",
    "pytest",
    "sortedcontainers",
)
PEERS = (
    "backpack-for-pytorch==1.7.1",
    "curvlinops-for-pytorch",
    "einconv",
    "einops",
    "linear_operator",
    "mpmath",
    "nngeometry",
    "scipy",
    "tqdm",
    "unfoldNd",
    "vivit-for-pytorch==1.0.0",
)

# Pip takes a platform by its exact name: an older one that serves as well has to be named too.
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "manylinux_2_12_x86_64",
    "manylinux_2_5_x86_64",
    "manylinux1_x86_64",
)


def gather(folder: Path, python: str) -> None:
    """Download the wheels of all packages for a version of Python on Linux."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), "--python-version", python]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, *LIBRARY, *TESTS, *PEERS], check=True)


def missing(folder: Path) -> Iterator[Path]:
    """Yield the wheels whose packages this Python does not have."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise SystemExit(f"--wheels must name a folder of wheels; got {folder}, which has none.")
    for wheel in wheels:
        try:
            distribution(wheel.name.split("-")[0])
        except PackageNotFoundError:
            yield wheel


def unpack(folder: Path, target: Path) -> list[str]:
    """Unpack the missing wheels, without pip or an index, and return their file names.

    A wheel is an archive of what is imported; none of these has a script that is needed.
    """
    wheels = list(missing(folder))
    for wheel in wheels:
        with ZipFile(wheel) as archive:
            archive.extractall(target)
    return [wheel.name for wheel in wheels]


def main() -> None:
    """Download the wheels and say how large they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--python", default="3.12", help="the version on the other machine")
    options = parser.parse_args()
    # Download, then list what came, the largest last.
    gather(options.output, options.python)
    sizes = {wheel.name: wheel.stat().st_size for wheel in options.output.glob("*.whl")}
    for name, size in sorted(sizes.items(), key=lambda pair: pair[1]):
        print(f"{size / 2**20:6.1f} MiB  {name}")
    total = sum(sizes.values()) / 2**20
    print(f"{total:6.1f} MiB in {options.output}")
    if total > MEBIBYTES:
        raise SystemExit(f"The wheels must be below {MEBIBYTES} MiB; got {total:.0f}.")


if __name__ == "__main__":
    main()
