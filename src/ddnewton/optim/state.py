"""The records of an update: the state for the next one, and what was done."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.quadratic.term import TermLosses
from ddnewton.trees import as_real, tree_leaves, tree_map
from ddnewton.types import PyTree


class State(NamedTuple):
    """The tensors that the next update needs, to be saved, loaded and mapped over."""

    updates: Int[Tensor, ""]
    """How many updates there have been."""
    control: Float[Tensor, ""]
    """The number that adapts: the damping, its multiple of the mean eigenvalue, or the longest
    step; nan where it is to start anew."""
    damping: Float[Tensor, ""]
    """δ of the last step; nan before the first."""
    previous: PyTree
    """The step before, before the learning rate, like the parameters; () without momentum."""
    sizes: PyTree
    """The largest sizes √G_jj of the columns so far, like the parameters, a complex one as a pair
    of reals; () unless the scale of the parameters is by them."""


class UpdateInfo(NamedTuple):
    """The record of an update."""

    loss: Float[Tensor, ""]
    loss_after: Float[Tensor, ""]
    """On the same samples; both with the penalty of weight decay."""
    predicted_decrease: Float[Tensor, ""]
    """Of the quadratic model, along the step that was taken; of an arc t s + t² c, along t s."""
    ratio: Float[Tensor, ""]
    """Actual over predicted decrease."""
    damping: Float[Tensor, ""]
    """δ, of all directions; what a rule or a group adds is not in it."""
    learning_rate: Float[Tensor, ""]
    """The mean over the parameters where groups have their own, as in `ddnewton.optim`."""
    step_norm: Float[Tensor, ""]
    gradient_norm: Float[Tensor, ""]
    """Without the penalty of weight decay."""
    gradient_share: Float[Tensor, ""]
    """Share of the squared gradient norm inside the kept directions, of all groups together; nan
    where no eigenpairs were needed."""
    rank: Float[Tensor, ""]
    """Number of eigenvalues above the rank tolerance, of all groups; nan likewise."""
    attempts: Int[Tensor, ""]
    """How many dampings were tried."""
    accepted: Bool[Tensor, ""]
    """Whether one was taken; if not, the parameters are what they were."""
    flat_share: Float[Tensor, ""]
    """Share of the squared gradient norm without any curvature, as in `NewtonInfo`, of all groups
    together; nan where no eigenpairs were needed, or only leading ones."""
    losses: TermLosses
    """The losses of the terms by their names, without the penalty; or the loss, of one term."""


def first_state(params: PyTree, *, momentum: bool, sizes: bool) -> State:
    """Return the state before the first update."""
    device = tree_leaves(params)[0].device
    unknown = torch.full((), torch.nan, dtype=torch.float64, device=device)
    return State(
        updates=torch.zeros((), dtype=torch.int64, device=device),
        control=unknown,
        damping=unknown.clone(),
        previous=tree_map(torch.zeros_like, params) if momentum else (),
        sizes=tree_map(torch.zeros_like, as_real(params)) if sizes else (),
    )


def check_state(state: object, params: PyTree, *, momentum: bool, sizes: bool) -> None:
    """Require a state of these parameters, of an optimizer with the same momentum and scale."""
    remedy = "Pass what init(params), or the last update, returned."
    if not isinstance(state, State):
        raise BadType(sentence("state must be a State", type(state).__name__, remedy))
    parts = {
        "momentum": ("another step before", state.previous, params if momentum else ()),
        "scale": ("other sizes of columns", state.sizes, as_real(params) if sizes else ()),
    }
    for option, (got, tree, like) in parts.items():
        shapes = [leaf.shape for leaf in tree_leaves(like)]
        if [leaf.shape for leaf in tree_leaves(tree)] != shapes:
            rule = (
                f"state must be of the same parameters, and of an optimizer with the same {option}"
            )
            raise BadValue(sentence(rule, got, remedy))
