"""Train a transformer of Hugging Face: how to pass its arguments, and take its logits.

``python examples/hugging_face.py`` trains a small GPT-2 to say which of two words is more frequent
in a sentence. Its first weights are random, and nothing is downloaded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2ForSequenceClassification

from ddnewton import held_out, monte_carlo
from ddnewton.optim import DirectionalNewton

WORDS, LENGTH = 12, 10
PADDING, FIRST_WORD, SECOND_WORD = 0, 1, 2


def sentences(count: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Return sentences of several lengths and labels: 1 if the first word is more frequent."""
    # Random words, and padding at the end.
    ids = torch.randint(FIRST_WORD, WORDS, (count, LENGTH), generator=generator)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (count, 1), generator=generator)
    mask = torch.arange(LENGTH) < lengths
    ids = torch.where(mask, ids, PADDING)
    # The sentence begins with one of the two words, which decides where both are as frequent.
    ids[:, 0] = torch.randint(FIRST_WORD, SECOND_WORD + 1, (count,), generator=generator)
    difference = (ids == FIRST_WORD).sum(1) - (ids == SECOND_WORD).sum(1)
    labels = torch.where(difference == 0, ids[:, 0] == FIRST_WORD, difference > 0)
    # Everything that depends on the sample is an argument, with the samples on axis 0.
    positions = torch.arange(LENGTH).expand(count, -1)
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "position_ids": positions,
    }, labels.long()


def net() -> nn.Module:
    """Return a small GPT-2 for two classes, with random weights."""
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
    )
    return GPT2ForSequenceClassification(config).eval()  # without dropout


def logits(module: nn.Module, X: dict[str, Tensor]) -> Tensor:
    """Call the net with its keyword arguments, and return one tensor of its outputs."""
    outputs: Tensor = module(**X).logits
    return outputs


def main(steps: int = 60, batch: int = 64) -> dict[str, list[float]]:
    """Train the net, and return its losses and its accuracies on sentences it has not seen."""
    # The net, and an optimizer that samples labels for the curvature.
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    module = net()
    criterion = monte_carlo(nn.CrossEntropyLoss(), 1, generator)
    optimizer = DirectionalNewton(module, criterion, held_out(), forward=logits)
    # Every step draws new sentences; the accuracy is that on 500 which no step is made of.
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
