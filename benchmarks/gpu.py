"""All that needs a GPU, in one command and six minutes: the tests marked ``cuda``, then the peers.

Run with ``python -m benchmarks.gpu`` from the repository's root. It needs Linux, Python and torch.
On a machine without a package index, carry over the repository and the folder that
``python -m benchmarks.wheels`` fills elsewhere (for Python 3.12; ``--python`` names another):

    python -m benchmarks.gpu --wheels benchmarks/wheelhouse --output results

The wheels that the machine lacks are unpacked in a temporary folder; nothing is installed. A peer
that is not there, fails, or comes after the time was up is an entry that says so. Everything is in
``gpu.json`` and as a table in ``gpu.md``, which are written again after every peer.
``--device cpu --quick`` shows without a GPU that it works.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from benchmarks.gpu_plan import PEERS, TIME_WAS_UP, planned, recorded
from benchmarks.gpu_tables import machine, write
from benchmarks.gpu_tests import marked_files, run_tests
from benchmarks.processes import ROOT, say
from benchmarks.step_tables import Record, cell
from benchmarks.wheels import unpack

TEST_SHARE = 0.4
"""Of the time, what the tests may take."""
STARTING = 10.0
"""Seconds below which no process is started: an import of torch takes as long."""


class Setting(NamedTuple):
    """What all processes share."""

    folder: Path
    device: str
    quick: bool
    deadline: float
    environment: dict[str, str]


def environment(target: Path) -> dict[str, str]:
    """Return the variables of a process that imports this repository and the unpacked wheels."""
    paths = [ROOT / "src", ROOT, target]
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    joined = os.pathsep.join([*map(str, paths), *filter(None, inherited)])
    return os.environ | {"PYTHONPATH": joined}


def is_installed(package: str | None, setting: Setting) -> bool:
    """Return whether a peer's package can be imported by the processes."""
    if package is None:
        return True
    paths = [*setting.environment["PYTHONPATH"].split(os.pathsep), *sys.path]
    return importlib.machinery.PathFinder.find_spec(package, paths) is not None


def measured(setting: Setting, peer: str) -> list[Record]:
    """Run one peer in a process of its own; return a record for everything that was planned."""
    limit = setting.deadline - time.monotonic()
    if not is_installed(PEERS[peer], setting):
        status = "not installed"
    elif limit < STARTING:
        status = TIME_WAS_UP
    else:
        status = ended(setting, peer, limit)
    # What the process has left, then what it has not come to.
    file = setting.folder / f"{peer}.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    records = [json.loads(line) for line in lines]
    entries = planned(peer, setting.device, quick=setting.quick)
    return records + [recorded(e, peer, {"status": status}) for e in entries[len(records) :]]


def ended(setting: Setting, peer: str, limit: float) -> str:
    """Run a peer's process and return in words how it ended."""
    command = [sys.executable, "-m", "benchmarks.gpu_peer", str(setting.folder), peer]
    command += ["--device", setting.device, "--deadline", str(setting.deadline)]
    command += ["--quick"] if setting.quick else []
    try:
        process = subprocess.run(
            command,
            cwd=ROOT,
            env=setting.environment,
            timeout=None if math.isinf(limit) else limit,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return TIME_WAS_UP
    last = (process.stderr.strip().splitlines() or [f"ended with {process.returncode}"])[-1]
    return f"failed: {last[:100]}".replace("|", "/")


def arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="tiny problems, and no time limit")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to unpack and use")
    parser.add_argument("--peer", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--tests", nargs="*", help="some tests only; none at all: no tests")
    parser.add_argument("--minutes", type=float, help="of everything; 6, or without end if quick")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results") / "gpu")
    # What depends on the machine and on other options.
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "--device must be one that torch has; got cuda, and torch.cuda.is_available() is "
            "False. Pass --device cpu --quick to see the command work."
        )
    if options.minutes is None:
        options.minutes = math.inf if options.quick else 6.0
    return options


def main() -> None:
    """Run the tests and then the peers, and write what there is after each."""
    options = arguments()
    seconds = 60 * options.minutes
    with TemporaryDirectory() as name:
        # Everything is imported from the repository and from the unpacked wheels.
        folder = Path(name)
        target = folder / "packages"
        unpacked = [] if options.wheels is None else unpack(options.wheels, target)
        setting = Setting(
            folder=folder,
            device=options.device,
            quick=options.quick,
            deadline=time.monotonic() + seconds,
            environment=environment(target),
        )
        about = machine(options.device) | {"unpacked": unpacked}
        say("\n".join(f"{key}: {value}" for key, value in about.items()))
        # The tests first: a number is worth nothing where the steps are wrong.
        files = marked_files() if options.tests is None else options.tests
        tests = run_tests(files, options.device, TEST_SHARE * seconds, folder, setting.environment)
        say(f"tests: {tests['words']}")
        records: list[Record] = []
        write(options.output, about, tests, records)
        for peer in options.peer:
            measurements = measured(setting, peer)
            for record in measurements:
                words = f"{record['problem']:10} N = {record['samples']:<4} {peer:20}"
                say(f"{words} {record['precision']:17} {record['quantity']:6} {cell(record)}")
            records += measurements
            write(options.output, about, tests, records)
    say(f"written: {options.output / 'gpu.md'}, {options.output / 'gpu.json'}")


if __name__ == "__main__":
    main()
