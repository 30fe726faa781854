"""The import contract and the imports of a checkout: layers, the longest chain, cycles.

chain
    The modules of the longest path along the imports at module level, ``__init__`` files included.
    ``import a.b`` leads to a.b and not to a; ``from a import b`` leads to the module a.b if there
    is one, and else to a. What only a type checker imports is left out.
cycle
    Modules that reach one another along their imports, wherever these stand, in functions too. The
    scripts of ``benchmarks`` may import a neighbour by its bare name.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from itertools import chain
from pathlib import Path

from tests.house_sources import Source

Graph = dict[str, set[str]]


def layer_count(checkout: Path) -> int:
    """Count the layers of the import contract in pyproject.toml; of several, the tallest."""
    settings = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    return max(len(contract["layers"]) for contract in contracts if contract["type"] == "layers")


def module_name(source: Source) -> str:
    """Return the dotted name of a file: ddnewton.trees, benchmarks.training.run."""
    parts = source.path.with_suffix("").parts
    return ".".join(part for part in parts if part not in {"src", "__init__"})


def runtime_imports(body: Iterable[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports that run when the module is imported."""
    for statement in body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            yield statement
        elif isinstance(statement, ast.If):
            # What only a type checker reads does not run; its alternative does.
            if "TYPE_CHECKING" not in ast.unparse(statement.test):
                yield from runtime_imports(statement.body)
            yield from runtime_imports(statement.orelse)
        elif isinstance(statement, ast.Try):
            # Every branch of a try may run.
            handled = chain.from_iterable(handler.body for handler in statement.handlers)
            branches = chain(statement.body, handled, statement.orelse, statement.finalbody)
            yield from runtime_imports(branches)


def import_targets(statement: ast.Import | ast.ImportFrom, package: str) -> Iterator[list[str]]:
    """Yield, for every name imported, the modules it may come from, the likeliest first."""
    if isinstance(statement, ast.Import):
        yield from ([alias.name] for alias in statement.names)
    else:
        module = resolve_name("." * statement.level + (statement.module or ""), package)
        yield from ([f"{module}.{alias.name}", module] for alias in statement.names)


def import_graph(sources: list[Source], *, runtime: bool, bare: bool = False) -> Graph:
    """Map every module to those it imports, at run time alone or wherever an import stands."""
    graph: Graph = {module_name(source): set() for source in sources}
    for source in sources:
        importer = module_name(source)
        is_package = source.path.name == "__init__.py"
        package = importer if is_package else importer.rpartition(".")[0]
        # A bare name, as scripts use it, is looked up in the script's folder and those above.
        words = package.split(".") if bare else []
        prefixes = ["", *(".".join(words[:k]) + "." for k in range(len(words), 0, -1))]
        every_import = source.nodes(ast.Import, ast.ImportFrom)
        for statement in runtime_imports(source.syntax.body) if runtime else every_import:
            for targets in import_targets(statement, package):
                # The first candidate that is a file of ours is the module that is imported.
                candidates = (prefix + target for prefix in prefixes for target in targets)
                imported = next(filter(graph.__contains__, candidates), importer)
                graph[importer] |= {imported} - {importer}
    return graph


def longest_chain(graph: Graph) -> list[str]:
    """Return the modules of the longest path, from the importer down; none if there is a cycle."""
    chains: dict[str, list[str]] = {}
    try:
        for module in TopologicalSorter(graph).static_order():
            below = (chains[imported] for imported in sorted(graph[module]))
            chains[module] = [module, *max(below, key=len, default=[])]
    except CycleError:
        return []
    return max(chains.values(), key=len, default=[])


def reachable(graph: Graph, start: str) -> set[str]:
    """Return the modules that a module imports, directly or by way of further ones."""
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph[waiting.pop()] - reached
        reached |= new
        waiting += new
    return reached


def import_cycles(graph: Graph) -> list[str]:
    """List the sets of modules that import one another, each as its names in order."""
    below = {module: reachable(graph, module) for module in graph}
    cycles = {
        tuple(sorted(name for name in below[module] if module in below[name]))
        for module in graph
        if module in below[module]
    }
    return [" = ".join(cycle) for cycle in sorted(cycles)]
