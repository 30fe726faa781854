"""The page on the floor plan names every room that there is, and none that there is not."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src" / "ddnewton"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ROOMS = sorted(
    path.relative_to(SOURCES)
    for path in SOURCES.rglob("*.py")
    if path.stem not in {"__init__", "__main__"}
)


@pytest.mark.parametrize("room", ROOMS, ids=str)
def test_a_room_is_named(room):
    assert re.search(rf"\b{room.stem}\b", PAGE)


def test_layers_are_those_of_the_contract():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = contracts["tool"]["importlinter"]["contracts"][0]["layers"]
    plan = PAGE.split("names.\n", 1)[1].split("## The rooms")[0]
    names = [re.split(r"\s{2,}", line.strip())[0] for line in plan.splitlines()]
    named = [word for line in names for word in re.findall(r"\w+", line)]
    assert named == [word for layer in layers for word in re.findall(r"\w+", layer)]


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((\.\./[^)]+)\)", PAGE))))
def test_links_lead_somewhere(path):
    assert (ROOT / "docs" / path).exists()


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)`", PAGE))), ids=str
)
def test_files_exist(path):
    assert (ROOT / path).exists() or (SOURCES / path).exists()
