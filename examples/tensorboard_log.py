"""Log a run for TensorBoard and as lines of JSON, and draw it.

``python examples/tensorboard_log.py`` fits a net and an unknown force to u″ = −force · sin πx. The
losses of its three terms are logged with the damping, the decrease and the spectrum. Look at it
with ``tensorboard --logdir newton_run``, or at ``newton_run/run.png``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.utils.tensorboard import SummaryWriter

from ddnewton import (
    NewtonInfo,
    UpdateInfo,
    as_function,
    diagnostics,
    directional_newton,
    newton_step_and_info,
)
from ddnewton.plotting import overview

MSE = nn.MSELoss()


def problem() -> tuple[dict[str, Callable[..., Tensor]], Any, dict[str, Tensor], dict[str, Tensor]]:
    """Return the terms, the parameters, the points and the targets."""
    # The equation, with derivatives by torch.func; the force is a parameter beside the net.
    layers = nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)
    net, weights = as_function(nn.Sequential(*layers).double())

    def solution(p: Any, x: Tensor) -> Tensor:
        return net(p["net"], x[:, None])[:, 0]

    def equation(p: Any, x: Tensor) -> Tensor:
        def slope(x: Tensor) -> Tensor:
            return jvp(lambda x: solution(p, x), (x,), (torch.ones_like(x),))[1]

        curvature = jvp(slope, (x,), (torch.ones_like(x),))[1]
        return curvature + p["force"] * torch.sin(torch.pi * x)

    # Points inside, at the ends, and where u was measured.
    x = torch.linspace(0, 1, 21).double()
    terms = {"inside": equation, "ends": solution, "data": solution}
    params = {"net": weights, "force": torch.ones(()).double()}
    points = {"inside": x, "ends": x[[0, -1]], "data": x[[5, 10]]}
    targets = {name: torch.zeros_like(values) for name, values in points.items()}
    targets["data"] = torch.sin(torch.pi * points["data"])
    return terms, params, points, targets


def write_scalars(writer: SummaryWriter, step: int, info: UpdateInfo, seconds: float) -> None:
    """Write what an update did: damping, losses, decreases, time."""
    scalars = {
        "loss/all": info.loss,
        "damping": info.damping,
        "decrease/predicted": info.predicted_decrease,
        "decrease/kept": info.loss - info.loss_after,
        "seconds": seconds,
    }
    scalars |= {f"loss/{name}": loss for name, loss in info.losses.items()}
    for name, value in scalars.items():
        writer.add_scalar(name, value, step)


def write_spectrum(writer: SummaryWriter, step: int, directions: NewtonInfo) -> None:
    """Write a histogram of the eigenvalues above the rank tolerance, by their logarithms."""
    evals = directions.evals[-int(directions.rank) :]
    writer.add_histogram("spectrum/log10", evals.log10(), step)


def main(folder: str | Path = "newton_run", updates: int = 30, every: int = 10) -> list[UpdateInfo]:
    """Fit, log every update and, now and then, the directions, and return what updates told."""
    torch.manual_seed(0)
    terms, params, points, targets = problem()
    optimizer = directional_newton(terms, MSE)
    state, infos = optimizer.init(params), []
    with SummaryWriter(folder) as writer:
        for step in range(1, updates + 1):
            # An update, and its time.
            start = time.perf_counter()
            params, state, info = optimizer.update(params, state, points, targets)
            seconds = time.perf_counter() - start
            infos.append(info)
            # The directions at the new parameters, which cost a step of their own.
            directions = None
            if step % every == 0:
                here = (terms, params, points, targets, MSE)
                _, directions = newton_step_and_info(*here, float(info.damping))
                write_spectrum(writer, step, directions)
            # Both logs.
            write_scalars(writer, step, info, seconds)
            diagnostics.append(folder, info, directions, step=step, seconds=seconds)
    # The figure of the run.
    overview(diagnostics.read(folder), Path(folder) / "run.png")
    print(f"loss {infos[0].loss:.3g} -> {infos[-1].loss:.3g}, force {params['force']:.3f}")
    return infos


if __name__ == "__main__":
    main()
