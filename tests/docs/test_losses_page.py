"""The tables of torch's losses on their page: every loss, its options, and what becomes of it."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddnewton import clipped, empirical_fisher, majorized, newton_step, with_curvature
from ddnewton.criteria.torch_losses import TORCH_LOSSES

PAGE = Path(__file__).parents[2] / "docs" / "losses.md"

WRAPPERS = {
    "nn": nn,
    "clipped": clipped,
    "empirical_fisher": empirical_fisher,
    "majorized": majorized,
    "with_curvature": with_curvature,
}
"""What the page's code is written with, besides ``loss``."""


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without the table's own two first lines."""
    section = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def code(cell: str) -> list[str]:
    return re.findall("`(.*?)`", cell)


CLOSED = {code(row[0])[0]: row for row in rows("Torch's losses in closed form")}
OTHERS = {code(row[0])[0]: row for row in rows("Torch's other losses")}


def test_every_loss_of_torch_is_on_the_page_once():
    named = [name for name in dir(nn) if name.endswith("Loss")]
    assert sorted([*CLOSED, *OTHERS]) == named


def test_those_in_closed_form_are_the_librarys_with_all_their_options():
    assert list(CLOSED) == [loss.module.__name__ for loss in TORCH_LOSSES]
    for loss, (_, function, options, _) in zip(TORCH_LOSSES, CLOSED.values(), strict=True):
        assert code(function) == [loss.function.__name__]
        assert {"reduction", *code(options)} == loss.function_options
        own = {option for option in code(options) if f"`{option}` (of the function)" not in options}
        assert {"reduction", *own} == loss.module_options


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
REALS, CLASSES, SIGNS = X[:, 1:].cos(), torch.tensor([0, 1, 2, 1, 0, 2]), torch.sign(X[:, :3])
LABELS = torch.tensor([[0, 2, -1], [1, -1, -1]] * 3)


def pairs(loss):
    """Of two columns of the outputs, which is to be larger."""
    return lambda f, y: loss(f[:, 0], f[:, 1], y)


def embeddings(loss):
    """Of the outputs and a part of y, with another part of it."""
    return lambda f, y: loss(f, y[0], y[1])


def sequences(loss):
    """Of three time steps of a blank and two letters, one letter a target."""

    def criterion(f, y):
        log_p = f.reshape(-1, 1, 3).expand(-1, 3, -1).transpose(0, 1).log_softmax(2)
        return loss(log_p, y, torch.full((len(f),), 3), torch.full((len(f),), 1))

    return criterion


CASES = {
    "SoftMarginLoss": (nn.SoftMarginLoss(), SIGNS),
    "MultiLabelSoftMarginLoss": (nn.MultiLabelSoftMarginLoss(), (SIGNS > 0).double()),
    "L1Loss": (nn.L1Loss(), REALS),
    "HingeEmbeddingLoss": (nn.HingeEmbeddingLoss(), SIGNS),
    "MarginRankingLoss": (pairs(nn.MarginRankingLoss(margin=1.0)), SIGNS[:, 0]),
    "KLDivLoss": (nn.KLDivLoss(reduction="batchmean"), REALS.softmax(1)),
    "CosineEmbeddingLoss": (embeddings(nn.CosineEmbeddingLoss()), (REALS, SIGNS[:, 0])),
    "TripletMarginLoss": (embeddings(nn.TripletMarginLoss()), (REALS, REALS.flip(0))),
    "TripletMarginWithDistanceLoss": (
        embeddings(nn.TripletMarginWithDistanceLoss()),
        (REALS, REALS.flip(0)),
    ),
    "MultiMarginLoss": (nn.MultiMarginLoss(), CLASSES),
    "MultiLabelMarginLoss": (nn.MultiLabelMarginLoss(), LABELS),
    "CTCLoss": (sequences(nn.CTCLoss()), CLASSES[:, None].clamp(min=1)),
    "AdaptiveLogSoftmaxWithLoss": (
        nn.AdaptiveLogSoftmaxWithLoss(3, 3, [1], div_value=1.0).double(),
        CLASSES,
    ),
    "LinearCrossEntropyLoss": (nn.LinearCrossEntropyLoss(3, 3).double(), CLASSES),
}
"""Each of the other losses as a function of outputs [N, 3], and its targets."""


def step(criterion, y) -> torch.Tensor:
    W = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    return newton_step(lambda W, X: X @ W, W, X, y, criterion, 0.1)


@pytest.mark.parametrize("name", OTHERS)
def test_what_becomes_of_a_loss_is_what_the_page_says(name):
    _, verdict, remedies = OTHERS[name]
    loss, y = CASES[name]
    if verdict == "taken":
        assert step(loss, y).isfinite().all()
        assert not remedies
        return
    (reason,) = re.findall('^refused: "(.*)"$', verdict)
    with pytest.raises(ValueError, match=re.escape(reason)):
        step(loss, y)
    for expression in code(remedies):
        criterion = eval(expression, WRAPPERS | {"loss": loss})
        assert step(criterion, y).isfinite().all()


def test_the_gradient_of_cross_entropy_is_that_of_the_divergence_of_log_probabilities():
    W, y = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3), REALS.softmax(1)
    divergence = partial(F.kl_div, reduction="batchmean")
    found, expected = (
        torch.func.grad(lambda W, loss=loss: loss(X @ W, y))(W)
        for loss in (F.cross_entropy, lambda f, y: divergence(f.log_softmax(1), y))
    )
    assert torch.allclose(found, expected, atol=1e-12)
