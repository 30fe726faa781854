"""The examples of other tools run, go on from what they saved, and stand on their pages."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ddnewton import diagnostics
from tests.docs.test_examples import EXAMPLES

PAGES = Path(__file__).parents[2] / "docs/tools"

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def same_state(one, two):
    """Whether two optimizers have the same state and draw the same numbers."""
    one, two = one.state_dict(), two.state_dict()
    assert one["state"].keys() == two["state"].keys()
    for index, entries in one["state"].items():
        torch.testing.assert_close(entries, two["state"][index], rtol=0, atol=0)
    return torch.equal(one["generator"], two["generator"])


# Lightning's own: advice on workers and on folders, and names that torch has replaced.
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning")
def test_lightning_goes_on_from_a_checkpoint(tmp_path, capsys):
    pytest.importorskip("lightning")
    import lightning_module

    whole = lightning_module.main(tmp_path / "whole", epochs=2)
    assert len(whole["loss"]) == 22
    assert sum(whole["loss"][-5:]) < 0.2 * sum(whole["loss"][:5])
    assert whole["accuracy"] > 0.88
    assert "accuracy 9" in capsys.readouterr().out
    # The second epoch again, from what the first one left, with other random numbers around it.
    saved = tmp_path / "whole/checkpoints/epoch=0-step=11.ckpt"
    torch.rand(1)
    again = lightning_module.main(tmp_path / "again", epochs=2, resume=saved)
    assert again["loss"] == whole["loss"][11:]
    first, second = again["module"], whole["module"]
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    assert same_state(first.optimizers().optimizer, second.optimizers().optimizer)
    # The log has what every step did.
    names, *rows = (tmp_path / "whole/metrics.csv").read_text().splitlines()
    logged = [dict(zip(names.split(","), row.split(","), strict=True)) for row in rows]
    steps = [row for row in logged if row["loss"]]
    assert [float(row["loss"]) for row in steps] == pytest.approx(whole["loss"], rel=1e-6)
    state = second.optimizers().optimizer.info
    assert float(steps[-1]["damping"]) == pytest.approx(float(state.damping), rel=1e-6)
    kept = float(state.loss - state.loss_after)
    assert float(steps[-1]["decrease"]) == pytest.approx(kept, rel=1e-6)


def test_lightning_trains_in_two_processes(tmp_path):
    pytest.importorskip("lightning")
    # Each process is refused by the others, from the second step on, where its net is another.
    options = ("--devices=2", "--epochs=1", f"--folder={tmp_path}")
    ended = subprocess.run(
        [sys.executable, str(EXAMPLES / "lightning_module.py"), *options],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    assert "Starting with 2 processes" in ended.stderr
    ((before, after),) = re.findall(r"loss (\S+) -> (\S+)", ended.stdout)
    assert float(after) < 0.3 * float(before)


def test_trainer_goes_on_from_a_checkpoint(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    import hugging_face_trainer
    from transformers import TrainerCallback

    class Counted(TrainerCallback):
        steps, checkpoints, gradients = 0, 0, 0

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            self.gradients += sum(p.grad is not None for p in kwargs["model"].parameters())

        def on_step_end(self, args, state, control, **kwargs):
            self.steps += 1

        def on_save(self, args, state, control, **kwargs):
            self.checkpoints += 1

    counted = Counted()
    whole = hugging_face_trainer.main(tmp_path / "whole", epochs=2, callbacks=[counted])
    assert (counted.steps, counted.checkpoints, counted.gradients) == (20, 2, 0)
    # Losses, and what steps did, every five steps; the accuracy after every epoch.
    logged = [line for line in whole.state.log_history if "loss" in line]
    assert [line["step"] for line in logged] == [5, 10, 15, 20]
    assert logged[-1]["loss"] < 0.3 * logged[0]["loss"]
    info = whole.optimizer.optimizer.info
    assert logged[-1]["damping"] == float(info.damping)
    assert logged[-1]["decrease"] == float(info.loss - info.loss_after)
    assert logged[-1]["grad_norm"] == float(info.gradient_norm)
    assert whole.evaluate()["eval_accuracy"] > 0.9
    # The second epoch again, from what the first one left.
    torch.rand(1)
    saved = str(tmp_path / "whole/checkpoint-10")
    again = hugging_face_trainer.main(tmp_path / "again", epochs=2, resume=saved)
    assert [line for line in again.state.log_history if "loss" in line] == logged
    states = again.model.state_dict(), whole.model.state_dict()
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert same_state(again.optimizer.optimizer, whole.optimizer.optimizer)


REFUSED = {
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "max_grad_norm": {"max_grad_norm": 1.0},
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},
    "fp16": {"fp16": True},
    "the number of processes": {"world_size": 2},
    "the number of GPUs": {"n_gpu": 2},
}


@pytest.mark.parametrize("name", REFUSED)
def test_trainer_refuses_what_is_for_gradients(name):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    import hugging_face_trainer

    allowed = {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0, "fp16": False}
    allowed |= {"label_smoothing_factor": 0.0, "world_size": 1, "n_gpu": 0}
    trainer = SimpleNamespace(args=SimpleNamespace(**allowed | REFUSED[name]))
    with pytest.raises(ValueError, match=rf"NewtonTrainer: {name} must be \w+; got \S+\."):
        hugging_face_trainer.NewtonTrainer.create_optimizer(trainer)


def test_tensorboard_and_lines_have_what_the_run_told(tmp_path):
    pytest.importorskip("tensorboard")
    import tensorboard_log
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    infos = tensorboard_log.main(tmp_path, updates=6, every=3)
    kept = [float(info.loss - info.loss_after) for info in infos]
    of_terms = {name: [float(info.losses[name]) for info in infos] for name in infos[0].losses}
    # The lines, whose numbers are exact.
    lines = diagnostics.read(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "loss_after", "damping", "predicted_decrease"):
        assert [line[name] for line in lines] == [float(getattr(info, name)) for info in infos]
    assert list(of_terms) == ["inside", "ends", "data"]
    for name, losses in of_terms.items():
        assert [line["losses"][name] for line in lines] == losses
    assert ["directions" in line for line in lines] == [False, False, True] * 2
    # TensorBoard's, which are float32.
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    events.Reload()
    told = {
        "loss/all": [float(info.loss) for info in infos],
        "damping": [float(info.damping) for info in infos],
        "decrease/predicted": [float(info.predicted_decrease) for info in infos],
        "decrease/kept": kept,
        "seconds": [line["seconds"] for line in lines],
    } | {f"loss/{name}": losses for name, losses in of_terms.items()}
    assert set(events.Tags()["scalars"]) == set(told)
    for name, values in told.items():
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == [1, 2, 3, 4, 5, 6]
        assert [scalar.value for scalar in scalars] == pytest.approx(values, rel=1e-6)
    # The spectrum, in both.
    histograms = events.Histograms("spectrum/log10")
    assert [histogram.step for histogram in histograms] == [3, 6]
    for histogram in histograms:
        (directions,) = diagnostics.summaries(lines[histogram.step - 1])
        evals = directions.evals[-int(directions.rank) :].log10()
        assert histogram.histogram_value.num == len(evals) > 10
        assert histogram.histogram_value.max == pytest.approx(float(evals[-1]))
        assert histogram.histogram_value.min == pytest.approx(float(evals[0]))
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


QUOTED = {
    "lightning.md": "lightning_module.py",
    "hugging_face.md": "hugging_face_trainer.py",
}


@pytest.mark.parametrize("page", QUOTED)
def test_pages_quote_their_examples(page):
    blocks = BLOCK.findall((PAGES / page).read_text())
    sources = [(EXAMPLES / name).read_text() for name in (QUOTED[page], "hugging_face.py")]
    assert blocks
    for block in blocks:
        # As it stands in the file, or a method moved to the left.
        shown = block, textwrap.indent(block, "    ")
        assert any(text in source for text in shown for source in sources), block
