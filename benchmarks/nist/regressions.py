"""NIST's Statistical Reference Datasets for nonlinear regression: 27 models, certified answers.

The file beside this one holds of every data set its level of difficulty, two starts, the certified
parameters b with their standard deviations, the certified residual sum of squares, x and y. Here
are the models, each ``model(b [p], X [n, inputs]) -> [n]`` for `ddnewton.newton_step` and whatever
else takes a function of parameters and a batch. Source: NIST/ITL StRD, itl.nist.gov/div898/strd.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from math import pi
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

FILE = Path(__file__).with_name("nist_strd.json")
Model: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class Regression(NamedTuple):
    """A data set: the model and data, two starts, and the certified answer.

    ``deviations`` are the standard deviations of the parameters; ``squares`` is the sum of the
    squared residuals. ``y`` is what the model predicts: for Nelson the logarithm of the data.
    """

    model: Model
    X: Tensor
    y: Tensor
    starts: tuple[Tensor, Tensor]
    certified: Tensor
    deviations: Tensor
    squares: float
    level: str


def _bennett5(b: Tensor, X: Tensor) -> Tensor:
    """Superconductivity: b₁ (b₂ + x)^(−1/b₃)."""
    b1, b2, b3 = b
    return b1 * (b2 + X[:, 0]) ** (-1 / b3)


def _boxbod(b: Tensor, X: Tensor) -> Tensor:
    """Oxygen demand, and Misra1a: b₁ (1 − exp(−b₂ x))."""
    b1, b2 = b
    return -b1 * torch.expm1(-b2 * X[:, 0])


def _chwirut(b: Tensor, X: Tensor) -> Tensor:
    """Ultrasonic reference block: exp(−b₁ x) / (b₂ + b₃ x)."""
    b1, b2, b3 = b
    x = X[:, 0]
    return torch.exp(-b1 * x) / (b2 + b3 * x)


def _danwood(b: Tensor, X: Tensor) -> Tensor:
    """Radiated energy: b₁ x^b₂."""
    b1, b2 = b
    return b1 * X[:, 0] ** b2


def _enso(b: Tensor, X: Tensor) -> Tensor:
    """Pressure differences: a mean, and waves of periods 12, b₄ and b₇."""
    b1, b2, b3, b4, b5, b6, b7, b8, b9 = b
    phase = 2 * pi * X[:, 0]
    year = b2 * torch.cos(phase / 12) + b3 * torch.sin(phase / 12)
    second = b5 * torch.cos(phase / b4) + b6 * torch.sin(phase / b4)
    return b1 + year + second + b8 * torch.cos(phase / b7) + b9 * torch.sin(phase / b7)


def _eckerle4(b: Tensor, X: Tensor) -> Tensor:
    """Transmittance: (b₁/b₂) exp(−½ ((x − b₃)/b₂)²)."""
    b1, b2, b3 = b
    return b1 / b2 * torch.exp(-((X[:, 0] - b3) ** 2) / (2 * b2**2))


def _gauss(b: Tensor, X: Tensor) -> Tensor:
    """Two bells on an exponential."""
    b1, b2, b3, b4, b5, b6, b7, b8 = b
    x = X[:, 0]
    bells = b3 * torch.exp(-((x - b4) ** 2) / b5**2) + b6 * torch.exp(-((x - b7) ** 2) / b8**2)
    return b1 * torch.exp(-b2 * x) + bells


def _cubics(b: Tensor, X: Tensor) -> Tensor:
    """Hahn1, thermal expansion; Thurber, electron mobility: a cubic over a cubic."""
    b1, b2, b3, b4, b5, b6, b7 = b
    x = X[:, 0]
    above = b1 + b2 * x + b3 * x**2 + b4 * x**3
    return above / (1 + b5 * x + b6 * x**2 + b7 * x**3)


def _kirby2(b: Tensor, X: Tensor) -> Tensor:
    """Line widths under an electron microscope: a quadratic over a quadratic."""
    b1, b2, b3, b4, b5 = b
    x = X[:, 0]
    return (b1 + b2 * x + b3 * x**2) / (1 + b4 * x + b5 * x**2)


def _lanczos(b: Tensor, X: Tensor) -> Tensor:
    """Three exponentials."""
    b1, b2, b3, b4, b5, b6 = b
    x = X[:, 0]
    return b1 * torch.exp(-b2 * x) + b3 * torch.exp(-b4 * x) + b5 * torch.exp(-b6 * x)


def _mgh09(b: Tensor, X: Tensor) -> Tensor:
    """Kowalik and Osborne: b₁ (x² + b₂ x) / (x² + b₃ x + b₄)."""
    b1, b2, b3, b4 = b
    x = X[:, 0]
    return b1 * (x**2 + b2 * x) / (x**2 + b3 * x + b4)


def _mgh10(b: Tensor, X: Tensor) -> Tensor:
    """Meyer: b₁ exp(b₂ / (x + b₃))."""
    b1, b2, b3 = b
    return b1 * torch.exp(b2 / (X[:, 0] + b3))


def _mgh17(b: Tensor, X: Tensor) -> Tensor:
    """Osborne: b₁ + b₂ exp(−b₄ x) + b₃ exp(−b₅ x)."""
    b1, b2, b3, b4, b5 = b
    x = X[:, 0]
    return b1 + b2 * torch.exp(-b4 * x) + b3 * torch.exp(-b5 * x)


def _misra1b(b: Tensor, X: Tensor) -> Tensor:
    """Monomolecular adsorption: b₁ (1 − (1 + b₂ x/2)^−2)."""
    b1, b2 = b
    return b1 * (1 - (1 + b2 * X[:, 0] / 2) ** -2)


def _misra1c(b: Tensor, X: Tensor) -> Tensor:
    """Monomolecular adsorption: b₁ (1 − (1 + 2 b₂ x)^−½)."""
    b1, b2 = b
    return b1 * (1 - (1 + 2 * b2 * X[:, 0]) ** -0.5)


def _misra1d(b: Tensor, X: Tensor) -> Tensor:
    """Monomolecular adsorption: b₁ b₂ x / (1 + b₂ x)."""
    b1, b2 = b
    x = X[:, 0]
    return b1 * b2 * x / (1 + b2 * x)


def _nelson(b: Tensor, X: Tensor) -> Tensor:
    """Logarithm of a breakdown voltage: b₁ − b₂ x₁ exp(−b₃ x₂)."""
    b1, b2, b3 = b
    time, temperature = X.unbind(1)
    return b1 - b2 * time * torch.exp(-b3 * temperature)


def _rat42(b: Tensor, X: Tensor) -> Tensor:
    """Pasture yield: b₁ / (1 + exp(b₂ − b₃ x))."""
    b1, b2, b3 = b
    return b1 / (1 + torch.exp(b2 - b3 * X[:, 0]))


def _rat43(b: Tensor, X: Tensor) -> Tensor:
    """Onion growth: b₁ / (1 + exp(b₂ − b₃ x))^(1/b₄)."""
    b1, b2, b3, b4 = b
    return b1 / (1 + torch.exp(b2 - b3 * X[:, 0])) ** (1 / b4)


def _roszman1(b: Tensor, X: Tensor) -> Tensor:
    """Quantum defects: b₁ − b₂ x − arctan(b₃ / (x − b₄)) / π."""
    b1, b2, b3, b4 = b
    x = X[:, 0]
    return b1 - b2 * x - torch.arctan(b3 / (x - b4)) / pi


MODELS: dict[str, Model] = {
    "Bennett5": _bennett5,
    "BoxBOD": _boxbod,
    "Chwirut1": _chwirut,
    "Chwirut2": _chwirut,
    "DanWood": _danwood,
    "ENSO": _enso,
    "Eckerle4": _eckerle4,
    "Gauss1": _gauss,
    "Gauss2": _gauss,
    "Gauss3": _gauss,
    "Hahn1": _cubics,
    "Kirby2": _kirby2,
    "Lanczos1": _lanczos,
    "Lanczos2": _lanczos,
    "Lanczos3": _lanczos,
    "MGH09": _mgh09,
    "MGH10": _mgh10,
    "MGH17": _mgh17,
    "Misra1a": _boxbod,
    "Misra1b": _misra1b,
    "Misra1c": _misra1c,
    "Misra1d": _misra1d,
    "Nelson": _nelson,
    "Rat42": _rat42,
    "Rat43": _rat43,
    "Roszman1": _roszman1,
    "Thurber": _cubics,
}
LOGARITHMIC = frozenset({"Nelson"})
"""Whose model predicts the logarithm of y."""


@lru_cache(1)
def _records() -> dict[str, dict]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def regression(name: str) -> Regression:
    """Return a data set by its NIST name, in float64."""
    record = _records()[name]

    def tensor(field: str) -> Tensor:
        return torch.tensor(record[field], dtype=torch.float64)

    y = tensor("y")
    return Regression(
        model=MODELS[name],
        X=tensor("x"),
        y=y.log() if name in LOGARITHMIC else y,
        starts=(tensor("start1"), tensor("start2")),
        certified=tensor("certified"),
        deviations=tensor("standard_deviation"),
        squares=record["rss"],
        level=record["level"],
    )


def digits(b: Tensor, certified: Tensor) -> float:
    """Return to how many digits the worst of some parameters is right: 0 where it is not finite.

    NIST's log relative error, −log₁₀(|b − c| / |c|), at most the 11 digits that are certified.
    """
    error = ((b - certified) / certified).abs().max()
    return float((-torch.log10(error)).clamp(0, 11)) if torch.isfinite(error) else 0.0
