"""The state between steps as `torch.optim` stores it: plain numbers, and the step before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ddnewton.criteria import Criteria
from ddnewton.criteria.monte_carlo import generators_of
from ddnewton.optim.parameter_groups import Groups, grouped_parameters
from ddnewton.optim.state import State
from ddnewton.types import PyTree

Stored: TypeAlias = Mapping[Tensor, Mapping[str, Any]]
"""The entries of ``Optimizer.state`` by parameter; numbers for all stand at the first parameter."""


def to_stored(state: State, params: Mapping[str, Tensor], groups: Groups) -> dict[Tensor, Any]:
    """Return a state as `torch.optim` stores it.

    Numbers are plain, because loading casts tensors to the dtype of their parameter, and leaves
    numbers as they are. ``params`` are the trained parameters by their names.
    """
    first = grouped_parameters(groups)[0]
    trees = {"previous": state.previous, "sizes": state.sizes}
    stored: dict[Tensor, Any] = {
        p: {key: tree[name] for key, tree in trees.items() if tree} for name, p in params.items()
    }
    stored = {p: entries for p, entries in stored.items() if entries}
    numbers = {"control": state.control.item(), "damping": state.damping.item()}
    return stored | {first: stored.get(first, {}) | {"step": int(state.updates), **numbers}}


def first_stored(
    init: Callable[[PyTree], State],
    params: Mapping[str, Tensor],
    groups: Groups,
) -> dict[Tensor, Any]:
    """Return the state before the first step as stored; none where parameters have no values yet.

    For `torch.distributed.checkpoint`, which loads into the entries that there are.
    """
    if not params or any(is_lazy(p) or p.is_meta for p in params.values()):
        return {}
    return to_stored(init(params), params, groups)


def from_stored(
    stored: Stored, initial: State, params: Mapping[str, Tensor], groups: Groups
) -> State:
    """Return the state that was stored by `to_stored`, or the initial one where nothing was.

    A parameter that has no step before, being new among the trained ones, gets the initial one.
    """
    numbers = stored.get(grouped_parameters(groups)[0])
    if not numbers or not numbers["step"]:
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


def as_saved(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state as `Optimizer.state_dict` saved it, whoever has read it since.

    `torch.distributed.checkpoint` takes all keys for text: numbers that are saved under 0 it brings
    back under "0", beside those that were there.
    """
    entries = state_dict["state"]
    doubles = {str(key): key for key in entries if isinstance(key, int)}
    state = {key: dict(entry) for key, entry in entries.items() if key not in doubles}
    for double in doubles.keys() & entries.keys():
        state[doubles[double]] |= entries[double]
    return {**state_dict, "state": state}


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
