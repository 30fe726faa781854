"""What `house` counts is right on small trees whose every number is known."""

import ast
from pathlib import Path

import pytest

from tests import house, house_imports, house_sources

CONTRACT = """\
[[tool.importlinter.contracts]]
type = "layers"
layers = {}
"""


def checkout(folder: Path, files: dict[str, str], layers: int = 3) -> house.Checkout:
    """Write a checkout whose files in src/ddnewton are these, unless their path says otherwise."""
    (folder / "pyproject.toml").write_text(CONTRACT.format([str(k) for k in range(layers)]))
    for name, text in {"__init__.py": "", **files}.items():
        inside = name.startswith(("benchmarks/", "tests/"))
        path = folder / name if inside else folder / "src/ddnewton" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return house.read_checkout(folder)


def rows(tree: house.Checkout) -> dict[str, house.Measure]:
    return {row.name: row for row in house.measure(tree)}


def function(statements: int, comment: str = "") -> str:
    """Write an annotated function of so many statements, its docstring being one of them."""
    lines = ["def f() -> None:", '    """Return the sum."""', *["    x = 1"] * (statements - 1)]
    return "\n".join([*lines[:3], *filter(None, [comment]), *lines[3:], ""])


CLEAN = {
    "trees.py": "LEAVES = 3\n\n\ndef leaves(tree: int) -> int:\n"
    '    """Return the leaves."""\n    return tree\n\n\ndef depth(tree: int) -> int: ...\n\n\n'
    "def width(tree: int) -> int: ...\n",
    "newton.py": "from ddnewton.trees import leaves\n",
    # As long as they may be: two packages have a file of one name, for that is how packages are.
    "criteria/__init__.py": "",
    "step.py": function(39, "    # one step"),
    "benchmarks/bench.py": "\n" * 260,
    "tests/conftest.py": "\n" * 600,
}
# What breaks one measure, and what is said of it.
BROKEN = {
    "import cycles, benchmarks too": (
        {"a.py": "import ddnewton.b\n", "b.py": "import ddnewton.a\n"},
        "ddnewton.a = ddnewton.b",
    ),
    "statements of a function: longest": (
        {"gram.py": function(40, "    # one step")},
        "src/ddnewton/gram.py:1 f (39 statements)",
    ),
    "long functions without a comment": (
        {"gram.py": function(12)},
        "src/ddnewton/gram.py:1 f (12 statements)",
    ),
    "longest file, benchmarks too": (
        {"benchmarks/report.py": "\n" * 261},
        "benchmarks/report.py (261 lines)",
    ),
    "longest test file": ({"tests/conftest.py": "\n" * 601}, "tests/conftest.py (601 lines)"),
    "names that are pronouns": ({"gram.py": "others = 1\n"}, "src/ddnewton/gram.py:1 others"),
    "annotated arguments and returns": (
        {"gram.py": "def f(x, *, y: int) -> int: ...\n"},
        "src/ddnewton/gram.py:1 x",
    ),
    "docstrings that begin “Return what”": (
        {"gram.py": 'def f() -> int:\n    """Return what there is."""\n'},
        "src/ddnewton/gram.py:1 Return what there is.",
    ),
    "files that share a name": (
        {"criteria/trees.py": ""},
        "trees.py: src/ddnewton/criteria/trees.py, src/ddnewton/trees.py",
    ),
    "constants of several values": (
        {"gram.py": "LEAVES = 4\n"},
        "LEAVES: src/ddnewton/gram.py:1 = 4; src/ddnewton/trees.py:1 = 3",
    ),
}


def test_a_tidy_tree_passes(tmp_path, capsys):
    checkout(tmp_path, CLEAN)
    assert house.main(["--tree", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert table.startswith("| measure | limit | value |\n|---|---|---|\n| layers")
    assert "| longest import chain | none | 2: newton > trees |" in table
    assert "Over" not in table


@pytest.mark.parametrize("name", BROKEN)
def test_each_limit_can_be_broken_alone(name, tmp_path, capsys):
    files, culprit = BROKEN[name]
    tree = checkout(tmp_path, CLEAN | files)
    assert {row.name: row.culprits for row in house.measure(tree) if row.culprits} == {
        name: [culprit]
    }
    assert house.main(["--tree", str(tmp_path)]) == 1
    assert f": {name}\n  {culprit}\n" in capsys.readouterr().out


def test_layers_and_the_median_can_break_their_limits(tmp_path):
    tree = checkout(
        tmp_path, CLEAN | {"gram.py": function(9), "trees.py": "", "step.py": ""}, layers=15
    )
    broken = {row.name: row for row in house.measure(tree) if row.culprits}
    assert list(broken) == ["layers in the import contract", "statements of a function: median"]
    assert [row.value for row in broken.values()] == ["15", "8"]


def test_every_limit_is_shown_to_break(tmp_path):
    limited = {row.name for row in house.measure(checkout(tmp_path, CLEAN)) if row.limit != "none"}
    above = {"layers in the import contract", "statements of a function: median"}
    assert limited == BROKEN.keys() | above


def test_many_culprits_are_cut_short(tmp_path, capsys):
    checkout(tmp_path, CLEAN | {"gram.py": "others = 1\n" * 12})
    assert house.main(["--tree", str(tmp_path)]) == 1
    assert "gram.py:10 others\n  … and 2 more\n" in capsys.readouterr().out


def test_a_folder_without_sources_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        house.main(["--tree", str(tmp_path)])
    assert "no Python file in src/ddnewton" in capsys.readouterr().err


EVERY_CRITERION = {"ddnewton.criteria", "ddnewton.criteria.batch"}


@pytest.mark.parametrize(
    ("statement", "imported"),
    [
        ("import ddnewton.criteria.batch", {"ddnewton.criteria.batch"}),
        ("from ddnewton.criteria import batch", {"ddnewton.criteria.batch"}),
        ("from ddnewton.criteria import as_loss", {"ddnewton.criteria"}),
        ("from ddnewton.criteria import as_loss, batch as b", EVERY_CRITERION),
        ("from ddnewton.criteria.batch import Batch", {"ddnewton.criteria.batch"}),
        ("from .criteria import batch", {"ddnewton.criteria.batch"}),
        ("import torch, criteria.batch, types", set()),
        ("if X:\n    import ddnewton.criteria", {"ddnewton.criteria"}),
        ("try:\n    pass\nexcept E:\n    import ddnewton.criteria", {"ddnewton.criteria"}),
        ("if TYPE_CHECKING:\n    import ddnewton.criteria", set()),
        ("if not X:\n    pass\nelse:\n    import ddnewton.criteria", {"ddnewton.criteria"}),
        ("def f():\n    import ddnewton.criteria", set()),
    ],
)
def test_what_an_import_leads_to(statement, imported, tmp_path):
    files = {"criteria/__init__.py": "", "criteria/batch.py": "", "gram.py": statement}
    sources = checkout(tmp_path, files).package
    graph = house_imports.import_graph(sources, runtime=True)
    assert graph["ddnewton.gram"] == imported


def test_the_chain_is_the_longest_and_counts_packages(tmp_path):
    files = {
        "__init__.py": "from ddnewton.a import x\n",
        "a.py": "from ddnewton.b import x\nimport ddnewton.b.c\n",
        "b/__init__.py": "from .c import x\n",
        "b/c.py": "import ddnewton.d\n",
        "d.py": "",
    }
    graph = house_imports.import_graph(checkout(tmp_path, files).package, runtime=True)
    chain = ["ddnewton", "ddnewton.a", "ddnewton.b", "ddnewton.b.c", "ddnewton.d"]
    assert house_imports.longest_chain(graph) == chain


def test_cycles_are_met_inside_functions_and_between_scripts(tmp_path):
    files = {
        "a.py": "def f() -> None:\n    from ddnewton import b\n",
        "b.py": "import ddnewton.c\n",
        "c.py": "import ddnewton.a\n",
        "d.py": "import ddnewton.a\n",
        "benchmarks/nets.py": "from training.run import x\n",
        "benchmarks/training/run.py": "import tasks\n",
        "benchmarks/training/tasks.py": "import nets, tasks\n",
        "benchmarks/training/grids.py": "from benchmarks.training import report\n",
        "benchmarks/training/report.py": "from benchmarks.training.grids import x\n",
    }
    row = rows(checkout(tmp_path, files))["import cycles, benchmarks too"]
    assert row.culprits == [
        "ddnewton.a = ddnewton.b = ddnewton.c",
        "benchmarks.nets = benchmarks.training.run = benchmarks.training.tasks",
        "benchmarks.training.grids = benchmarks.training.report",
    ]
    assert row.value == "3"


def test_a_cycle_has_no_longest_chain(tmp_path):
    tree = checkout(tmp_path, {"a.py": "import ddnewton.b", "b.py": "import ddnewton.a"})
    assert rows(tree)["longest import chain"].value == "a cycle"


def test_statements_of_functions_inside_count_and_docstrings_do_not():
    text = 'def f():\n    """Say."""\n    def g():\n        return 1\n    if x: return g\n'
    (outer,) = ast.parse(text).body
    assert house_sources.statement_count(outer, docstring=False) == 4
    assert house_sources.statement_count(outer, docstring=True) == 5


def test_the_median_and_the_percentile(tmp_path):
    # Of the sizes 1 to 20, 19 of 20 functions are at most 19 statements long.
    files = {f"f{k}.py": function(k + 1, "    # a step") for k in range(1, 21)}
    table = rows(checkout(tmp_path, files))
    assert table["statements of a function: median"].value == "10.5"
    assert table["statements of a function: 95 % have at most"].value == "19"
    assert table["statements of a function: longest"].value == "20"


@pytest.mark.parametrize(
    ("text", "silent"),
    [
        (function(12), 1),
        (function(11), 0),
        (function(12, "    # sum"), 0),
        ("# before\n" + function(12) + "# behind\n", 1),
        (function(12, "    s = '# no comment'"), 1),
    ],
)
def test_a_comment_counts_inside_its_function(text, silent, tmp_path):
    assert (
        len(house_sources.long_functions(checkout(tmp_path, {"a.py": text}).package)[1]) == silent
    )


@pytest.mark.parametrize(
    ("text", "percent"),
    [
        ("rest = 1\nx = 2\n", 50),
        ("rest = 1\nrest += 1\nx = 2\n", 50),  # once a file
        ("rest, x = 1, 2\n", 50),
        ("FEW = 1\n", 100),
        ("each_other = 1\n", 100),
        ("any_known = held_out = alone_position = 1\n", 0),
        ("def f(self, others, *, x): ...\n", 50),
        ("f = lambda found: found\n", 50),
        ("class A:\n    rest: int\n    x: int\n", 50),
        ("for each in x:\n    pass\n", 100),
        ("with x as held:\n    pass\n", 100),
        ("if known := x:\n    pass\n", 100),
        ("try:\n    pass\nexcept E as other:\n    pass\n", 100),
        ("match x:\n    case [some, *rest]:\n        pass\n", 100),
        ("y = [one for one in x]\n", 0),  # of the two names y and one
        ("y = 1\nz = {k: own for k, own in x}\nown = 2\n", 25),
        ("print(others)\nx.rest = 1\n", 0),  # neither binds a name
        ("", 0),
    ],
)
def test_pronouns_among_names(text, percent, tmp_path):
    assert house_sources.pronouns(checkout(tmp_path, {"a.py": text}).package)[0] == percent


def test_a_hundredth_of_the_names_may_be_pronouns(tmp_path):
    names = "rest = 1\n" + "".join(f"x{k} = 1\n" for k in range(99))
    row = rows(checkout(tmp_path, {"a.py": names}))["names that are pronouns"]
    assert (row.value, row.culprits) == ("1.0 %", [])


def test_annotations_of_every_kind_of_argument(tmp_path):
    text = "class A:\n    def f(self, a, /, b: int, *c, d, **e): ...\n"
    count, bare = house_sources.annotations(checkout(tmp_path, {"a.py": text}).package)
    assert count == 6
    assert [row.split()[1] for row in bare] == ["a", "d", "c", "e", "return"]
    value = rows(checkout(tmp_path, {}))["annotated arguments and returns"].value
    assert value == "16.67 %"


def test_lines_per_comment(tmp_path):
    tree = checkout(tmp_path, {"a.py": "x = 1  # one\ny = '# none'\n\n# two\n\n\n"})
    assert rows(tree)["lines per comment"].value == "3"


def test_constants_compare_as_written(tmp_path):
    files = {
        "a.py": "A, B = 1, 2\nC: int = 3\n_D = 4\nT = TypeVar('T')\nlower = 1\n",
        "b.py": "A, B = 1, 3\nC = 4\n_D = 5\nT = TypeVar('T')\nlower = 2\n\n\n"
        "def f() -> None:\n    A = 2\n",
    }
    constants = house_sources.twins(checkout(tmp_path, files).package)[1]
    assert [row.split(":")[0] for row in constants] == ["B", "C", "_D"]


def test_docstrings_by_their_first_words(tmp_path):
    heads = ("Return what is", "Returns how", "Return whether", "Return whatever", "Say which")
    text = "".join(f'def f{k}():\n    """{head} x."""\n' for k, head in enumerate(heads))
    count, places = house_sources.docstring_openings(checkout(tmp_path, {"a.py": text}).package)
    assert count == 5
    assert {word: len(listed) for word, listed in places.items()} == {
        "what": 1,
        "which": 0,
        "how": 1,
        "whether": 1,
    }


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--names", "src/ddnewton/a.py:1 rest\n"),
        ("--comments", "src/ddnewton/b.py:1 f (12 statements)\n"),
        ("--docstrings", "src/ddnewton/c.py:1 Return how.\n"),
        ("--twins", "A: src/ddnewton/d.py:1 = 1; src/ddnewton/e.py:1 = 2\n"),
    ],
)
def test_listings(option, line, tmp_path, capsys):
    files = {
        "a.py": "rest = 1\n",
        "b.py": function(12),
        "c.py": 'def f():\n    """Return how."""\n',
        "d.py": "A = 1\n",
        "e.py": "A = 2\n",
    }
    checkout(tmp_path, files)
    assert house.main(["--tree", str(tmp_path), option]) == 0
    assert capsys.readouterr().out == line
