"""The problems of which no matrix fits, or none is worth it: nets, seeded batches, losses.

Of every one is asked a product with the Gauss-Newton matrix, steps at dampings relative to its
largest eigenvalue, and leading eigenpairs. ``exact`` says what of this the exact way is asked, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks import nets
from benchmarks.problem import Problem
from benchmarks.recipes import images, poisson_residual

PRODUCT, EIGENPAIRS = "product", "eigenpairs"
COUNT = 10
"""How many leading eigenpairs are asked for."""


class Large(NamedTuple):
    """How a problem is made, and what is asked of it.

    ``data`` draws inputs and targets of so many samples; the peer gets them in ``batches``.
    """

    net: Callable[[], nn.Module]
    data: Callable[[int], tuple[Tensor, Tensor]]
    samples: int
    dampings: tuple[float, ...]
    tol: float = 1e-2
    eigenpairs: bool = True
    exact: tuple[str, ...] = ()
    batches: int = 1
    squares: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def quantities(self) -> list[str]:
        """What is measured."""
        return [
            PRODUCT,
            *map(step_name, self.dampings),
            *([EIGENPAIRS] if self.eigenpairs else []),
        ]


class Instance(NamedTuple):
    """A problem, and the same one as modules' peers want it."""

    problem: Problem
    module: nn.Module
    batches: list[tuple[Tensor, Tensor]]


def step_name(damping: float) -> str:
    """Return the name of a step."""
    return f"step, δ = {damping:g} λ"


def text(vocabulary: int, tokens: int, samples: int) -> tuple[Tensor, Tensor]:
    """Draw sentences, and for every token the one after it."""
    sentences = torch.randint(vocabulary, (samples, tokens + 1))
    return sentences[:, :-1].contiguous(), sentences[:, 1:].contiguous()


def labelled(inputs: Callable[[int], Tensor], classes: int, n: int) -> tuple[Tensor, Tensor]:
    """Draw inputs and labels."""
    return inputs(n), torch.randint(classes, (n,))


def points(samples: int) -> tuple[Tensor, Tensor]:
    """Draw points of the unit square, and zeros that residuals should be."""
    return torch.rand(samples, 2), torch.zeros(samples)


def digits(samples: int) -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 1,797 images of 8 × 8 pixels from 0 to 1, and their digits."""
    from sklearn.datasets import load_digits  # noqa: PLC0415  # no other problem needs it

    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels[:samples], dtype=torch.float32) / 16, torch.tensor(labels[:samples])


def gpt(
    vocabulary: int,
    samples: int,
    dampings: tuple[float, ...] = (0.1, 0.01, 0.001),
    *,
    tokens: int = 64,
    width: int = 64,
) -> Large:
    """Return a language model at all positions."""
    return Large(
        net=partial(nets.language_model, vocabulary, tokens, width),
        data=partial(text, vocabulary, tokens),
        samples=samples,
        dampings=dampings,
    )


def perceptron(samples: int, exact: tuple[str, ...] = ()) -> Large:
    """Return the perceptron of MNIST's size."""
    return Large(
        net=partial(nets.mlp, 784, 512, 256, 10),
        data=partial(labelled, lambda n: torch.randn(n, 784), 10),
        samples=samples,
        dampings=(0.01,),
        tol=1e-6,
        exact=exact,
    )


def pinn(samples: int, width: int = 32, batches: int = 1) -> Large:
    """Return the residuals of Poisson's equation by a net of two hidden layers."""

    def net() -> nn.Module:
        return nets.Residuals(nets.mlp(2, width, width, 1, activation=nn.Tanh), poisson_residual)

    return Large(
        net=net,
        data=points,
        samples=samples,
        dampings=(0.01,),
        exact=(step_name(0.01), EIGENPAIRS),
        batches=batches,
        squares=True,
        dtype=torch.float64,
    )


RECIPES = {
    "GPT, V = 1000, N = 4": gpt(1000, 4),
    "GPT, V = 128, N = 8": gpt(128, 8),
    "MLP, N = 4096": perceptron(4096),
    "MLP, N = 512": perceptron(512, (step_name(0.01), EIGENPAIRS)),
    "digits, N = 1797": Large(
        net=partial(nets.mlp, 64, 32, 10, activation=nn.Tanh),
        data=digits,
        samples=1797,
        dampings=(0.01,),
        exact=(step_name(0.01), EIGENPAIRS),
    ),
    "PINN, N = 1e4": pinn(10_000),
    "PINN, N = 1e5": pinn(100_000, batches=10),
    "All-CNN-C, N = 8": Large(
        net=nets.all_cnn_c,
        data=partial(labelled, images(3, 32), 100),
        samples=8,
        dampings=(0.1,),
        eigenpairs=False,
        exact=(step_name(0.1),),
    ),
    "tiny GPT": gpt(16, 2, (0.1,), tokens=6, width=8),
    "tiny PINN": pinn(60, width=8, batches=2),
}
QUICK = tuple(name for name in RECIPES if name.startswith("tiny"))
FULL = tuple(name for name in RECIPES if name not in QUICK)


def build(recipe: Large, dtype: torch.dtype | None = None) -> Instance:
    """Return a problem, in its own dtype unless told another, of numbers drawn in float32."""
    dtype = dtype or recipe.dtype
    torch.manual_seed(0)
    X, y = recipe.data(recipe.samples)
    net = recipe.net().eval().to(dtype)
    X, y = (part.to(dtype) if part.is_floating_point() else part for part in (X, y))

    def call(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return functional_call(net, params, (X,))

    problem = Problem(
        model_fn=call,
        params={name: p.detach() for name, p in net.named_parameters()},
        X=X,
        y=y,
        criterion=nn.MSELoss() if recipe.squares else nn.CrossEntropyLoss(),
    )
    pairs = zip(X.chunk(recipe.batches), y.chunk(recipe.batches), strict=True)
    return Instance(problem, net, list(pairs))
