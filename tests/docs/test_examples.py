"""The examples run, and what they train learns."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


def test_hugging_face(capsys):
    pytest.importorskip("transformers")
    import hugging_face

    found = hugging_face.main(steps=20)
    assert len(found["loss"]) == 20
    assert sum(found["loss"][-5:]) < 0.5 * sum(found["loss"][:5])
    assert found["accuracy"][-1] > 0.85
    assert "step 20: loss" in capsys.readouterr().out


def test_sentences_are_labelled_by_what_is_in_them():
    pytest.importorskip("transformers")
    import hugging_face

    X, y = hugging_face.sentences(400, torch.Generator().manual_seed(1))
    assert 0.4 < y.double().mean() < 0.6
    for ids, mask, label in zip(X["input_ids"], X["attention_mask"], y, strict=True):
        words = ids[mask.bool()].tolist()
        one, other = words.count(1), words.count(2)
        assert label == (one > other if one != other else words[0] == 1)
        assert (ids[mask == 0] == 0).all()


def test_distributed(tmp_path):
    pytest.importorskip("sklearn")
    import distributed

    # By two processes, as the page on them says.
    checkpoint = tmp_path / "checkpoint.pt"
    launched = ("-m", "torch.distributed.run", "--nproc-per-node=2")
    rendezvous = ("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")
    file, options = str(EXAMPLES / "distributed.py"), ("--steps", "10", "--checkpoint", checkpoint)
    ended = subprocess.run(
        [sys.executable, *launched, *rendezvous, file, *options],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    (printed,) = re.findall(r"step 10: loss (\S+)", ended.stdout)
    assert ended.stdout.count("2 processes: accuracy 9") == 1
    # By one, from the beginning, and going on from what two have left.
    losses = distributed.main(10)
    assert losses[-1] < 0.2 * losses[0]
    assert float(printed) == pytest.approx(losses[-1], abs=1e-4)
    saved = torch.load(checkpoint)
    assert saved["net"]["0.weight"].shape == (32, 64)
    assert saved["optimizer"]["state"]
