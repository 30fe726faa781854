"""Train a transformer of Hugging Face: what it is called with, and what its output is.

``python examples/hugging_face.py`` trains a small GPT-2 to say which of two words a sentence has
more of. Its weights are random, and nothing is downloaded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2ForSequenceClassification

from ddnewton import held_out, monte_carlo
from ddnewton.optim import DirectionalNewton

WORDS, LENGTH = 12, 10
PADDING, ONE, OTHER = 0, 1, 2


def sentences(count: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Return sentences of several lengths, and whether they have more of one word or the other."""
    ids = torch.randint(ONE, WORDS, (count, LENGTH), generator=generator)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (count, 1), generator=generator)
    mask = torch.arange(LENGTH) < lengths
    ids = torch.where(mask, ids, PADDING)
    # The first word decides where there are as many of both.
    ids[:, 0] = torch.randint(ONE, OTHER + 1, (count,), generator=generator)
    more = (ids == ONE).sum(1) - (ids == OTHER).sum(1)
    labels = torch.where(more == 0, ids[:, 0] == ONE, more > 0)
    # Everything that depends on the sample is an argument, with the samples on axis 0.
    positions = torch.arange(LENGTH).expand(count, -1)
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "position_ids": positions,
    }, labels.long()


def net() -> nn.Module:
    """Return a small GPT-2 for two classes, from random weights."""
    config = GPT2Config(
        vocab_size=WORDS,
        n_positions=LENGTH,
        n_embd=16,
        n_layer=2,
        n_head=2,
        num_labels=2,
        pad_token_id=PADDING,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        attn_implementation="eager",  # the others look at the masks' values, and cannot be traced
    )
    return GPT2ForSequenceClassification(config).eval()  # without dropout


def logits(module: nn.Module, X: dict[str, Tensor]) -> Tensor:
    """Return the outputs of a net: one tensor, of the arguments that it takes."""
    outputs: Tensor = module(**X).logits
    return outputs


def main(steps: int = 60, batch: int = 64) -> dict[str, list[float]]:
    """Train the net, and return its losses and its accuracies on sentences it has not seen."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    module = net()
    criterion = monte_carlo(nn.CrossEntropyLoss(), 1, generator)
    optimizer = DirectionalNewton(module, criterion, held_out(), forward=logits)
    X, y = sentences(500, generator)
    losses, accuracies = [], []
    for step in range(1, steps + 1):
        losses.append(float(optimizer.step(*sentences(batch, generator))))
        if step % 10 == 0 or step == steps:
            with torch.no_grad():
                accuracies.append(float((logits(module, X).argmax(1) == y).float().mean()))
            print(f"step {step}: loss {losses[-1]:.3f}, accuracy {accuracies[-1]:.0%}")
    return {"loss": losses, "accuracy": accuracies}


if __name__ == "__main__":
    main()
