"""The parameter groups of a `torch.optim` optimizer, as blocks of the Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ddnewton.errors import BadValue, sentence
from ddnewton.inputs.checks import check_damping, check_nonnegative, check_select
from ddnewton.inputs.groups import Group
from ddnewton.trees import real_count

Groups: TypeAlias = Sequence[Mapping[str, Any]]
"""Those of an optimizer, with the parameters and the options of each."""

GROUP_OPTIONS = ("select", "damping")
"""Options of a group besides its learning rate; they may be functions, and are not in the state."""


def without_options(param_group: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a group as `torch.optim` takes it, and its `GROUP_OPTIONS`, None where not given."""
    # All other options are the same for all groups.
    group = dict(param_group)
    unknown = set(group) - {"params", "lr", "initial_lr", "weight_decay", *GROUP_OPTIONS}
    if unknown:
        rule = (
            "DirectionalNewton: a group has params, lr, weight_decay, damping and select of its own"
        )
        raise BadValue(sentence(rule, ", ".join(sorted(unknown)), "Pass it for all groups."))
    # Take these options out of a copy of the group, and check them and the learning rate.
    options = {key: group.pop(key, None) for key in GROUP_OPTIONS}
    if options["damping"] is not None:
        check_damping("damping", options["damping"])
    check_select("select", options["select"])
    if "lr" in group:
        check_nonnegative("DirectionalNewton: lr of a group", group["lr"])
    if "weight_decay" in group:
        check_nonnegative("DirectionalNewton: weight_decay of a group", group["weight_decay"])
    return group, options


def grouped_parameters(param_groups: Groups) -> list[Tensor]:
    """Return the parameters of all groups, in the order of the groups."""
    return [p for group in param_groups for p in group["params"]]


def trained_parameters(param_groups: Groups, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those ``named`` parameters of a module in groups that require gradients, in order."""
    grouped = {id(p) for p in grouped_parameters(param_groups)}
    if not grouped <= {id(p) for p in named.values()}:
        rule = "step: the parameters of all groups must still be those of the module"
        remedy = "Load with assign=False, or make the optimizer after changing the module."
        raise BadValue(sentence(rule, "others in their place", remedy))
    return {name: p for name, p in named.items() if id(p) in grouped and p.requires_grad}


def as_blocks(
    param_groups: Groups,
    group_options: Sequence[Mapping[str, Any]],
    params: Mapping[str, Tensor],
) -> list[Group] | None:
    """Return a block for every group with trained parameters; None if all is one plain block.

    ``params`` are the trained parameters by their names.
    """
    if len(param_groups) == 1 and all(option is None for option in group_options[0].values()):
        return None
    names = {id(p): name for name, p in params.items()}
    blocks = [
        Group([names[id(p)] for p in group["params"] if id(p) in names], **options)
        for group, options in zip(param_groups, group_options, strict=True)
    ]
    return [block for block in blocks if block.params]


def group_decays(param_groups: Groups, params: Mapping[str, Tensor]) -> float | dict[str, float]:
    """Return the weight decay of all trained parameters, or one for each by its name.

    A group has a number, or numbers by name; one that was saved without either has none.
    """
    of_group = {id(p): g.get("weight_decay", 0.0) for g in param_groups for p in g["params"]}
    decays = {name: _decay_of(of_group[id(p)], name) for name, p in params.items()}
    if len(set(decays.values())) == 1:
        return next(iter(decays.values()))
    return decays


def _decay_of(weight_decay: float | Mapping[str, float], name: str) -> float:
    """Return the weight decay of a parameter."""
    if not isinstance(weight_decay, Mapping):
        return weight_decay
    if name not in weight_decay:
        rule = "weight_decay by name must have a number for every trained parameter"
        raise BadValue(sentence(rule, f"none for {name}", "Pass 0.0 for those without."))
    return weight_decay[name]


def rate_after(
    base: Any,
    param_groups: Groups,
    params: Iterable[Tensor],
    updates: Tensor,
) -> float | Tensor:
    """Return a learning rate, or what a function says of it after updates, times the groups'."""
    rate = base(updates) if callable(base) else base
    product: float | Tensor = rate * group_rates(param_groups, params, updates.device)
    return product


def group_rates(
    param_groups: Groups, params: Iterable[Tensor], device: torch.device
) -> float | Tensor:
    """Return the learning rate of all groups, or one for every parameter where they differ.

    Then it is a vector of float64, in the order of ``params``.
    """
    rates = {id(p): group["lr"] for group in param_groups for p in group["params"]}
    if len(set(rates.values())) == 1:
        shared: float | Tensor = next(iter(rates.values()))
        return shared
    whole = partial(torch.full, dtype=torch.float64, device=device)
    return torch.cat([whole((real_count(p),), float(rates[id(p)])) for p in params])
