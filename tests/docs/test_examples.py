"""The examples run, and what they train learns."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


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


# Lightning's own: advice on workers and on short epochs, and names that torch has replaced.
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning")
def test_lightning_module(capsys):
    pytest.importorskip("lightning")
    import lightning_module

    found = lightning_module.main(steps=20)
    assert len(found["loss"]) == 20
    assert sum(found["loss"][-5:]) < 0.3 * sum(found["loss"][:5])
    assert found["accuracy"] > 0.9
    assert "accuracy 9" in capsys.readouterr().out
