"""The nets of the benchmarks, built from torch's own layers; no weights, no downloads."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return linear layers with an activation between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def small_convolution() -> nn.Sequential:
    """Return a convolutional net of a few hundred parameters, on 8×8 images in three classes."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


def net_2c2d() -> nn.Sequential:
    """Return DeepOBS's 2c2d, on 28×28 images in ten classes."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        *mlp(3136, 1024, 10),
    )


def net_3c3d() -> nn.Sequential:
    """Return DeepOBS's 3c3d, on 32×32 images in ten classes, its pools padded on both sides."""
    layers: list[nn.Module] = []
    for inputs, outputs, kernel, padding in ((3, 64, 5, 0), (64, 96, 3, 0), (96, 128, 3, 1)):
        layers += [nn.Conv2d(inputs, outputs, kernel, padding=padding), nn.ReLU()]
        layers += [nn.MaxPool2d(3, stride=2, padding=1)]
    return nn.Sequential(*layers, nn.Flatten(), *mlp(1152, 512, 256, 10))


def all_cnn_c() -> nn.Sequential:
    """Return DeepOBS's All-CNN-C, on 32×32 images in a hundred classes, without dropout."""
    layers: list[nn.Module] = []
    for inputs, outputs, kernel, stride, padding in (
        (3, 96, 3, 1, 1),
        (96, 96, 3, 1, 1),
        (96, 96, 3, 2, 1),
        (96, 192, 3, 1, 1),
        (192, 192, 3, 1, 1),
        (192, 192, 3, 2, 1),
        (192, 192, 3, 1, 0),
        (192, 192, 1, 1, 0),
        (192, 100, 1, 1, 0),
    ):
        layers += [nn.Conv2d(inputs, outputs, kernel, stride, padding), nn.ReLU()]
    return nn.Sequential(*layers, nn.AvgPool2d(6), nn.Flatten())


class Residual(nn.Module):
    """Two convolutions with batch normalisation, and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, X: Tensor) -> Tensor:
        """Return the rectified sum of both ways."""
        return F.relu(self.branch(X) + self.shortcut(X))


def resnet20() -> nn.Sequential:
    """Return the ResNet-20 of CIFAR-10, its batch normalisation with drawn statistics."""
    widths = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)
    blocks = [
        Residual(inputs, outputs, 1 + (inputs < outputs)) for inputs, outputs in pairwise(widths)
    ]
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        *blocks,
        nn.AvgPool2d(8),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return net


class Attention(nn.Module):
    """A pre-norm transformer block; attention looks back only where it is causal."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = mlp(width, 4 * width, width, activation=nn.GELU)

    def forward(self, X: Tensor) -> Tensor:
        """Return the block's outputs [N, tokens, width]."""
        query, key, value = self.qkv(self.norm(X)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        mixed = F.scaled_dot_product_attention(
            query.transpose(-3, -2),
            key.transpose(-3, -2),
            value.transpose(-3, -2),
            is_causal=self.causal,
        )
        X = X + self.out(mixed.transpose(-3, -2).flatten(-2))
        return X + self.mlp(self.norm_mlp(X))


class Transformer(nn.Module):
    """Tokens with learned positions, blocks, and a linear head on one vector a sample."""

    def __init__(self, embed: nn.Module, tokens: int, width: int, outputs: int, *, causal: bool):
        super().__init__()
        self.embed, self.causal = embed, causal
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks = nn.Sequential(*(Attention(width, 4, causal=causal) for _ in range(4)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, X: Tensor) -> Tensor:
        """Return the outputs [N, C]: of the last token where causal, else of the mean."""
        hidden = self.norm(self.blocks(self.embed(X) + self.positions))
        return self.head(hidden[:, -1] if self.causal else hidden.mean(1))


class Patches(nn.Module):
    """Cut an image into patches and embed each of them."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, width, size, size)

    def forward(self, X: Tensor) -> Tensor:
        """Return the patches [N, tokens, width]."""
        return self.project(X).flatten(2).transpose(1, 2)


def vision_transformer() -> Transformer:
    """Return a vision transformer on 32×32 images: 64 patches, width 96, four blocks."""
    return Transformer(Patches(4, 96), 64, 96, 10, causal=False)


def character_gpt() -> Transformer:
    """Return a character GPT that predicts the one after 64: width 128, four blocks."""
    return Transformer(nn.Embedding(64, 128), 64, 128, 64, causal=True)


class LanguageModel(Transformer):
    """A transformer whose outputs are of every token, classes before positions as losses want."""

    def forward(self, X: Tensor) -> Tensor:
        """Return the outputs [N, C, tokens]."""
        hidden = self.norm(self.blocks(self.embed(X) + self.positions))
        return self.head(hidden).mT


def language_model(vocabulary: int, tokens: int = 64, width: int = 64) -> LanguageModel:
    """Return a GPT that predicts the one after every token: four blocks of four heads."""
    embed = nn.Embedding(vocabulary, width)
    return LanguageModel(embed, tokens, width, vocabulary, causal=True)


class Residuals(nn.Module):
    """A net and, of a function of it as `benchmarks.recipes` has them, the values at its points."""

    def __init__(
        self, net: nn.Module, function: Callable[[nn.Module], Callable[..., Tensor]]
    ) -> None:
        super().__init__()
        self.net, self.function = net, function(net)

    def forward(self, X: Tensor) -> Tensor:
        """Return the function's values [N]."""
        return self.function(dict(self.net.named_parameters()), X)
