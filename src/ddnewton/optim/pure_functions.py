"""``init`` and ``update``, the pair of pure functions that an optimizer is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ddnewton.distributed.agreement import agreeing, team_of
from ddnewton.distributed.fingerprints import options_told
from ddnewton.distributed.team import Team
from ddnewton.edge import computing
from ddnewton.inputs.checks import check_params
from ddnewton.inputs.dtensor_arguments import placed_tree, whole_tree
from ddnewton.inputs.held_out_samples import first_samples
from ddnewton.inputs.terms import TermIndices
from ddnewton.optim.compiled import FIRST_TRIAL, is_all, is_chosen, search_obstacle
from ddnewton.optim.group_reference import GroupReference
from ddnewton.optim.local_model import LocalModel, added, in_params_units
from ddnewton.optim.notices import Notices, notice
from ddnewton.optim.search import Step, search
from ddnewton.optim.settings import Settings, is_read_at_trials
from ddnewton.optim.state import State, UpdateInfo, check_state, first_state
from ddnewton.optim.update import local_model, next_state, update_info
from ddnewton.quadratic.arguments import Arguments
from ddnewton.quadratic.compilable import left_alone, obstacle, without_generators
from ddnewton.quadratic.matrix_free.free_model import FreeModel, free_model
from ddnewton.quadratic.matrix_free.ways import either_way
from ddnewton.quadratic.quadratic_model import QuadraticModel, quadratic_model
from ddnewton.transforms import any_known
from ddnewton.trees import tree_leaves, tree_structure, tree_unflatten
from ddnewton.types import PyTree

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class FirstState:
    """``init``: from parameters to the state before the first update."""

    momentum: bool
    sizes: bool

    def __call__(self, params: PyTree) -> State:
        """Return the state before the first update."""
        return init(self, params)


@dataclass(frozen=True, eq=False)
class Update:
    """``update``: from parameters, their state and a batch to the next ones."""

    settings: Settings
    arguments: partial[Any]  # of `arguments_of`
    subsampling_grad: TermIndices | None
    subsampling_ggn: TermIndices | None
    notices: Notices
    group: GroupReference
    automatic: bool  # whether it may go by products where matrices do not fit
    automatic_scale: bool  # one by columns, which products do not give, was not asked for

    def __call__(
        self, params: PyTree, state: State, X: PyTree, y: PyTree
    ) -> tuple[PyTree, State, UpdateInfo]:
        """Return the parameters after a step on a batch, the state for the next, and a record."""
        if not torch.compiler.is_compiling():
            return update(self, params, state, X, y)
        # One trial in one graph; a graph ends where anything else is asked for.
        model_fn, options = self.arguments.args[0], self.arguments.keywords
        reason = obstacle(model_fn, X=X, **options) or search_obstacle(self.settings)
        if reason or self.group.processes is not None:
            return left_alone(update, reason)(self, params, state, X, y)
        criterion = without_generators(model_fn, options["criterion"])
        plan = replace(self, arguments=partial(self.arguments, criterion=criterion))
        if not is_chosen(self.settings, state):
            updated, ended = first_trial(plan, params, state, X, y)
            if is_all(updated[2], ended):
                return updated
        return left_alone(update, FIRST_TRIAL)(plan, params, state, X, y)


@computing
def init(first: FirstState, params: PyTree) -> State:
    """Return the state before the first update, as the public ``init`` does."""
    check_params(params)
    return first_state(params, momentum=first.momentum, sizes=first.sizes)


@computing
def update(
    plan: Update, params: PyTree, state: State, X: PyTree, y: PyTree
) -> tuple[PyTree, State, UpdateInfo]:
    """Return parameters, state and record after a step, as the public ``update`` does."""
    batch = lambda: (X, y)  # noqa: E731
    return observed_update(plan, params, state, batch, observe=lambda local, step: None)[0]


@computing
def first_trial(
    plan: Update, params: PyTree, state: State, X: PyTree, y: PyTree
) -> tuple[tuple[PyTree, State, UpdateInfo], Bool[Tensor, ""]]:
    """Return an update that ends with its first trial, and whether it does end there.

    While torch compiles, no search goes on.
    """
    batch = lambda: (X, y)  # noqa: E731
    return observed_update(
        plan, params, state, batch, observe=lambda local, step: step.taken | step.settled
    )


def _arguments(
    plan: Update, params: PyTree, state: State, X: PyTree, y: PyTree, team: Team | None
) -> tuple[Arguments, list[Int[Tensor, " _"]] | None]:
    """Return the checked arguments of a step, and samples that its damping is chosen on."""
    settings = plan.settings
    check_params(params)
    sizes = isinstance(settings.scale, str)
    check_state(state, params, momentum=bool(settings.momentum), sizes=sizes)
    # Samples that a damping is chosen on are in no step.
    step_samples, held_out, choice = None, None, settings.adaptation.choice
    if choice is not None and any_known(state.updates % choice.every == 0):
        model_fn = plan.arguments.args[0]
        step_samples, held_out = first_samples(model_fn, X, choice.fraction, team)
    grad = step_samples if plan.subsampling_grad is None else plan.subsampling_grad
    ggn = step_samples if plan.subsampling_ggn is None else plan.subsampling_ggn
    samples = {"subsampling_grad": grad, "subsampling_ggn": ggn}
    arguments = plan.arguments(params, X, y, **samples | {"process_group": team})
    return arguments, held_out


def _told(plan: Update, state: State) -> dict[str, str]:
    """Describe settings and state, which have to be the same on all ranks."""
    settings = plan.settings._asdict()
    damping, bounds, rate = (settings.pop(key) for key in ("adaptation", "box", "learning_rate"))
    settings |= {"damping": damping, "bounds": bounds, "state": state}
    settings["learning_rate"] = rate(state.updates) if callable(rate) else rate
    return options_told(settings)


def observed_update(
    plan: Update,
    params: PyTree,
    state: State,
    batch: Callable[[], tuple[PyTree, PyTree]],
    *,
    observe: Callable[[LocalModel, Step], T],
) -> tuple[tuple[PyTree, State, UpdateInfo], T]:
    """Return parameters, state and record after a step, and what is observed of its search."""
    settings = plan.settings
    # Check what was passed, on all ranks that hold samples.
    team = team_of(plan.group.processes, params)
    with agreeing(team, lambda: _told(plan, state)):
        arguments, held_out = _arguments(plan, params, state, *batch(), team)

    # Expand the loss, search for a step, and take it: by matrices, or by products, on whole
    # tensors. What passes between ranks are leaves, whose trees every rank has.
    like = params, state if state.previous == () else state._replace(previous=params)
    params, state = whole_tree(params), whole_tree(state)

    def by_model(model: QuadraticModel | FreeModel) -> tuple[list[Tensor], UpdateInfo, T]:
        local = local_model(model, settings, params, state, held_out)
        searched = search(local, settings, state.control)
        step = searched.step
        info = update_info(local, step, settings)
        notice(plan.notices, local, settings, searched, info)
        # A step that is not taken may have no finite entries: it is left out, not multiplied by 0.
        taken = not (searched.is_left or torch.compiler.is_compiling())
        direction = step.vector if taken else torch.where(step.taken, step.vector, 0)
        moved = in_params_units(local, step.rate * direction)
        following = next_state(state, local, step, direction)
        leaves = tree_leaves((added(params, moved, settings.box), following))
        return leaves, info, observe(local, step)

    def by_matrix(arguments: Arguments) -> tuple[list[Tensor], UpdateInfo, T]:
        with quadratic_model(arguments) as model:
            return by_model(model)

    def by_products(arguments: Arguments) -> tuple[list[Tensor], UpdateInfo, T]:
        with free_model(arguments) as model:
            return by_model(model)

    leaves, info, observed = either_way(
        arguments,
        by_matrix,
        by_products,
        say=partial(plan.notices.once, "free"),
        automatic=plan.automatic,
        unscaled=plan.automatic_scale,
        searches=not is_read_at_trials(settings),
    )
    if team is not None:
        pairs = zip(leaves, tree_leaves(like), strict=True)
        leaves = [leaf.to(before.device) for leaf, before in pairs]
    updated, following = placed_tree(tree_unflatten(leaves, tree_structure(like)), like)
    return (updated, following, info), observed
