"""The problems: nets, batches of seeded random numbers, losses.

Every number is drawn in float32 and then cast, so that a problem is the same in either dtype.
The character GPT predicts the character after its context; all characters of the context at once
have too many columns without Monte-Carlo factors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from benchmarks import nets
from benchmarks.problem import Problem


class Case(NamedTuple):
    """What a step is asked of; ``module`` is None where the model is more than its call."""

    problem: Problem
    damping: float
    module: nn.Module | None


class Recipe(NamedTuple):
    """How a problem is made. ``kind`` says which peers know its layers.

    The damping is a tenth to a hundredth of the largest eigenvalue: one above it would leave
    little but the gradient.
    """

    kind: str
    samples: int
    net: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    classes: int | None = 10  # None: a squared error
    damping: float = 0.1
    function: Callable[[nn.Module], Any] | None = None
    dtype: torch.dtype = torch.float32


def images(channels: int, size: int) -> Callable[[int], Tensor]:
    """Return a function that draws images."""
    return lambda samples: torch.randn(samples, channels, size, size)


def poisson_residual(net: nn.Module) -> Any:
    """Return Δu + π² sin(πx) sin(πy)/2 at every point of the square [N], u zero on its edge."""

    def u(params: dict[str, Tensor], x: Tensor) -> Tensor:
        edge = (x * (1 - x)).prod()
        return edge * functional_call(net, params, (x,))[0]

    def residual(params: dict[str, Tensor], x: Tensor) -> Tensor:
        def slope(x: Tensor) -> Tensor:
            return grad(u, argnums=1)(params, x)

        axes = torch.eye(2, dtype=x.dtype, device=x.device)
        curvature = sum(jvp(slope, (x,), (axis,))[1] @ axis for axis in axes)
        return curvature + torch.pi**2 / 2 * torch.sin(torch.pi * x).prod()

    return vmap(residual, in_dims=(None, 0))


RECIPES = {
    "reference": Recipe("mlp", 4, lambda: nets.mlp(7, 5, 5, 3), lambda n: torch.rand(n, 7), None),
    "tiny-mlp": Recipe("mlp", 6, lambda: nets.mlp(9, 8, 5), lambda n: torch.randn(n, 9), 5),
    "tiny-conv": Recipe("layers", 6, nets.small_convolution, images(2, 8), 3),
    "mlp": Recipe("mlp", 64, lambda: nets.mlp(784, 512, 256, 10), lambda n: torch.randn(n, 784)),
    "2c2d-32": Recipe("layers", 32, nets.net_2c2d, images(1, 28)),
    "2c2d-128": Recipe("layers", 128, nets.net_2c2d, images(1, 28)),
    "3c3d-32": Recipe("layers", 32, nets.net_3c3d, images(3, 32)),
    "3c3d-128": Recipe("layers", 128, nets.net_3c3d, images(3, 32)),
    "allcnnc": Recipe("layers", 8, nets.all_cnn_c, images(3, 32), 100, 0.002),
    "resnet20": Recipe("residual", 16, nets.resnet20, images(3, 32)),
    "vit": Recipe("transformer", 16, nets.vision_transformer, images(3, 32)),
    "chargpt": Recipe(
        "transformer", 8, nets.character_gpt, lambda n: torch.randint(64, (n, 64)), 64
    ),
    "pinn": Recipe(
        "function",
        2000,
        lambda: nets.mlp(2, 32, 32, 1, activation=nn.Tanh),
        lambda n: torch.rand(n, 2),
        None,
        function=poisson_residual,
        dtype=torch.float64,
    ),
}
QUICK = ("reference", "tiny-conv")
FULL = tuple(name for name in RECIPES if not name.startswith("tiny"))


def build(
    name: str, device: str = "cpu", dtype: torch.dtype | None = None, samples: int | None = None
) -> Case:
    """Return a problem, in its own dtype and with its own number of samples unless told others."""
    recipe = RECIPES[name]
    dtype, samples = dtype or recipe.dtype, samples or recipe.samples
    torch.manual_seed(0)
    X, net = recipe.inputs(samples), recipe.net().eval()
    y = _targets(recipe, samples, net, X)
    net = net.to(device, dtype)
    X = X.to(device, dtype if X.is_floating_point() else None)

    def call(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return functional_call(net, params, (X,))

    problem = Problem(
        model_fn=call if recipe.function is None else recipe.function(net),
        params={name: p.detach() for name, p in net.named_parameters()},
        X=X,
        y=y.to(device, dtype if y.is_floating_point() else None),
        criterion=nn.MSELoss() if recipe.classes is None else nn.CrossEntropyLoss(),
    )
    return Case(
        problem=problem,
        damping=recipe.damping,
        module=net if recipe.function is None else None,
    )


def _targets(recipe: Recipe, samples: int, net: nn.Module, X: Tensor) -> Tensor:
    """Return class labels; for a squared error random numbers, for a residual zeros."""
    if recipe.classes is not None:
        return torch.randint(recipe.classes, (samples,))
    if recipe.function is not None:
        return torch.zeros(samples)
    with torch.no_grad():
        return torch.rand_like(net(X))
