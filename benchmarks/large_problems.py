"""Problems that are solved by products alone, beside curvlinops' operator with SciPy's methods.

Run with ``python -m benchmarks.large_problems``, or ``nox -s large`` for an environment with the
peers. Times are CPU seconds, medians of rounds in which the ways take turns; memory is what a
process of its own takes above what it held with everything imported and the problem made. Steps are
compared at equal accuracy: the peer stops, for nothing, at the first iterate that gives away no
more of the decrease than our step does. Eigenpairs are to 1e-6 of the largest eigenvalue: ARPACK
gets the loosest of several settings that is as good. ``--quick`` runs small problems once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.large_measure import Record
from benchmarks.large_recipes import FULL, QUICK, RECIPES
from benchmarks.large_ways import EXACT, OURS, PEER
from benchmarks.processes import ROOT, in_words, say
from benchmarks.step_tables import machine, seconds

HEADINGS = (
    *("problem", "of it", "s", "MiB", "products", "told", "true"),
    *(f"{PEER}: s", "MiB", "products", "true", "× ours", "exact: s", "MiB"),
)
EXPLANATION = """\
True is, of a product, its relative error; of a step, the share of the decrease that it gives away,
and told a bound on it; of eigenpairs, the largest residual over the largest eigenvalue.
"""


def process(folder: Path, options: argparse.Namespace, *arguments: str) -> str:
    """Run a process of measurements; return how it ended."""
    threads = {name: str(options.threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    command = [sys.executable, "-m", "benchmarks.large_measure", str(folder), *arguments]
    command += ["--threads", str(options.threads)]
    if options.quick:
        command += ["--rounds", "1"]
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | threads,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if ended.returncode == 0:
        return "ok"
    return in_words((ended.stderr.strip().splitlines() or [f"ended with {ended.returncode}"])[-1])


def measured(name: str, options: argparse.Namespace, folder: Path) -> list[Record]:
    """Return a record for every quantity and way of a problem."""
    folder.mkdir()
    status = process(folder, options, name)
    left = folder / "times.json"
    times = json.loads(left.read_text(encoding="utf-8")) if left.exists() else {}
    records: list[Record] = [
        {"problem": name, "quantity": quantity, "way": way} | record
        for quantity in RECIPES[name].quantities
        for way, record in times.get(quantity, {OURS: {"status": status}}).items()
    ]
    # The memory of every answer in a process of its own; of small ones of a way in the same.
    for way in (OURS, PEER, EXACT):
        timed = [r for r in records if r["way"] == way and r["status"] == "ok"]
        for part in [timed] if options.quick else [[record] for record in timed]:
            if quantities := [record["quantity"] for record in part]:
                status = process(folder, options, name, "--way", way, "--quantity", *quantities)
            for record in part:
                left = folder / f"{record['quantity']}, {way}.json"
                record["memory"] = status
                if left.exists():
                    record.update(json.loads(left.read_text(encoding="utf-8")))
    return records


def row(records: dict[str, Record]) -> str:
    """Return the row of a quantity, from the records of its ways."""
    ours, peer, exact = (records.get(way) for way in (OURS, PEER, EXACT))
    assert ours is not None
    factor = "–"
    if peer and "seconds" in peer and "seconds" in ours:
        factor = f"{peer['seconds'] / ours['seconds']:.2f}"
    cells = [ours["problem"], ours["quantity"], time_of(ours), memory_of(ours)]
    cells += [f"{ours['products']}" if "products" in ours else "–"]
    cells += [shown(ours, "told"), shown(ours, "error"), time_of(peer), memory_of(peer)]
    cells += [f"{peer['products']}" if peer and "products" in peer else "–"]
    cells += [shown(peer, "error"), factor, time_of(exact), memory_of(exact)]
    return f"| {' | '.join(cells)} |"


def time_of(record: Record | None) -> str:
    """Return a time, or why there is none."""
    if record is None:
        return "–"
    if record["status"] != "ok":
        return str(record["status"])
    return seconds(record["seconds"]) + ("" if record["runs"] else " (once)")


def memory_of(record: Record | None) -> str:
    """Return a peak of memory."""
    if record is None or record["status"] != "ok":
        return "–"
    return f"{record['peak'] / 2**20:.0f}" if "peak" in record else str(record["memory"])


def shown(record: Record | None, field: str) -> str:
    """Return a small number."""
    return "–" if record is None or field not in record else f"{record[field]:.1e}"


def arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small problems, to see that it works")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="problems that begin with these")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="a file for everything that was measured")
    options = parser.parse_args()
    names = QUICK if options.quick else FULL
    starts = tuple(options.only or [""])
    options.problems = [name for name in names if name.startswith(starts)]
    if not options.problems:
        parser.error(f"--only must name beginnings of {', '.join(names)}; got {options.only}")
    return options


def main() -> None:
    """Measure, and print the table row by row."""
    options = arguments()
    about = machine("cpu", options.threads)
    say(", ".join(f"{key} {value}" for key, value in about.items()), EXPLANATION, sep="\n\n")
    say(f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}", sep="\n")
    records: list[Record] = []
    with TemporaryDirectory() as folder:
        for number, name in enumerate(options.problems):
            of_problem = measured(name, options, Path(folder) / str(number))
            for quantity in RECIPES[name].quantities:
                say(row({r["way"]: r for r in of_problem if r["quantity"] == quantity}))
            records += of_problem
    if options.json:
        everything = {"machine": about, "records": records}
        options.json.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
