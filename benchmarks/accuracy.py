"""How right a float32 step is: its distance from a dense float64 solve, as a markdown table.

Run with ``python -m benchmarks.accuracy``, in an environment that has ddnewton. The nets and the
dense reference are those of the tests: MLP 64-32-10 on N = 32 samples, cross-entropy. A second
table has the option ``precision``, by layers and dense, "auto" also as on a GPU whose float64 is
slow, for a step that is not cheap; ``info.rounding`` stands beside it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from ddnewton import newton_step, newton_step_and_info, top_k
from tests.nets_in_training import DELTAS, UPDATES, exact, in_float32, leading
from tests.reference import error
from tests.slow_float64 import as_where_float64_is_slow

SEEDS = range(5)
OPTIONS = {
    "all directions": ({}, {}),
    "top 10": ({"select": top_k(10)}, {"select": leading}),
    "top 10, complement 0.1": (
        {"select": top_k(10), "complement": 0.1},
        {"select": leading, "complement": 0.1},
    ),
}


def worst(net: tuple[str, int], delta: float, options: dict, reference_options: dict) -> float:
    """Return the largest relative error of the step over the seeds."""
    return max(
        error(
            newton_step(*in_float32(seed, net), delta, **options),
            exact(seed, net, delta, **reference_options),
        )
        for seed in SEEDS
    )


PRECISIONS: dict[str, tuple[Callable[[], AbstractContextManager[None]], dict]] = {
    "auto": (nullcontext, {}),
    "float64": (nullcontext, {"precision": "float64"}),
    "model": (nullcontext, {"precision": "model"}),
    "auto, slow float64": (as_where_float64_is_slow, {}),
    "auto, slow float64, cheap": (partial(as_where_float64_is_slow, 1e9), {}),
}


def print_precisions() -> None:
    """Print the table of the option ``precision``."""
    print(f"\n| net, updates | precision | gram | rounding | {_deltas()} |")
    print(f"|---|---|---|---|{'---|' * len(DELTAS)}")
    for net in UPDATES:
        for name, (context, precision) in PRECISIONS.items():
            for gram in ("dense", "structured"):
                options = {"gram": gram, **precision}
                with context():
                    row = " | ".join(told(net, delta, options) for delta in DELTAS)
                    _, info = newton_step_and_info(*in_float32(0, net), 1.0, **options)
                rounding = f"{float(info.rounding):.0e}"
                print(f"| {net[0]}, {net[1]} | {name} | {gram} | {rounding} | {row} |")


def told(net: tuple[str, int], delta: float, options: dict) -> str:
    """Return the largest error, or that a step is refused: units within rounding of their kink."""
    try:
        return f"{worst(net, delta, options, {}):.1e}"
    except ValueError:
        return "refused"


def _deltas() -> str:
    """Return the heads of the columns."""
    return " | ".join(f"δ = {delta:g}" for delta in DELTAS)


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    print(
        f"Worst of {len(SEEDS)} seeds, relative in the Euclidean norm; torch {torch.__version__}\n"
    )
    print(f"| net, updates | directions | {_deltas()} |")
    print(f"|---|---|{'---|' * len(DELTAS)}")
    for activation, updates in UPDATES:
        for name, (options, reference_options) in OPTIONS.items():
            errors = [
                worst((activation, updates), delta, options, reference_options) for delta in DELTAS
            ]
            print(
                f"| {activation}, {updates} | {name} | {' | '.join(f'{e:.1e}' for e in errors)} |"
            )
    print_precisions()


if __name__ == "__main__":
    main()
