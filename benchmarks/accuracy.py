"""How right a float32 step is: its distance from a dense float64 solve, as a markdown table.

Run with ``python -m benchmarks.accuracy``, in an environment that has ddnewton. The nets and the
dense reference are those of the tests: MLP 64-32-10 on N = 32 samples, cross-entropy.
"""

import torch

from ddnewton import newton_step, top_k
from tests.nets_in_training import DELTAS, UPDATES, exact, in_float32, leading
from tests.reference import error

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


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(
        f"Worst of {len(SEEDS)} seeds, relative in the Euclidean norm; torch {torch.__version__}\n"
    )
    print(f"| net, updates | directions | {' | '.join(f'δ = {delta:g}' for delta in DELTAS)} |")
    print(f"|---|---|{'---|' * len(DELTAS)}")
    for activation, updates in UPDATES:
        for name, (options, reference_options) in OPTIONS.items():
            errors = [
                worst((activation, updates), delta, options, reference_options) for delta in DELTAS
            ]
            print(
                f"| {activation}, {updates} | {name} | {' | '.join(f'{e:.1e}' for e in errors)} |"
            )


if __name__ == "__main__":
    main()
