"""All that needs a GPU, in one command and six minutes: tests, steps, and where a step waits.

Run with ``python -m benchmarks.gpu`` from the repository's root. It needs Linux, Python and torch.
On a machine without a package index, carry over the repository and the folder that
``python -m benchmarks.wheels`` fills elsewhere (for Python 3.12; ``--python`` names another):

    python -m benchmarks.gpu --wheels benchmarks/wheelhouse --output results

The wheels that the machine lacks are unpacked in a temporary folder; nothing is installed. The
sections are the tests marked ``cuda``; steps beside peers and a floor; where a step waits for the
device; how right it is; Monte-Carlo steps in gradient steps; the largest batches; and Poisson's
equation in five dimensions. ``--only`` names some of them, which then have all the time: five
minutes of training are ``--only poisson --poisson 300``. What is not there, fails, or comes after
the time was up is an entry that says so. Everything is in ``gpu.json`` and as tables in ``gpu.md``,
which are written again after every process. ``--device cpu --quick`` shows without a GPU that it
works.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.gpu_plan import PEERS, SECTIONS, Task
from benchmarks.gpu_runs import Setting, environment, measured
from benchmarks.gpu_tables import machine, write
from benchmarks.gpu_tests import marked_files
from benchmarks.processes import say
from benchmarks.step_tables import Record
from benchmarks.wheels import unpack

WRITING = 5.0
"""Seconds that are kept to end in time."""


def arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="tiny problems, and no time limit")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to unpack and use")
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--peer", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--tests", nargs="+", help="some tests only")
    parser.add_argument("--poisson", type=float, metavar="SECONDS", help="or all that are left")
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


def tasks_of(options: argparse.Namespace) -> list[Task]:
    """Return what processes there are, in their order."""
    return [
        Task(section, peer)
        for section in SECTIONS
        if section in options.only
        for peer in (options.peer if section == "steps" else [None])
    ]


def main() -> None:
    """Run one section after another, and write what there is after each process."""
    options = arguments()
    deadline = time.monotonic() + max(60 * options.minutes - WRITING, 0.0)
    with TemporaryDirectory() as name:
        # Everything is imported from the repository and from the unpacked wheels.
        folder = Path(name)
        target = folder / "packages"
        unpacked = [] if options.wheels is None else unpack(options.wheels, target)
        setting = Setting(
            folder=folder,
            device=options.device,
            quick=options.quick,
            deadline=deadline,
            environment=environment(target),
            tests=marked_files() if options.tests is None else options.tests,
            poisson=options.poisson,
        )
        about = machine(options.device) | {"unpacked": unpacked}
        say("\n".join(f"{key}: {value}" for key, value in about.items()))
        # Tests first: a number is worth nothing where the steps are wrong.
        sections: dict[str, list[Record]] = {}
        for task, records in measured(setting, tasks_of(options)):
            sections.setdefault(task.section, []).extend(records)
            write(options.output, about, sections)
    say((options.output / "gpu.md").read_text(encoding="utf-8"))
    say(f"written: {options.output / 'gpu.md'}, {options.output / 'gpu.json'}")


if __name__ == "__main__":
    main()
