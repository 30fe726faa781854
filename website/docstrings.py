"""What docstrings have of reStructuredText, as Markdown: equations, code, and names as links.

An extension of griffe, which reads the sources for the reference.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import griffe

DIRECTIVE = re.compile(
    r"^(?P<indent> *)\.\. (?P<kind>math|code-block)::(?P<first>[^\n]*)"
    r"(?P<more>(?:\n+(?P=indent) +[^\n]+)*)",
    re.MULTILINE,
)
NAME = re.compile(r"(?<!`)`((?:ddnewton\.)?[A-Za-z_][\w.]*)`(?!`)")


class Docstrings(griffe.Extension):
    """Turns the docstrings of all objects into Markdown, once they are read."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Turn the docstrings of a package."""
        public = public_names(pkg)
        for member in members(pkg):
            if member.docstring is not None:
                member.docstring.value = as_markdown(member.docstring.value, public)
        for package, name, function in list(hidden_functions(pkg)):
            package.members[name] = griffe.Alias(name, function, parent=package)


def hidden_functions(
    package: griffe.Module,
) -> Iterator[tuple[griffe.Module, str, griffe.Object | griffe.Alias]]:
    """Yield functions that packages export, but that modules of the same names stand before."""
    for name in map(str, package.exports or ()):
        with suppress(griffe.AliasResolutionError):  # of what is imported through such a name
            member = package.members[name]
            module = member.target if isinstance(member, griffe.Alias) else member
            if isinstance(module, griffe.Module) and name in module.members:
                yield package, name, module.members[name]
    for inner in package.modules.values():
        if inner.is_init_module:
            yield from hidden_functions(inner)


def members(module: griffe.Module | griffe.Class) -> list[griffe.Object]:
    """Return what a module or class has inside of it, at any depth, but not what it imports."""
    inside: list[griffe.Object] = []
    for member in module.members.values():
        if isinstance(member, griffe.Object):
            inside.append(member)
            if isinstance(member, (griffe.Module, griffe.Class)):
                inside += members(member)
    return inside


def public_names(package: griffe.Module) -> dict[str, str]:
    """Return the pages' anchors of the names that the package exports, by how they are written."""
    names = {name: f"{package.path}.{name}" for name in package.exports or ()}
    return names | {anchor: anchor for anchor in names.values()}


def as_markdown(text: str, public: dict[str, str]) -> str:
    r"""Return a docstring with equations between dollars, fenced code, and names as links.

    >>> print(as_markdown("Two.\n\n.. math:: 1 + 1\n\nSee `fit`.", {"fit": "ddnewton.fit"}))
    Two.
    <BLANKLINE>
    $$
    1 + 1
    $$
    <BLANKLINE>
    See [`fit`][ddnewton.fit].
    """

    def block(match: re.Match[str]) -> str:
        body = textwrap.dedent(match["more"].strip("\n"))
        if match["kind"] == "math":
            lines = ["$$", *(line for line in (match["first"].strip(), body) if line), "$$"]
        else:
            lines = [f"```{match['first'].strip()}", body, "```"]
        return textwrap.indent("\n".join(lines), match["indent"])

    def link(match: re.Match[str]) -> str:
        anchor = public.get(match[1])
        return match[0] if anchor is None else f"[{match[0]}][{anchor}]"

    return NAME.sub(link, DIRECTIVE.sub(block, text))
