"""Measure the house: layers, import chains, functions, files and names, in one table.

``python -m tests.house``, or ``nox -s house``, prints a row for every measure, and ends with status
1 where one is over its limit, naming the culprits. ``--tree DIR`` measures another checkout;
``--names``, ``--comments``, ``--docstrings`` and ``--twins`` list the places behind a measure
instead. How each is counted is written in house_imports.py and house_sources.py. The files counted
are those of ``src/ddnewton``, unless the row names more.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests import house_imports, house_sources
from tests.house_sources import Source

LAYERS = 14
MEDIAN_STATEMENTS, MOST_STATEMENTS = 5, 38
LONGEST_FILE, LONGEST_TEST_FILE = 260, 600
PRONOUN_PERCENT = 1.0


class Measure(NamedTuple):
    """A row of the table; culprits are what breaks the limit, none if it holds."""

    name: str
    value: str
    limit: str = "none"
    culprits: Sequence[str] = ()


class Checkout(NamedTuple):
    """A checkout of the repository, read."""

    folder: Path
    package: list[Source]
    benchmarks: list[Source]
    tests: list[Source]


def read_checkout(folder: Path) -> Checkout:
    """Read the sources, the benchmarks and the tests of a checkout."""
    folders = ("src/ddnewton", "benchmarks", "tests")
    return Checkout(folder, *(house_sources.read_sources(folder, name) for name in folders))


def measure_imports(checkout: Checkout) -> list[Measure]:
    """Measure the layers, the longest chain of imports, and the cycles."""
    layers = house_imports.layer_count(checkout.folder)
    path = house_imports.longest_chain(house_imports.import_graph(checkout.package, runtime=True))
    package = house_imports.import_graph(checkout.package, runtime=False)
    benchmarks = house_imports.import_graph(checkout.benchmarks, runtime=False, bare=True)
    cycles = house_imports.import_cycles(package) + house_imports.import_cycles(benchmarks)
    modules = " > ".join(module.removeprefix("ddnewton.") for module in path)
    return [
        Measure(
            "layers in the import contract",
            f"{layers}",
            f"≤ {LAYERS}",
            [f"{layers} layers"] if layers > LAYERS else [],
        ),
        Measure("longest import chain", f"{len(path)}: {modules}" if path else "a cycle"),
        Measure("import cycles, benchmarks too", f"{len(cycles)}", "0", cycles),
    ]


def measure_functions(sources: list[Source]) -> list[Measure]:
    """Measure the length of the functions, and the long ones without a comment."""
    sizes = [
        (house_sources.statement_count(function, docstring=False), source, function)
        for source, function in house_sources.functions(sources)
    ]
    # The percentile is the smallest size that 95 % of the functions do not pass.
    ordered = sorted(size for size, *_ in sizes) or [0]
    median = statistics.median(ordered)
    percentile = ordered[-(-95 * len(ordered) // 100) - 1]
    too_long = [
        house_sources.place(source, function, f"{function.name} ({size} statements)")
        for size, source, function in sizes
        if size > MOST_STATEMENTS
    ]
    # A long function has a comment at each step; that it has one at all can be counted.
    long, silent = house_sources.long_functions(sources)
    return [
        Measure(
            "statements of a function: median",
            f"{median:g}",
            f"≤ {MEDIAN_STATEMENTS}",
            [f"{median:g} statements"] if median > MEDIAN_STATEMENTS else [],
        ),
        Measure("statements of a function: 95 % have at most", f"{percentile}"),
        Measure(
            "statements of a function: longest", f"{ordered[-1]}", f"≤ {MOST_STATEMENTS}", too_long
        ),
        Measure("long functions without a comment", f"{len(silent)} of {long}", "0", silent),
    ]


def measure_files(name: str, sources: list[Source], limit: int) -> Measure:
    """Measure the longest of some files."""
    longest = max(sources, key=lambda source: source.length, default=None)
    value = f"{longest.length} lines, {longest.path.as_posix()}" if longest else "no file"
    culprits = [
        f"{source.path.as_posix()} ({source.length} lines)"
        for source in sources
        if source.length > limit
    ]
    return Measure(name, value, f"≤ {limit} lines", culprits)


def measure_words(sources: list[Source]) -> list[Measure]:
    """Measure names, annotations, comments and docstrings."""
    percent, places = house_sources.pronouns(sources)
    annotated, bare = house_sources.annotations(sources)
    lines = sum(source.length for source in sources)
    comments = sum(len(source.comments) for source in sources)
    docstrings, openings = house_sources.docstring_openings(sources)
    return [
        Measure(
            "names that are pronouns",
            f"{percent:.1f} %",
            f"≤ {PRONOUN_PERCENT:g} %",
            places if percent > PRONOUN_PERCENT else [],
        ),
        Measure(
            "annotated arguments and returns",
            f"{100 * (annotated - len(bare)) / max(annotated, 1):.4g} %",
            "100 %",
            bare,
        ),
        Measure("lines per comment", f"{lines / max(comments, 1):.0f}"),
        *(
            Measure(
                f"docstrings that begin “Return {word}”",
                f"{len(rows)} of {docstrings}",
                *(["0", rows] if word == "what" else []),
            )
            for word, rows in openings.items()
        ),
    ]


def measure(checkout: Checkout) -> list[Measure]:
    """Take all measures of a checkout, in the order of the table."""
    sources = checkout.package
    files, constants = house_sources.twins(sources)
    return [
        *measure_imports(checkout),
        *measure_functions(sources),
        measure_files("longest file, benchmarks too", sources + checkout.benchmarks, LONGEST_FILE),
        measure_files("longest test file", checkout.tests, LONGEST_TEST_FILE),
        *measure_words(sources),
        Measure("files that share a name", f"{len(files)}", "0", files),
        Measure("constants of several values", f"{len(constants)}", "0", constants),
    ]


def listing(option: str, sources: list[Source]) -> list[str]:
    """List the places behind one measure."""
    match option:
        case "names":
            return house_sources.pronouns(sources)[1]
        case "comments":
            return house_sources.long_functions(sources)[1]
        case "docstrings":
            return [
                row
                for rows in house_sources.docstring_openings(sources)[1].values()
                for row in rows
            ]
        case _:
            return [row for rows in house_sources.twins(sources) for row in rows]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table or a list; return 1 if the table is over a limit, and else 0."""
    # Read the options: one listing at most, and a checkout that has something to measure.
    parser = argparse.ArgumentParser(description="Measure the house; 1 if a limit is broken.")
    parser.add_argument("--tree", type=Path, default=Path(), metavar="DIR", help="the checkout")
    options = parser.add_mutually_exclusive_group()
    for option in ("names", "comments", "docstrings", "twins"):
        options.add_argument(
            f"--{option}", dest="option", action="store_const", const=option, help="list these"
        )
    parsed = parser.parse_args(arguments)
    checkout = read_checkout(parsed.tree)
    if not checkout.package:
        parser.error(f"--tree: no Python file in src/ddnewton of {parsed.tree.resolve()}")
    if parsed.option:
        for row in listing(parsed.option, checkout.package):
            print(row)
        return 0
    # Print the table, then what breaks a limit, the first few places of each.
    measures = measure(checkout)
    print("| measure | limit | value |", "|---|---|---|", sep="\n")
    for row in measures:
        print(f"| {row.name} | {row.limit} | {row.value} |")
    broken = [row for row in measures if row.culprits]
    for row in broken:
        print(f"\nOver the limit ({row.limit}): {row.name}", *row.culprits[:10], sep="\n  ")
        if len(row.culprits) > 10:
            print(f"  … and {len(row.culprits) - 10} more")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
