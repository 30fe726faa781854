"""What `torch.compile` makes no graph of, by name: such calls run as they are, behind a break.

A graph has no random generator, no model whose layers are still to be found, and no loop over
batches that somebody else reads. The seed of Monte-Carlo draws comes from a generator in front of
the graph, which has it as an input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from ddnewton.criteria.monte_carlo import Criteria, MonteCarlo
from ddnewton.criteria.random_numbers import drawn_seed
from ddnewton.edge import computing_in_place
from ddnewton.errors import public, sentence
from ddnewton.inputs.batches import Batches
from ddnewton.linearize.structured.traced_model import Prepared
from ddnewton.resampling import Bootstrap

P = ParamSpec("P")
R = TypeVar("R")

GRAPH_RULE = "torch.compile makes a graph of prepared models without random numbers"

SEEDS_RULE = "fullgraph=True asks for a call that draws no seed"

SEEDS_REMEDY = "Leave it out: a seed is drawn in front of the graph of all that follows from it."


def compilable(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function public that computes, and may be compiled but where there is an obstacle.

    Where `torch.compile` meets an `obstacle` among the arguments, it leaves the call alone; where
    it meets draws, it makes a graph of all behind their seeds.
    """
    computed = computing_in_place(function)

    @public
    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            reason = obstacle(*args, **kwargs)
            if reason:
                return left_alone(computed, reason)(*args, **kwargs)
            args, kwargs = with_seeds_drawn(*args, **kwargs)
        return computed(*args, **kwargs)

    return call


def left_alone(function: Callable[P, R], reason: str) -> Callable[P, R]:
    """End the graph of `torch.compile`, for a reason, and return a function that it leaves alone.

    With ``fullgraph=True`` that is an error with the reason as its message.
    """
    torch._dynamo.graph_break(msg=reason)
    uncompiled: Callable[P, R] = torch.compiler.disable(function)
    return uncompiled


def with_seeds_drawn(
    model_fn: Any,
    params: Any = None,
    X: Any = None,
    y: Any = None,
    criterion: Any = None,
    *damping: Any,
    **options: Any,
) -> tuple[Any, Any]:
    """Return the arguments of a call that `torch.compile` makes a graph of, without generators."""
    criterion = without_generators(model_fn, criterion)
    return (model_fn, params, X, y, criterion, *damping), options


def without_generators(model_fn: Any, criterion: Any) -> Any:
    """Return a criterion of a graph, of which a `MonteCarlo` has drawn its seed in front of it."""
    if not any(isinstance(c, MonteCarlo) and c.seed is None for c in _parts(criterion)):
        return criterion
    reason = sentence(SEEDS_RULE, "monte_carlo as criterion", SEEDS_REMEDY)
    names = list(model_fn) if isinstance(model_fn, Mapping) else None
    return left_alone(with_seeds, reason)(criterion, names)


def with_seeds(criterion: Criteria, names: Sequence[Any] | None) -> Criteria:
    """Return criteria that have drawn the seeds of one call already, one for each named term.

    They are drawn in the order of the terms, as the call draws them; None names a single one.
    """
    if names is None:
        return _with_seed(criterion) if isinstance(criterion, MonteCarlo) else criterion
    criteria = criterion if isinstance(criterion, Mapping) else dict.fromkeys(names, criterion)
    if criteria.keys() != set(names):  # which the call refuses
        return criterion
    drawn = {name: criteria[name] for name in names}
    return {
        name: _with_seed(of_term) if isinstance(of_term, MonteCarlo) else of_term
        for name, of_term in drawn.items()
    }


def _with_seed(criterion: MonteCarlo) -> MonteCarlo:
    """Return a criterion that has drawn the seed of one call, a tensor."""
    return criterion._replace(seed=torch.tensor(drawn_seed(criterion.generator), device="cpu"))


def obstacle(
    model_fn: Any,
    params: Any = None,
    X: Any = None,
    y: Any = None,
    criterion: Any = None,
    damping: Any = None,
    **options: Any,
) -> str:
    """Return why there is no graph of a call, with the remedy; the empty string if there is one.

    Products alone, and process groups, are refused as everywhere inside of transforms.
    """
    gram = options.get("gram", "auto")
    ways = set(gram.values()) if isinstance(gram, Mapping) else {gram}
    if "free" in ways or options.get("process_group") is not None:
        return ""
    rules = [damping, *(group.damping for group in options.get("groups") or ())]
    prepared = all(isinstance(function, Prepared) for function in _parts(model_fn))
    pairs = (
        (not prepared, "another model_fn", "Pass prepare(model_fn, params, X)."),
        ("dense" in ways, 'gram="dense"', 'Leave gram at "auto".'),
        (_any(Batches, _parts(X)), "Batches as X", "Call it uncompiled."),
        (_any(Bootstrap, rules), "bootstrap as damping", "Pass a number, or signal_to_noise()."),
    )
    return next((sentence(GRAPH_RULE, got, remedy) for met, got, remedy in pairs if met), "")


def _any(kind: type, values: Sequence[Any]) -> bool:
    """Return whether a value is of a kind."""
    return any(isinstance(value, kind) for value in values)


def _parts(argument: Any) -> list[Any]:
    """Return the parts of an argument for every term."""
    return list(argument.values()) if isinstance(argument, Mapping) else [argument]
