"""The data of the training benchmark: what a package brings or a generator draws, no downloads."""

from __future__ import annotations

import gzip
import logging
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FOLDERS = ("/usr/share/datasets/fashion-mnist", f"{sys.prefix}/share/datasets/fashion-mnist")
"""Where the package ``dataset-fashion-mnist`` puts its files; ``FASHION_MNIST`` names another."""

log = logging.getLogger(__name__)


class Split(NamedTuple):
    """Inputs and targets: to train on, to choose settings by, and to report."""

    train: tuple[Any, Tensor]
    valid: tuple[Any, Tensor]
    test: tuple[Any, Tensor]


def split(X: Tensor, y: Tensor, sizes: tuple[int, int, int], seed: int) -> Split:
    """Return disjoint parts of the given sizes, drawn by the seed."""
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))
    parts = order[: sum(sizes)].split(sizes)
    return Split(*((X[part], y[part]) for part in parts))


def standard(y: Tensor) -> Tensor:
    """Return the columns shifted and scaled to mean 0 and variance 1."""
    return (y - y.mean(0)) / y.std(0)


def teacher(net: nn.Module, seed: int) -> Split:
    """Return standardised outputs of a net with weights of twice the usual size, in float64."""
    torch.manual_seed(seed)
    X = torch.randn(1500, net[0].in_features, dtype=torch.float64)
    with torch.no_grad():
        for p in net.double().parameters():
            p.mul_(2)
        y = standard(net(X))
    return split(X, y, (500, 500, 500), seed)


def diabetes(seed: int) -> Split:
    """Return scikit-learn's 442 patients: ten measurements and the disease's course, float64."""
    from sklearn.datasets import load_diabetes  # noqa: PLC0415  # no other task needs it

    X, y = (torch.tensor(part, dtype=torch.float64) for part in load_diabetes(return_X_y=True))
    return split(standard(X), standard(y[:, None]), (300, 71, 71), seed)


@lru_cache(1)
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits  # noqa: PLC0415  # as above

    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)


def digits(seed: int) -> Split:
    """Return scikit-learn's 1,797 images of 8 × 8 pixels from 0 to 1."""
    return split(*_digits(), (1280, 160, 357), seed)


def fashion_folder() -> Path | None:
    """Return the folder with the Fashion-MNIST files, if there is one."""
    folders = [os.environ.get("FASHION_MNIST"), *FOLDERS]
    paths = (Path(folder) for folder in folders if folder)
    return next((path for path in paths if (path / "train-images-idx3-ubyte.gz").exists()), None)


@lru_cache(1)
def _fashion() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images in [N, 1, 28, 28] and labels, then those for testing."""
    folder = fashion_folder()
    if folder is None:
        log.warning("no Fashion-MNIST in %s: enlarged digits in its place", ", ".join(FOLDERS))
        X, y = _digits()
        X = F.interpolate(X.view(-1, 1, 8, 8), size=28, mode="bilinear")
        order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
        return X[order[:1397]], y[order[:1397]], X[order[1397:]], y[order[1397:]]
    # Four files, each a header and then bytes.
    arrays = []
    for part in ("train", "t10k"):
        for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
            content = gzip.decompress((folder / f"{part}-{kind}-ubyte.gz").read_bytes())
            arrays.append(torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).copy()))
    X, y, X_test, y_test = arrays
    return _images(X), y.long(), _images(X_test), y_test.long()


def _images(pixels: Tensor) -> Tensor:
    return pixels.view(-1, 1, 28, 28).float() / 255


def fashion(seed: int, *, flat: bool, test: int = 10000) -> Split:
    """Return images of clothes: a tenth for validation, the first few of those for testing."""
    X, y, X_test, y_test = _fashion()
    if flat:
        X, X_test = X.flatten(1), X_test.flatten(1)
    valid = len(X) // 10
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))
    held = order[: min(valid, test)]
    return Split(
        (X[order[valid:]], y[order[valid:]]), (X[held], y[held]), (X_test[:test], y_test[:test])
    )
