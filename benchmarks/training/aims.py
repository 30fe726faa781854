"""What the methods were to reach, and whether they do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from benchmarks.training.competitors import COMPETITORS
from benchmarks.training.results import Record, at, failures, longest, paired, to_level
from benchmarks.training.tasks import TASKS

Methods = dict[str, list[Record]]

SHIPPED = "held-out, as shipped"
OURS = "trust region, as shipped"
DRAWN = "spring, as shipped"
"""Our methods that have nothing to choose: for mini-batches, full ones, and points drawn anew."""


def best(methods: Methods, ours: bool, judge: Callable[[list[Record]], float]) -> tuple[float, str]:
    """Return the smallest value of our methods, or of the competitors', and whose it is."""
    values = [
        (judge(runs), name) for name, runs in methods.items() if (name not in COMPETITORS) == ours
    ]
    return min(values, default=(math.nan, "nobody"))


def both(
    methods: Methods, judge: Callable[[list[Record]], float]
) -> tuple[tuple[float, str], tuple[float, str]] | None:
    """Return our best and the competitors' best, where both are there."""
    pair = best(methods, True, judge), best(methods, False, judge)
    return None if any(name == "nobody" for _, name in pair) else pair


def verdict(reached: bool) -> str:
    """Return yes or no."""
    return "**yes**" if reached else "**no**"


def shown(value: float, digits: int = 4) -> str:
    """Return a number of steps or seconds, a sign where it was never reached."""
    return f"{value:.{digits}g}" if math.isfinite(value) else "∞"


def regression(methods: Methods) -> Iterator[str]:
    """Judge the teacher's training loss: a million times below the best competitor's."""
    if pair := both(methods, lambda runs: at(runs, "train", math.inf).median):
        (newton, newton_name), (other, other_name) = pair
        yield (
            f"- (a) teacher, training loss a millionth of the best competitor's: "
            f"{verdict(newton <= 1e-6 * other)}; {newton_name} {newton:.1e}, "
            f"{other_name} {other:.1e}"
        )


def errors(methods: Methods, budget: float) -> tuple[tuple[float, str], tuple[float, str]] | None:
    """Return the median error at a budget as shipped, and of the best competitor."""
    beside = {name: runs for name, runs in methods.items() if name in {OURS, *COMPETITORS}}
    return both(beside, lambda runs: at(runs, "error", budget).median)


def equation(name: str, methods: Methods) -> Iterator[str]:
    """Judge an equation's error as shipped: no larger than the best competitor's at any budget."""
    for budget in TASKS[name].budgets:
        if pair := errors(methods, budget):
            (newton, newton_name), (other, other_name) = pair
            yield (
                f"- (b) {name}, error after {budget:g} s no larger than the best competitor's: "
                f"{verdict(newton <= other)}; {newton_name} {newton:.1e}, "
                f"{other_name} {other:.1e}, {other / newton:.2g} times"
            )


def equations(tasks: dict[str, Methods]) -> Iterator[str]:
    """Judge the equations together: ahead on four after 5 s, ten times smaller on two after 20."""
    for budget, factor, wanted in ((5.0, 1, 4), (20.0, 10, 2)):
        pairs = [errors(methods, budget) for methods in tasks.values()]
        ratios = [other / newton for (newton, _), (other, _) in filter(None, pairs)]
        if ratios:
            ahead = sum(ratio >= factor for ratio in ratios)
            words = "ahead" if factor == 1 else f"{factor} times smaller"
            yield (
                f"- (b) error after {budget:g} s {words} on {wanted} equations: "
                f"{verdict(ahead >= wanted)}; on {ahead} of {len(ratios)}"
            )


def reached(name: str, methods: Methods, bound: float) -> Iterator[str]:
    """Judge whether the error at the end, as shipped, is below a bound."""
    method = DRAWN if TASKS[name].kind == "drawn" else OURS
    if method in methods:
        error = at(methods[method], "error", math.inf).median
        yield (
            f"- (f) {name}, error at the end at most {bound:g}: {verdict(error <= bound)}; "
            f"{error:.1e}"
        )


def digits(methods: Methods) -> Iterator[str]:
    """Judge the steps to 97 %: a fifth of Adam's, in at most ten times its seconds."""
    if "Adam" not in methods:
        return
    steps, seconds = (to_level(methods["Adam"], unit).median for unit in (0, 1))
    ours = [
        (to_level(runs, 0).median, to_level(runs, 1).median, name)
        for name, runs in methods.items()
        if name not in COMPETITORS
    ]
    fits = [
        found
        for found in ours
        if found[0] <= steps / 5 and found[1] <= 10 * seconds and math.isfinite(found[0])
    ]
    for own_steps, own_seconds, name in fits or sorted(ours)[:1]:
        yield (
            f"- (c) digits, 97 % in a fifth of Adam's steps and ten times its seconds: "
            f"{verdict(bool(fits))}; {name} {own_steps:g} steps, {own_seconds:.2g} s; "
            f"Adam {steps:g} steps, {seconds:.2g} s"
        )


def in_seconds(name: str, methods: Methods, most: float) -> Iterator[str]:
    """Judge the seconds to the level: our fastest method's in so many times Adam's."""
    if pair := both(methods, lambda runs: to_level(runs, 1).median):
        seconds, method = pair[0]
        adam = to_level(methods["Adam"], 1).median if "Adam" in methods else math.inf
        level = f"{100 * TASKS[name].level:g} %"
        yield (
            f"- (g) {name}, {level} in {most:g} times Adam's seconds: "
            f"{verdict(seconds <= most * adam < math.inf)}; {method} {shown(seconds, 2)} s, Adam "
            f"{shown(adam, 2)} s, {shown(seconds / adam, 2)} times"
        )


def at_the_end(name: str, methods: Methods) -> Iterator[str]:
    """Judge the accuracy when the time is over: our best method's is Adam's at least."""
    if "Adam" in methods and any(method not in COMPETITORS for method in methods):
        error, method = best(
            methods, True, lambda runs: -at(runs, "test_accuracy", math.inf).median
        )
        adam = at(methods["Adam"], "test_accuracy", math.inf).median
        yield (
            f"- (g) {name}, as accurate as Adam at the end: {verdict(-error >= adam)}; {method} "
            f"{-100 * error:.1f} %, Adam {100 * adam:.1f} %"
        )


def shipped(name: str, methods: Methods) -> Iterator[str]:
    """Judge the shipped defaults on mini-batches: no divergence, no more steps than Adam."""
    if SHIPPED not in methods or "Adam" not in methods:
        return
    runs, adam = methods[SHIPPED], methods["Adam"]
    steps, adam_steps = to_level(runs, 0).median, to_level(adam, 0).median
    seconds = [to_level(curves, 1).median for curves in (runs, adam)]
    yield (
        f"- (d) {name}, as shipped without divergence: {verdict(failures(runs) == 0)}; no more "
        f"steps than Adam to {100 * TASKS[name].level:g} %: "
        f"{verdict(steps <= adam_steps and math.isfinite(steps))}; {shown(steps)} against "
        f"{shown(adam_steps)} steps, {shown(seconds[0], 2)} against {shown(seconds[1], 2)} s"
    )


def late(name: str, methods: Methods) -> Iterator[str]:
    """Judge whether what is known of noise beats one number, at two standard errors."""
    constant = methods.get("constant", [])
    for method in ("held-out", SHIPPED, "noise-aware", "held-out γ and λ"):
        beside = paired(methods.get(method, []), constant, "test")
        if not math.isnan(beside.mean):
            clear = abs(beside.mean) > 2 * beside.error
            better = clear and beside.mean < 0 and not failures(longest(methods[method]))
            yield (
                f"- (e) {name}, {method} lowers the test loss further than a scalar δ: "
                f"{verdict(better)}; {beside.mean:+.1e} ± {beside.error:.1e} beside it"
                f"{'' if clear else ', within two standard errors'}"
            )


SECONDS = {"digits": 3.0, "fashion-mlp": 5.0}
"""In how many times Adam's seconds mini-batches are to reach the level of their task."""

BOUNDS = {"diffusivity": 1e-4, "poisson-10d": 1e-3}
"""Errors to reach: the unknown constant to four digits; Poisson's equation after 400 updates."""


def answers(tasks: dict[str, Methods]) -> list[str]:
    """Return every aim of the tasks that were run, in the order of the tasks."""
    lines: list[str] = []
    for name, methods in tasks.items():
        if name == "teacher":
            lines += regression(methods)
        elif name in BOUNDS:
            lines += reached(name, methods, BOUNDS[name])
        elif TASKS[name].group == "pde":
            lines += equation(name, methods)
        elif TASKS[name].group == "late":
            lines += late(name, methods)
        elif TASKS[name].level is not None:
            lines += digits(methods) if name == "digits" else []
            lines += shipped(name, methods)
            lines += in_seconds(name, methods, SECONDS[name]) if name in SECONDS else []
            lines += at_the_end(name, methods) if name not in SECONDS else []
    compared = {
        name: methods
        for name, methods in tasks.items()
        if TASKS[name].group == "pde" and name not in BOUNDS
    }
    return [*lines, *equations(compared)]
