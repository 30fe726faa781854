"""Train with the Trainer of Hugging Face: a subclass that hands the batch to the optimizer.

``python examples/hugging_face_trainer.py`` trains the small GPT-2 of ``hugging_face.py``. It writes
checkpoints into the folder ``trainer_runs``; with ``--resume`` it goes on from the last of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hugging_face import logits, net, sentences
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from ddnewton import held_out, monte_carlo
from ddnewton.optim import DirectionalNewton


class BatchInHand(DirectionalNewton):
    """An optimizer that is given its batch before the loop calls ``step()``."""

    batch: tuple[dict[str, Tensor], Tensor]

    def step(self, closure: Callable[[], Any] | None = None) -> Tensor:  # type: ignore[override]
        """Make the step on the batch in hand."""
        return super().step(*self.batch)


class NewtonTrainer(Trainer):
    """A Trainer without a backward pass: its loop, callbacks, logs and checkpoints as they are."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimizer, whose batch comes from `training_step`."""
        # What is done to gradients, or by several processes to each other's, has no place here.
        args = self.args
        for name, value, allowed in (
            ("gradient_accumulation_steps", args.gradient_accumulation_steps, 1),
            ("max_grad_norm", args.max_grad_norm, 0),
            ("label_smoothing_factor", args.label_smoothing_factor, 0),
            ("fp16", args.fp16, False),
            ("the number of processes", args.world_size, 1),
            ("the number of GPUs", max(args.n_gpu, 1), 1),
        ):
            if value != allowed:
                raise ValueError(f"NewtonTrainer: {name} must be {allowed}; got {value}.")
        # The curvature is that of one drawn label for every sentence.
        criterion = monte_carlo(
            nn.CrossEntropyLoss(), 1, torch.Generator(args.device).manual_seed(args.seed)
        )
        self.optimizer = BatchInHand(
            self.model,
            criterion,
            held_out(),
            lr=args.learning_rate,
            weight_decay=args.weight_decay,
            complement="damping",
            forward=logits,
        )
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Put the batch in the optimizer's hand, and return the loss before the step."""
        model.eval()  # without dropout
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss = self.compute_loss(model, inputs)
        X = {name: value for name, value in inputs.items() if name != "labels"}
        self._newton().batch = X, inputs["labels"]
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what the last step did beside the loss."""
        info = self._newton().info if "grad_norm" in logs else None
        if info is not None:
            logs |= {
                "grad_norm": float(info.gradient_norm),
                "damping": float(info.damping),
                "predicted_decrease": float(info.predicted_decrease),
                "decrease": float(info.loss - info.loss_after),
            }
        super().log(logs, start_time)

    def _newton(self) -> BatchInHand:
        """Return the optimizer, which accelerate wraps."""
        newton: BatchInHand = getattr(self.optimizer, "optimizer", self.optimizer)
        return newton


class Sentences(Dataset):
    """Sentences as samples: dicts of what the net is called with, and of the label."""

    def __init__(self, count: int, seed: int) -> None:
        self.X, self.y = sentences(count, torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.y)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one of them."""
        return {name: value[index] for name, value in self.X.items()} | {"labels": self.y[index]}


def accuracy(predictions: Any) -> dict[str, float]:
    """Return the accuracy of predicted logits."""
    return {"accuracy": float((predictions.predictions.argmax(1) == predictions.label_ids).mean())}


def main(
    folder: str | Path = "trainer_runs",
    epochs: int = 6,
    resume: str | bool | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> Trainer:
    """Train the net, from a checkpoint if there is one, and return the trainer."""
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        learning_rate=1.0,  # the default, 5e-5, is one for Adam
        lr_scheduler_type="cosine",
        max_grad_norm=0.0,  # nothing is clipped
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_steps=5,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = NewtonTrainer(
        model=net(),
        args=arguments,
        train_dataset=Sentences(640, seed=0),
        eval_dataset=Sentences(500, seed=1),
        compute_metrics=accuracy,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="trainer_runs", help="where checkpoints go")
    parser.add_argument("--epochs", type=int, default=6, help="passes over the sentences, in all")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    main(**vars(parser.parse_args()))
