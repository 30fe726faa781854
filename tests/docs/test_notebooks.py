"""Notebooks run to the end, as they are stored and anew, and show nothing of a machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))

# Over files, not over TCP: a free port that a kernel is told may be taken before it binds it. And
# in a process of its own: what nbclient leaves open is a warning, an error wherever it comes up.
RUN = """
import sys
import nbformat
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient

manager = AsyncKernelManager(transport="ipc", ip=sys.argv[2])
notebook, day = nbformat.read(sys.argv[1], as_version=4), 24 * 60 * 60
NotebookClient(notebook, km=manager, timeout=None, startup_timeout=day).execute()
"""


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path):
    command = [sys.executable, "-c", RUN, path.name, str(tmp_path / "kernel")]
    subprocess.run(command, cwd=path.parent, check=True)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stored(path):
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_machine_shows(path):
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["kernelspec"] == {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/png", None)
        assert not any(
            folder in json.dumps(cell) for folder in ("/home/", "/tmp/", "/root/", "C:\\")
        )
