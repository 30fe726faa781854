"""Train on the samples of several processes, launched by torchrun.

``torchrun --nproc-per-node=2 examples/distributed.py`` trains a small net on scikit-learn's digits.
Every process holds a share of each batch, and all make the same steps: those that one process would
make of the whole batch, as ``python examples/distributed.py`` does.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ddnewton import held_out
from ddnewton.optim import DirectionalNewton


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images and labels to train on, and others to test on."""
    images, labels = load_digits(return_X_y=True)
    X, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    train, test = torch.randperm(len(X), generator=torch.Generator().manual_seed(0)).split(1500)
    return X[train], y[train], X[test], y[test]


def shares(samples: int, batch: int, rank: int, size: int) -> Iterator[Tensor]:
    """Yield which samples of every batch are this process's, epoch after epoch, without end.

    All processes draw the same batches. A share is a stretch of the batch, so that all shares, one
    after the other, are the batch as one process has it.
    """
    generator = torch.Generator().manual_seed(1)
    while True:
        for whole in torch.randperm(samples, generator=generator).split(batch):
            yield whole.tensor_split(size)[rank]


def main(steps: int = 30, batch: int = 256, checkpoint: Path | None = None) -> list[float]:
    """Train the net, return the loss before every step, and leave a checkpoint of the result."""
    # The processes, if there are several: torchrun tells each of them which it is.
    launched = "RANK" in os.environ
    if launched:
        dist.init_process_group("gloo")  # "nccl" where every process has a GPU
    group = dist.group.WORLD if launched else None
    rank, size = (dist.get_rank(), dist.get_world_size()) if launched else (0, 1)
    # The same net everywhere, by the same seed.
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))
    optimizer = DirectionalNewton(net, nn.CrossEntropyLoss(), held_out(), process_group=group)
    X, y, X_test, y_test = digits()
    # Every process passes its own samples; what comes back is the loss of the whole batch.
    losses = []
    for step, share in zip(range(steps), shares(len(X), batch, rank, size), strict=False):
        losses.append(float(optimizer.step(X[share], y[share])))
        if rank == 0 and (step + 1) % 10 == 0:
            print(f"step {step + 1}: loss {losses[-1]:.4f}", flush=True)
    # All have the same parameters, to the bit: one of them tests and saves.
    if rank == 0:
        accuracy = (net(X_test).argmax(1) == y_test).double().mean()
        print(f"{size} process{'es' * (size > 1)}: accuracy {accuracy:.1%}", flush=True)
        if checkpoint is not None:
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, checkpoint)
    if launched:
        dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--checkpoint", type=Path, help="a file for the net and the optimizer")
    options = parser.parse_args()
    main(options.steps, checkpoint=options.checkpoint)
