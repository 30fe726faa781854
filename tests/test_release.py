"""What a release is made of agrees with itself: its version, the changelog, citation and forms."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import yaml

import ddnewton

REPOSITORY = Path(__file__).parents[1]
FORMS = REPOSITORY / ".github" / "ISSUE_TEMPLATE"


def project():
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def test_the_version_stands_in_one_place():
    assert project()["dynamic"] == ["version"]
    assert ddnewton.__version__ == version("ddnewton")
    assert re.fullmatch(r"\d+\.\d+\.\d+(rc\d+)?", ddnewton.__version__)


def test_the_changelog_keeps_its_form():
    text = (REPOSITORY / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    for released in versions[1:]:
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", released)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= kinds
    # Every public function is in it.
    for name in ddnewton.__all__:
        if name[0].islower():
            assert f"`{name}" in text, name


def test_the_citation_names_the_paper():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == project()["license"]
    (paper,) = citation["references"]
    assert "arxiv.org/abs/2106.02624" in paper["url"]
    assert [author["family-names"] for author in paper["authors"]] == ["Dangel", "Tatzel", "Hennig"]


def test_there_is_a_form_each_for_a_bug_a_question_and_a_change():
    forms = {file.stem: yaml.safe_load(file.read_text()) for file in FORMS.glob("*.yml")}
    assert sorted(forms) == ["bug", "change", "question"]
    for form in forms.values():
        assert {"name", "description", "body"} <= set(form)
        places = [field["id"] for field in form["body"]]
        assert len(places) == len(set(places))


def test_the_workflow_runs_what_is_promised():
    text = (REPOSITORY / ".github/workflows/checks.yml").read_text()
    workflow = yaml.safe_load(text)
    sessions = re.findall(r"session: (\w+)", text) + re.findall(r"nox -s (\w+)", text)
    assert {"oldest", "newest", "tests", "docs", "package"} <= set(sessions)
    defined = set(
        re.findall(r"^def (\w+)\(session", (REPOSITORY / "noxfile.py").read_text(), re.MULTILINE)
    )
    assert set(sessions) <= defined
    assert "bash .ci/run" in text
    # Each Python that is declared is one that is tested.
    declared = re.findall(r":: (3\.\d+)", "\n".join(project()["classifiers"]))
    pythons = {
        place["python"] for place in workflow["jobs"]["ends"]["strategy"]["matrix"]["include"]
    }
    assert set(declared) == pythons
