"""The state between steps as `torch.optim` stores it: plain numbers, and the step before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ddnewton.criteria import Criteria
from ddnewton.criteria.monte_carlo import generators_of
from ddnewton.optim.state import State

Stored: TypeAlias = Mapping[Tensor, Mapping[str, Any]]
"""The entries of ``Optimizer.state`` by parameter; numbers for all stand at the first parameter."""


def to_stored(state: State, params: Mapping[str, Tensor], first: Tensor) -> dict[Tensor, Any]:
    """Return a state as `torch.optim` stores it.

    Numbers are plain, because loading casts tensors to the dtype of their parameter, and leaves
    numbers as they are. ``params`` are the trained parameters by their names, and ``first`` is the
    first parameter of all groups.
    """
    trees = {"previous": state.previous, "sizes": state.sizes}
    stored: dict[Tensor, Any] = {
        p: {key: tree[name] for key, tree in trees.items() if tree} for name, p in params.items()
    }
    stored = {p: entries for p, entries in stored.items() if entries}
    numbers = {"control": state.control.item(), "damping": state.damping.item()}
    return stored | {first: stored.get(first, {}) | {"step": int(state.updates), **numbers}}


def from_stored(
    stored: Stored, initial: State, params: Mapping[str, Tensor], first: Tensor
) -> State:
    """Return the state that was stored by `to_stored`, or the initial one where nothing was.

    A parameter that has no step before, being new among the trained ones, gets the initial one.
    """
    numbers = stored.get(first)
    if not numbers:
        return initial
    trees = {"previous": initial.previous, "sizes": initial.sizes}
    for key, tree in trees.items():
        if tree:  # there is momentum, or a scale by the sizes of columns
            trees[key] = {
                name: stored.get(p, {}).get(key, tree[name]) for name, p in params.items()
            }
    return State(
        updates=initial.updates + numbers["step"],
        control=torch.full_like(initial.control, numbers["control"]),
        damping=torch.full_like(initial.damping, numbers["damping"]),
        **trees,
    )


@contextmanager
def restoring_draws(criterion: Criteria) -> Iterator[None]:
    """Restore the state of the random numbers of criteria if a step inside is refused."""
    generators = generators_of(criterion).values()
    before = [generator.get_state() for generator in generators]
    try:
        yield
    except BaseException:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
        raise


def stored_draws(criterion: Criteria) -> dict[str, Any]:
    """Return the state of the random numbers of criteria: by term, or of the only one."""
    states = {name: generator.get_state() for name, generator in generators_of(criterion).items()}
    return {"generator": states.get(None, states)} if states else {}


def load_draws(criterion: Criteria, stored: Mapping[str, Any]) -> None:
    """Set the random numbers of criteria to a state that was stored by `stored_draws`."""
    if "generator" not in stored:
        return
    states = stored["generator"]
    for name, generator in generators_of(criterion).items():
        generator.set_state((states if name is None else states[name]).cpu())
