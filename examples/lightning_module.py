"""Train a LightningModule: manual optimisation, a scheduler, logs, checkpoints, and going on.

``python examples/lightning_module.py`` trains a small net on scikit-learn's digits. After every
epoch it writes a checkpoint into the folder ``lightning_runs``, and
``python examples/lightning_module.py --resume lightning_runs/checkpoints/epoch=2-step=33.ckpt``
goes on from one of them. ``--devices 2`` trains in two processes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset, random_split

from ddnewton import held_out, monte_carlo
from ddnewton.optim import DirectionalNewton

BATCH = 128


class Digits(lightning.LightningModule):
    """A net that has no backward pass: the optimizer asks for the batch instead."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        layers = nn.Linear(64, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Linear(32, 10)
        self.net = nn.Sequential(*layers)
        self.images = digits()
        self.losses: list[float] = []

    def forward(self, X: Tensor) -> Tensor:
        """Return the logits."""
        outputs: Tensor = self.net(X)
        return outputs

    def on_train_start(self) -> None:
        """Put the net in eval mode, in which no layer mixes samples or drops units at random."""
        self.eval()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Take a step on a batch, log what it did, and take a step of the scheduler."""
        X, y = batch
        optimizer = self.optimizers()
        loss = optimizer.step(X=X, y=y)
        self.losses.append(float(loss))
        info = optimizer.optimizer.info
        told = {
            "loss": loss,
            "damping": info.damping,
            "predicted_decrease": info.predicted_decrease,
            "decrease": info.loss - info.loss_after,
        }
        self.log_dict({name: value.float() for name, value in told.items()})
        self.lr_schedulers().step()

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the accuracy on a batch."""
        X, y = batch
        self.log("accuracy", (self(X).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer of the net, and a scheduler of its learning rate."""
        generator = torch.Generator(self.device).manual_seed(0)
        criterion = monte_carlo(nn.CrossEntropyLoss(), 1, generator)
        optimizer = DirectionalNewton(
            self.net,
            criterion,
            held_out(),
            lr=0.3,
            complement="damping",
            process_group=dist.group.WORLD if dist.is_initialized() else None,
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, self.trainer.estimated_stepping_batches
        )
        return [optimizer], [schedule]

    def train_dataloader(self) -> DataLoader:
        """Return the training images, in an order that is that of the epoch, for each process."""
        train, _ = self.images
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        order = DistributedSampler(train, ranks, rank, drop_last=True)
        return DataLoader(train, BATCH // ranks, sampler=order, drop_last=True)

    def test_dataloader(self) -> DataLoader:
        """Return the test images."""
        return DataLoader(self.images[1], BATCH)


def digits() -> tuple[Dataset, Dataset]:
    """Return the training and the test images of scikit-learn's digits."""
    X, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(X / 16, dtype=torch.float32), torch.tensor(y))
    train, test = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
    return train, test


def main(
    folder: str | Path = "lightning_runs",
    epochs: int = 6,
    resume: str | Path | None = None,
    devices: int = 1,
) -> dict[str, Any]:
    """Train the net, from a checkpoint if there is one, and return what it has come to."""
    # The net, and a trainer that keeps a checkpoint of every epoch.
    torch.manual_seed(0)
    module = Digits()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=devices,
        max_epochs=epochs,
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=1,
        callbacks=[ModelCheckpoint(Path(folder) / "checkpoints", save_top_k=-1)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Train, and test.
    trainer.fit(module, ckpt_path=resume)
    (results,) = trainer.test(module, verbose=False)
    if trainer.is_global_zero:
        print(f"loss {module.losses[0]:.3f} -> {module.losses[-1]:.3f}")
        print(f"accuracy {results['accuracy']:.1%}")
    return {"module": module, "loss": module.losses, "accuracy": results["accuracy"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="lightning_runs", help="where logs and checkpoints go")
    parser.add_argument("--epochs", type=int, default=6, help="passes over the images, in all")
    parser.add_argument("--resume", help="a checkpoint to go on from")
    parser.add_argument("--devices", type=int, default=1, help="how many processes")
    main(**vars(parser.parse_args()))
