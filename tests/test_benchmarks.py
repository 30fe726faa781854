"""The benchmarks run, every peer agrees with the truth, and both files say so; no times."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
QUANTITIES = ("top10", "all", "eigenvalues")
PEERS = {
    "ddnewton": QUANTITIES,
    "ddnewton-unprepared": ("top10",),
    "ddnewton-dense": ("top10",),
    "jacrev": QUANTITIES,
}


def bench(folder: Path, *arguments: str) -> tuple[dict, str]:
    """Run the command line; return what it wrote, as data and as a table."""
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.bench",
            "--threads",
            "1",
            "--output",
            folder,
            *arguments,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    written = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    return written, (folder / "bench.md").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_quick(tmp_path):
    written, table = bench(tmp_path / "new", "--quick", "--device", "cpu")
    records = written["records"]
    assert {record["status"] for record in records} == {"ok"}
    asked = {(r["problem"], r["peer"], r["quantity"]) for r in records}
    assert len(asked) == len(records)
    assert asked == {
        (problem, peer, quantity)
        for problem in ("reference", "tiny-conv")
        for peer, quantities in (PEERS | {"floor": QUANTITIES}).items()
        for quantity in quantities
    }
    for record in records:
        assert record["seconds"] > 0
        if record["peer"] in PEERS:
            assert record["difference"] < (1e-6 if "ddnewton" in record["peer"] else 1e-4)
            assert record["runs"] == 2
            assert record["peak"] >= 0
    assert written["machine"]["threads"] == 1
    assert table.count("### ") == 2
    assert all(f"| {peer} |" in table for peer in PEERS)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_what_cannot_run_is_an_entry(tmp_path):
    arguments = ("--quick", "--problem", "tiny-conv", "--peer", "jacrev", "--minutes", "0")
    written, table = bench(tmp_path, *arguments)
    assert {r["status"] for r in written["records"]} == {"not run: the time was up"}
    assert "not run: the time was up" in table
