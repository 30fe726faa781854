"""The language model is trained by both kinds of methods, and its files say so; no times."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import character_model, language_tables

ROOT = Path(__file__).parents[1]


def test_quick(tmp_path):
    methods = ("AdamW, 100 updates", "constant δ")
    words = ["--quick", "--out", str(tmp_path), "--method", *methods]
    for _ in range(2):  # the second time there is nothing to do
        ended = subprocess.run(
            [sys.executable, "-m", "benchmarks.language_model", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert ended.returncode == 0, ended.stderr
    lines = (tmp_path / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    records = list(map(json.loads, lines))
    # Two settings are tried of each, the better one is reported.
    assert sorted(r["stage"] for r in records) == ["report"] * 2 + ["tune"] * 4
    for record in records:
        assert record["curve"][0]["updates"] == 0 < record["curve"][-1]["updates"]
        assert record["curve"][-1]["loss"] > 0
    table = (tmp_path / "language_model.md").read_text(encoding="utf-8")
    assert all(f"| {method} | batch" in table for method in methods)
    assert (tmp_path / "language_model.png").stat().st_size > 0


def test_files_are_for_training_or_for_validation():
    train, validation = character_model.standard_library()
    assert len(train) > 5 * len(validation) > 100_000
    X, y = character_model.sequences(train, 3, torch.Generator().manual_seed(0))
    assert X.shape == y.shape == (3, character_model.LENGTH)
    assert torch.equal(X[:, 1:], y[:, :-1])
    assert 0 <= int(train.min()) <= int(train.max()) < character_model.VOCABULARY


def test_no_output_knows_what_follows():
    problem = character_model.problem(0)
    X = problem.X[:2].clone()
    before = problem.model_fn(problem.params, X)
    X[:, 10] = (X[:, 10] + 1) % character_model.VOCABULARY
    after = problem.model_fn(problem.params, X)
    torch.testing.assert_close(after[..., :10], before[..., :10])
    assert not torch.equal(after[..., 10], before[..., 10])


def test_losses_between_two_measurements():
    curve = [
        {"updates": 0, "seconds": 0.0, "loss": 4.0},
        {"updates": 10, "seconds": 2.0, "loss": 2.0},
    ]
    assert language_tables.at({"curve": curve}, "updates", 5) == 3.0
    assert language_tables.at({"curve": curve}, "seconds", 2.0) == 2.0
    assert language_tables.at({"curve": curve}, "updates", 11) == float("inf")
    assert language_tables.spread([1.0, 3.0]) == "2.00 (1.00–3.00)"
    assert language_tables.spread([1.0, float("inf")]) == "–"
