"""A small GPT on characters of Python's standard library, whose sources are on every machine."""

from __future__ import annotations

import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.nets import Attention
from benchmarks.problem import Problem

LENGTH, WIDTH, HEADS, BLOCKS = 64, 64, 4, 2
"""How many characters a sequence has, and how large the net is."""

CHARACTERS = "\t\n" + "".join(map(chr, range(32, 127)))
VOCABULARY = len(CHARACTERS) + 1
"""Tab, newline and printable ASCII; all others are one more."""

EVERY, VALIDATION_SEQUENCES = 10, 256
"""Every which file is for validation, and how many of its sequences are looked at."""


class Text(NamedTuple):
    """Files to train on, one after another, and others, as numbers of characters."""

    train: Tensor
    validation: Tensor


@lru_cache
def standard_library() -> Text:
    """Return the modules of the standard library, split by file in the order of their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    numbers = torch.full((256,), VOCABULARY - 1)
    numbers[torch.tensor([ord(character) for character in CHARACTERS])] = torch.arange(
        VOCABULARY - 1
    )
    files = [
        numbers[torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()]
        for path in sorted(folder.glob("*.py"))
        if path.stat().st_size
    ]
    unseen = files[::EVERY]
    seen = [file for number, file in enumerate(files) if number % EVERY]
    return Text(torch.cat(seen), torch.cat(unseen))


def sequences(text: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return random sequences [N, T], and the characters that follow every one of theirs."""
    starts = torch.randint(len(text) - LENGTH, (count, 1), generator=generator)
    windows = text[starts + torch.arange(LENGTH + 1)]
    return windows[:, :-1], windows[:, 1:]


def validation() -> tuple[Tensor, Tensor]:
    """Return the sequences that all losses are reported of."""
    generator = torch.Generator().manual_seed(0)
    return sequences(standard_library().validation, VALIDATION_SEQUENCES, generator)


class CharacterModel(nn.Module):
    """Pre-norm blocks of causal attention between an embedding and a linear head."""

    def __init__(self, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.blocks = nn.Sequential(*(Attention(WIDTH, HEADS, causal=True) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)
        # As is usual for a GPT: small embeddings, so that the first loss is log C.
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, X: Tensor) -> Tensor:
        """Return the logits [N, C, T] of the next characters, classes first as losses want."""
        return self.head(self.norm(self.blocks(self.embed(X) + self.positions))).mT


def problem(seed: int) -> Problem:
    """Return the net as drawn by a seed, with the validation sequences as its batch."""
    torch.manual_seed(seed)
    net = CharacterModel()
    params = {name: p.detach().clone() for name, p in net.named_parameters()}
    X, y = validation()

    def model_fn(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return functional_call(net, params, (X,))

    return Problem(model_fn, params, X, y, F.cross_entropy)
