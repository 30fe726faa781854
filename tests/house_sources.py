"""The Python files of a checkout, and what is counted in them: functions, names, docstrings.

statements
    Those of a function and of the functions inside it, without its docstring.
long function
    One of 12 statements or more, the docstring counted with them. Any comment between its first
    line and its last will do.
names
    What a file binds by assignment, loop, ``with``, ``except``, pattern, field or parameter, each
    name once a file, without ``self``, ``cls`` and ``_``. A pronoun is a name all of whose words
    are in `PRONOUNS`; the variable of a comprehension may be one, though it counts as a name.
constant
    A name in capitals that a module assigns. Two are twins where they share the name, and not the
    value as it is written.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

WORDS = "found each own mine theirs other others rest known chosen some few one alone"
PRONOUNS = frozenset(f"{WORDS} together held along both whole same this that it which".split())
OPENINGS = ("what", "which", "how", "whether")
LONG_FUNCTION = 12
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Source(NamedTuple):
    """A Python file: its path in the checkout, how many lines it has, its syntax, its comments."""

    path: Path
    length: int
    syntax: ast.Module
    comments: frozenset[int]  # the numbers of the lines with one

    def nodes(self, *kinds: type[ast.AST]) -> Iterator:
        """Yield the nodes of these kinds, in no order."""
        return (node for node in ast.walk(self.syntax) if isinstance(node, kinds))


def read_sources(checkout: Path, folder: str) -> list[Source]:
    """Read every Python file below a folder of the checkout."""
    sources = []
    for path in sorted((checkout / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        comments = frozenset(token.start[0] for token in tokens if token.type == tokenize.COMMENT)
        length = len(text.splitlines())
        sources.append(Source(path.relative_to(checkout), length, ast.parse(text), comments))
    return sources


def functions(sources: list[Source]) -> list[tuple[Source, Function]]:
    """List all functions with their files, those inside functions and classes too."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [(source, function) for source in sources for function in source.nodes(*kinds)]


def statement_count(function: Function, *, docstring: bool) -> int:
    """Count the statements of a function, those of the functions inside included."""
    count = sum(isinstance(node, ast.stmt) for node in ast.walk(function)) - 1
    return count - (not docstring and ast.get_docstring(function) is not None)


def place(source: Source, node: ast.AST, text: str) -> str:
    """Return a place as an editor opens it, and what stands there."""
    return f"{source.path.as_posix()}:{node.lineno} {text}"


def long_functions(sources: list[Source]) -> tuple[int, list[str]]:
    """Count the long functions, and list those without a comment."""
    sizes = ((*row, statement_count(row[1], docstring=True)) for row in functions(sources))
    long = [row for row in sizes if row[2] >= LONG_FUNCTION]
    return len(long), [
        place(source, function, f"{function.name} ({size} statements)")
        for source, function, size in long
        if source.comments.isdisjoint(range(function.lineno, function.end_lineno + 1))
    ]


def bound_names(source: Source) -> Iterator[tuple[ast.AST, str, bool]]:
    """Yield each binding of a file: its node, the name, and whether a comprehension binds it."""
    targets = (node.target for node in source.nodes(ast.comprehension))
    exempt = {id(node) for target in targets for node in ast.walk(target)}
    for node in ast.walk(source.syntax):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield node, name, id(node) in exempt
            case (
                ast.ExceptHandler(name=str(name))
                | ast.MatchAs(name=str(name))
                | ast.MatchStar(name=str(name))
            ):
                yield node, name, False


def is_pronoun(name: str) -> bool:
    """Tell whether a name is made of nothing but pronouns and words like them."""
    words = re.findall("[a-z]+", name.lower())
    return bool(words) and PRONOUNS.issuperset(words)


def pronouns(sources: list[Source]) -> tuple[float, list[str]]:
    """Return the percentage of pronouns among the names, and where each of them is bound."""
    names, counted, places = set(), set(), []
    for source in sources:
        for node, name, exempt in bound_names(source):
            if name in {"self", "cls", "_"}:
                continue
            names.add((source.path, name))
            if is_pronoun(name) and not exempt:
                counted.add((source.path, name))
                places.append((source.path, node.lineno, place(source, node, name)))
    return 100 * len(counted) / max(len(names), 1), [text for *_, text in sorted(places)]


def annotations(sources: list[Source]) -> tuple[int, list[str]]:
    """Count the arguments and returns of all functions, and list those without an annotation."""
    count, bare = 0, []
    for source, function in functions(sources):
        signature = function.args
        arguments = [*signature.posonlyargs, *signature.args, *signature.kwonlyargs]
        arguments += filter(None, (signature.vararg, signature.kwarg))
        typed = {row.arg: row.annotation for row in arguments if row.arg not in {"self", "cls"}}
        typed["return"] = function.returns
        count += len(typed)
        bare += [place(source, function, name) for name, kind in typed.items() if kind is None]
    return count, bare


def docstring_openings(sources: list[Source]) -> tuple[int, dict[str, list[str]]]:
    """Count the docstrings of functions, and list those that return what, which, how or whether."""
    count, places = 0, {word: [] for word in OPENINGS}
    for source, function in functions(sources):
        text = ast.get_docstring(function) or ""
        count += bool(text)
        if opening := re.match(rf"Returns? ({'|'.join(OPENINGS)})\b", text):
            places[opening[1]].append(place(source, function, text.splitlines()[0]))
    return count, places


def constants(source: Source) -> Iterator[tuple[ast.AST, str, str]]:
    """Yield the constants of a module: the node, the name, and the value as it is written."""
    for statement in source.syntax.body:
        if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
            continue
        # Pair every target with its value: A = B = 1 has two of them, and so has A, B = 1, 2.
        pairs = []
        for target in getattr(statement, "targets", None) or [statement.target]:
            value = statement.value
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs += zip(target.elts, value.elts, strict=False)
            else:
                pairs.append((target, value))
        # Keep the names in capitals, private ones too.
        for target, value in pairs:
            if isinstance(target, ast.Name) and re.fullmatch("_?[A-Z][A-Z0-9_]*", target.id):
                yield target, target.id, ast.unparse(value)


def twins(sources: list[Source]) -> tuple[list[str], list[str]]:
    """List the file names, and the constants with different values, that several files share."""
    files, values = defaultdict(list), defaultdict(list)
    for source in sources:
        files[source.path.name].append(source.path.as_posix())
        for node, name, value in constants(source):
            values[name].append((place(source, node, f"= {value}"), value))
    files.pop("__init__.py", None)
    return (
        [f"{name}: {', '.join(paths)}" for name, paths in files.items() if len(paths) > 1],
        [
            f"{name}: {'; '.join(text for text, _ in rows)}"
            for name, rows in values.items()
            if len({value for _, value in rows}) > 1
        ],
    )
