"""Which methods each kind of task has, and the settings among which each of them is chosen.

Every grid has SIZE settings, competitors' and ours; what is marked "as shipped" has none to choose.
"""

from __future__ import annotations

from itertools import product
from typing import Any

Config = dict[str, Any]
Grid = tuple[Config, ...]

SIZE = 6
SHIPPED: Grid = ({},)


def over(**axes: tuple) -> Grid:
    """Return every combination of the values, one setting each."""
    return tuple(dict(zip(axes, values, strict=True)) for values in product(*axes.values()))


ADAM = over(lr=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1))
HELD_OUT = over(learning_rate=(0.3, 0.2, 0.1), momentum=(0.8, 0.9))
PLAIN = over(learning_rate=(1.0, 0.5, 0.3, 0.2, 0.1, 0.05))
SELF_SCALED = over(transform=("none", "root", "logarithm"), scale_first=(True, False))
START = over(start=(1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0))

FULL: dict[str, Grid] = {
    "SGD": over(lr=(1e-3, 1e-2, 1e-1), momentum=(0.9, 0.99)),
    "Adam": ADAM,
    "Adam, cosine": ADAM,
    "L-BFGS": over(history_size=(5, 10, 20, 50, 100, 200)),
    "Gauss-Newton CG": over(iterations=(10, 30, 100), delta=(1e-1, 1e-3)),
    "SciPy BFGS": over(transform=("none", "root", "logarithm"), c2=(0.9, 0.5)),
    "SciPy L-BFGS-B": over(maxcor=(10, 30, 100), transform=("none", "logarithm")),
    "SSBFGS": SELF_SCALED,
    "SSBroyden": SELF_SCALED,
    "Adam, SSBroyden": over(lr=(3e-3, 1e-2), share=(0.03, 0.1, 0.2)),
    "ENGD": over(rcond=(1e-9, 1e-11, 1e-13), every=(False, True)),
    "ENGD-W": over(damping=(1e-14, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4)),
    "torch-LM": over(start=(1e-5, 1e-3, 1e-1), mode=("standard", "adaptive")),
    "SOAP": ADAM,
    "constant": over(damping=(1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)),
    "trust region, as shipped": SHIPPED,
    "LM": START,
    "LM, momentum": over(momentum=(0.1, 0.3, 0.5, 0.7, 0.8, 0.9)),
    "trust region": START,
}

MINI: dict[str, Grid] = {
    "SGD": over(lr=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0), momentum=(0.9,)),
    "Adam": ADAM,
    "Adam, cosine": ADAM,
    "Gauss-Newton CG": over(iterations=(5, 20), delta=(0.1, 1.0, 10.0)),
    "constant": over(damping=(0.03, 0.3, 3.0), learning_rate=(0.5, 0.2)),
    "constant, momentum": over(damping=(0.01, 0.03, 0.3), learning_rate=(0.3, 0.2)),
    "held-out, as shipped": SHIPPED,
    "held-out": HELD_OUT,
    "held-out, no momentum": PLAIN,
    "held-out, complement": HELD_OUT,
    "noise-aware": HELD_OUT,
    "held-out γ and λ": over(damping=(0.1, 1.0, 10.0), learning_rate=(1.0, 0.3)),
    "Monte-Carlo steps": over(
        batches=(3,), damping=(0.05, 0.3, 3.0), learning_rate=(0.6, 0.3), momentum=(0.6,)
    ),
}

LATE: dict[str, Grid] = {
    "SGD": over(lr=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1), momentum=(0.9,)),
    "Adam": over(lr=(1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)),
    "constant": over(damping=(0.1, 1.0, 10.0), learning_rate=(1.0, 0.3)),
    "held-out, as shipped": SHIPPED,
    "held-out": PLAIN,
    "noise-aware": PLAIN,
    "held-out γ and λ": over(damping=(0.1, 1.0, 10.0), learning_rate=(1.0, 0.3)),
}

DRAWN: dict[str, Grid] = {
    "Adam, cosine": ADAM,
    "SOAP": ADAM,
    "ENGD-W": over(damping=(1e-10, 1e-8, 1e-6, 1e-4, 1e-3, 1e-2)),
    "SPRING": over(damping=(1e-3, 1e-4, 1e-5), momentum=(0.9,), lr=(0.03, 0.1)),
    "trust region, as shipped": SHIPPED,
    "spring, as shipped": SHIPPED,
}

GRIDS = {"full": FULL, "mini": MINI, "late": LATE, "drawn": DRAWN}
