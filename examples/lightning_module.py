"""Train a LightningModule, with manual optimisation and a scheduler for the learning rate.

``python examples/lightning_module.py`` trains a small net on scikit-learn's digits.
"""

from __future__ import annotations

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

from ddnewton import held_out
from ddnewton.optim import DirectionalNewton


class Digits(lightning.LightningModule):
    """A net that has no backward pass: the optimizer asks for the batch instead."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(
            nn.Linear(64, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Linear(32, 10)
        )
        self.criterion = nn.CrossEntropyLoss()
        self.losses: list[float] = []

    def forward(self, X: Tensor) -> Tensor:
        """Return the logits."""
        outputs: Tensor = self.net(X)
        return outputs

    def on_train_start(self) -> None:
        """Put the net in eval mode, in which no layer mixes samples or drops units at random."""
        self.eval()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Take a step on a batch, and a step of the scheduler."""
        X, y = batch
        loss = self.optimizers().step(X=X, y=y)
        self.losses.append(float(loss))
        self.log("loss", loss.float())
        self.lr_schedulers().step()

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the accuracy on a batch."""
        X, y = batch
        self.log("accuracy", (self(X).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer of the net, and a scheduler of its learning rate."""
        optimizer = DirectionalNewton(self.net, self.criterion, held_out(), lr=0.3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, self.trainer.estimated_stepping_batches
        )
        return [optimizer], [schedule]


def digits() -> tuple[Dataset, Dataset]:
    """Return the training and the test images of scikit-learn's digits."""
    X, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(X / 16, dtype=torch.float32), torch.tensor(y))
    train, test = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
    return train, test


def main(steps: int = 60, batch: int = 128) -> dict[str, float | list[float]]:
    """Train the net, and return its losses and its accuracy on the test images."""
    # The net, and a trainer that does nothing but train.
    torch.manual_seed(0)
    train, test = digits()
    module = Digits()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Train, and test.
    trainer.fit(module, DataLoader(train, batch, shuffle=True, drop_last=True))
    (results,) = trainer.test(module, DataLoader(test, batch), verbose=False)
    print(f"loss {module.losses[0]:.3f} -> {module.losses[-1]:.3f}")
    print(f"accuracy {results['accuracy']:.1%}")
    return {"loss": module.losses, "accuracy": results["accuracy"]}


if __name__ == "__main__":
    main()
