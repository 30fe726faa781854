"""Every public name has a reference, and every link of a page leads somewhere."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import ddnewton
from website.__main__ import REPOSITORY
from website.pages import page_of, with_links

MODULES = ("", ".criteria", ".optim", ".diagnostics", ".plotting")
REFERENCE = re.compile(r"^::: (\S+)$", re.MULTILINE)


def written_names() -> list[str]:
    return [
        name
        for page in sorted((REPOSITORY / "docs/reference").glob("*.md"))
        for name in REFERENCE.findall(page.read_text())
    ]


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_a_reference(module):
    public = importlib.import_module(f"ddnewton{module}").__all__
    top = importlib.import_module("ddnewton").__all__
    names = set(written_names())
    for name in public:
        # What a module shares with the package stands under its shorter name.
        short = f"ddnewton.{name}" if name in top else f"ddnewton{module}.{name}"
        assert short in names


def test_no_name_has_two_and_each_is_there():
    names = written_names()
    assert len(names) == len(set(names))
    for name in names:
        module, _, last = name.rpartition(".")
        assert hasattr(importlib.import_module(module), last)


@pytest.mark.parametrize("name", ["NewtonInfo", "Fit", "History", "State", "UpdateInfo", "Group"])
def test_every_field_of_a_record_has_a_reference(name):
    pages = (REPOSITORY / "build/site/reference").glob("*/index.html")
    (page,) = (page for page in map(Path.read_text, pages) if f'id="ddnewton.{name}"' in page)
    for field in getattr(ddnewton, name)._fields:
        assert f'id="ddnewton.{name}.{field}"' in page, field


def linked(text: str, targets: set[str]) -> str:
    place = {"path": "docs/tools/page.md", "page": "tools/page.md", "repository": REPOSITORY}
    return with_links(text, **place, targets=targets)


def test_links_lead_from_page_to_page():
    targets: set[str] = set()
    text = "[a](../training.md#digits) [b](../../src/ddnewton/newton.py) [c](https://x.org/y)\n"
    changed = "[a](../training.md#digits) [b](../source/ddnewton/newton.md) [c](https://x.org/y)\n"
    assert linked(text, targets) == changed
    assert targets == {"docs/training.md", "src/ddnewton/newton.py"}


@pytest.mark.parametrize("code", ["    [a](nothing.md)\n", "```\n[a](nothing.md)\n```\n"])
def test_code_is_left_as_it_is(code):
    assert linked(code, set()) == code


def test_links_to_nothing_are_errors():
    with pytest.raises(ValueError, match=r"docs/tools/page\.md links to nothing\.md, which is not"):
        linked("[a](nothing.md)", set())
    with pytest.raises(ValueError, match=r"a page links to noxfile\.py, which is no page"):
        linked("[a](../../noxfile.py)", set())


def test_no_page_stands_in_for_two_files():
    files = [*Path("src").rglob("*.py"), *Path("docs").rglob("*.md")]
    pages = [page_of(file.as_posix()) for file in files]
    assert len(pages) == len(set(pages))
