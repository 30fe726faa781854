"""The optimizer in the form of `torch.optim`, for modules that are trained in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ddnewton.criteria import AnyCriterion, MonteCarlo
from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.inputs.checks import check_batch, check_damping, check_nonnegative, check_select
from ddnewton.inputs.groups import Group
from ddnewton.optim.adaptation import Adaptation, as_adaptation, levenberg_marquardt
from ddnewton.optim.functional import FunctionalOptimizer, directional_newton
from ddnewton.optim.modules import Forward, Known, as_function, known
from ddnewton.optim.settings import Complement
from ddnewton.optim.state import State, UpdateInfo
from ddnewton.types import DampingRule, GramWay, ModelFn, PyTree, Select

GROUP_OPTIONS = ("select", "damping")
"""What a group has of its own; functions among it are not part of the state."""


class DirectionalNewton(Optimizer):
    r"""Damped Newton steps for a module, in place: `ddnewton.directional_newton` as an optimizer.

    .. code-block:: python

        optimizer = DirectionalNewton(module, torch.nn.CrossEntropyLoss(), held_out())
        for X, y in batches:
            loss = optimizer.step(X, y)

    A step needs the batch instead of gradients. There is no ``backward``, and nothing reads or
    writes ``.grad``. For code that insists on closures, ``step(closure)`` takes a function that
    returns the batch, ``(X, y)``. Parameter groups are blocks of the Gauss-Newton matrix, with
    ``"lr"``, ``"damping"`` and ``"select"`` of their own. Buffers, and parameters that are in no
    group or require no gradient, are used as they are at every step; layers that mix samples have
    to be in eval mode. The layers are found once, and again when shapes of samples change, or
    anything that the module holds besides what is trained.

    Parameters
    ----------
    module
        The module to train. It is called with ``X``.
    criterion, damping, momentum, weight_decay, trust_radius, select, complement, gram, chunk_size
        As for `ddnewton.directional_newton`.
    params
        Parameters of the module, or groups of them as in `torch.optim`; None is one group of all
        that require gradients.
    lr
        Learning rate, for schedulers to change. None is 1, times what goes with the damping.
    forward
        ``forward(module, X) -> outputs``, where that is not ``module(X)``.

    Attributes
    ----------
    info
        What the last step did, a `ddnewton.UpdateInfo`; None before the first.

    Raises
    ------
    ValueError, TypeError
        Where an argument breaks a rule, here or in ``step``; the message names it.

    Examples
    --------
    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    >>> X = torch.rand(50, 2)
    >>> optimizer = DirectionalNewton(net, torch.nn.MSELoss())
    >>> losses = [optimizer.step(X, X.prod(1, keepdim=True)) for _ in range(20)]
    >>> f"{losses[0]:.2f} -> {losses[-1]:.0e}"
    '0.37 -> 5e-07'
    """

    info: UpdateInfo | None

    def __init__(
        self,
        module: nn.Module,
        criterion: AnyCriterion,
        damping: float | Tensor | DampingRule | Adaptation | None = None,
        *,
        params: Iterable[Any] | None = None,
        lr: float | None = None,
        momentum: float | str | None = None,
        weight_decay: float = 0.0,
        trust_radius: float | None = None,
        select: Select | None = None,
        complement: Complement = None,
        forward: Forward | None = None,
        gram: GramWay = "auto",
        chunk_size: int | None = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            rule, remedy = "DirectionalNewton: module must be an nn.Module", "Pass the net itself."
            raise BadType(sentence(rule, type(module).__name__, remedy))
        if lr is not None:
            check_nonnegative("DirectionalNewton: lr", lr)
        adaptation = as_adaptation(levenberg_marquardt() if damping is None else damping)
        self._module = module
        self._forward = forward
        self._criterion = criterion
        self._base = adaptation.learning_rate if lr is None else 1.0
        self._options: dict[str, Any] = {
            "damping": adaptation,
            "momentum": adaptation.momentum if momentum is None else momentum,
            "weight_decay": weight_decay,
            "trust_radius": trust_radius,
            "select": select,
            "complement": complement,
            "gram": gram,
            "chunk_size": chunk_size,
        }
        self._rules: list[dict[str, Any]] = []
        self._known: Known | None = None
        self.info = None
        if params is None:
            params = [p for p in module.parameters() if p.requires_grad]
        super().__init__(params, {"lr": 1.0 if lr is None else float(lr)})
        self._optimizer(as_function(module, forward))  # raises where an option breaks a rule

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the module, as a block of the Gauss-Newton matrix."""
        group = dict(param_group)
        unknown = set(group) - {"params", "lr", "initial_lr", *GROUP_OPTIONS}
        if unknown:
            rule = "DirectionalNewton: a group has params, lr, damping and select of its own"
            raise BadValue(sentence(rule, ", ".join(sorted(unknown)), "Pass it for all groups."))
        rules = {key: group.pop(key, None) for key in GROUP_OPTIONS}
        if rules["damping"] is not None:
            check_damping("damping", rules["damping"])
        check_select("select", rules["select"])
        if "lr" in group:
            check_nonnegative("DirectionalNewton: lr of a group", group["lr"])
        super().add_param_group(group)
        names = {id(p) for p in self._module.parameters()}
        if any(id(p) not in names for p in self.param_groups[-1]["params"]):
            self.param_groups.pop()
            rule = "DirectionalNewton: params must be parameters of the module"
            raise BadValue(sentence(rule, "others", "Pass some of module.parameters()."))
        self._rules.append(rules)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        X: PyTree = None,
        y: PyTree = None,
        *,
        closure: Callable[[], Any] | None = None,
    ) -> Tensor:
        """Update the parameters by a step on a batch, and return the loss before it.

        Parameters
        ----------
        X, y
            Inputs and targets; or one function that returns both, as ``closure``.
        closure
            Function that returns the batch, ``(X, y)``; where X is given as well, it is called
            before the step, and what it returns is not used.
        """
        X, y = _batch(X, y, closure)
        params = self._params()
        model_fn = as_function(self._module, self._forward)
        if self._options["gram"] != "dense":
            check_batch(X=X)
            self._known = known(self._known, model_fn, self._module, params, X)
            model_fn = self._known.model_fn
        optimizer = self._optimizer(model_fn)
        state = self._state(optimizer.init(params))
        with self._drawing():
            moved, state, info = optimizer.update(params, state, X, y)
        for name, p in params.items():
            p.copy_(moved[name])
        self._keep(state)
        self.info = info
        return info.loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with that of the random numbers of `ddnewton.monte_carlo`."""
        found = super().state_dict()
        if isinstance(self._criterion, MonteCarlo):
            found["generator"] = self._criterion.generator.get_state()
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state as if nothing had come between."""
        super().load_state_dict(state_dict)
        if isinstance(self._criterion, MonteCarlo) and "generator" in state_dict:
            self._criterion.generator.set_state(state_dict["generator"].cpu())

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied or pickled: all but hooks, as in torch, and what can be found."""
        own = ("_module", "_forward", "_criterion", "_base", "_options", "_rules", "info")
        found: dict[str, Any] = super().__getstate__()
        return found | {name: getattr(self, name) for name in own} | {"_known": None}

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Take back the random numbers that were drawn for a step which is refused."""
        generator = self._criterion.generator if isinstance(self._criterion, MonteCarlo) else None
        before = None if generator is None else generator.get_state()
        try:
            yield
        except BaseException:
            if generator is not None and before is not None:
                generator.set_state(before)
            raise

    def _all_params(self) -> list[Tensor]:
        """Return the parameters of all groups, in their order."""
        return [p for group in self.param_groups for p in group["params"]]

    def _params(self) -> dict[str, Tensor]:
        """Return those that require gradients, by their names, in the module's order."""
        mine = {id(p) for p in self._all_params()}
        named = dict(self._module.named_parameters())
        if not mine <= {id(p) for p in named.values()}:
            rule = "step: the parameters of all groups must still be those of the module"
            remedy = "Load with assign=False, or make the optimizer after changing the module."
            raise BadValue(sentence(rule, "others in their place", remedy))
        return {name: p for name, p in named.items() if id(p) in mine and p.requires_grad}

    def _optimizer(self, model_fn: ModelFn) -> FunctionalOptimizer:
        """Return the optimizer as functions, as the groups are now."""
        groups = None
        if len(self.param_groups) > 1 or any(rule is not None for rule in self._rules[0].values()):
            names = {id(p): name for name, p in self._params().items()}
            groups = [
                Group([names[id(p)] for p in group["params"] if id(p) in names], **rules)
                for group, rules in zip(self.param_groups, self._rules, strict=True)
            ]
            groups = [group for group in groups if group.params]
        return directional_newton(
            model_fn,
            self._criterion,
            learning_rate="exact" if self._base == "exact" else self._rate,
            groups=groups,
            **self._options,
        )

    def _rate(self, updates: Tensor) -> float | Tensor:
        """Return the learning rate, or one for every parameter where groups have their own."""
        base = self._base(updates) if callable(self._base) else self._base
        rates = {id(p): group["lr"] for group in self.param_groups for p in group["params"]}
        if len(set(rates.values())) == 1:
            rate: float | Tensor = base * next(iter(rates.values()))
            return rate
        each = [
            torch.full((p.numel(),), float(rates[id(p)]), dtype=torch.float64)
            for p in self._params().values()
        ]
        return torch.as_tensor(base * torch.cat(each).to(updates.device))

    def _state(self, first: State) -> State:
        """Return the state of the optimizer as functions."""
        kept = self.state.get(self._all_params()[0], {})
        if not kept:
            return first
        return State(
            updates=first.updates + kept["step"],
            control=torch.full_like(first.control, kept["control"]),
            damping=torch.full_like(first.damping, kept["damping"]),
            previous=first.previous
            and {
                name: self.state.get(p, {}).get("previous", first.previous[name])
                for name, p in self._params().items()
            },
        )

    def _keep(self, state: State) -> None:
        """Keep a state: plain numbers, which loading leaves as they are, and the step before."""
        params = self._params() if state.previous else {}
        kept = {p: {"previous": state.previous[name]} for name, p in params.items()}
        first = self._all_params()[0]
        numbers = {"control": state.control.item(), "damping": state.damping.item()}
        kept[first] = kept.get(first, {}) | {"step": int(state.updates), **numbers}
        self.state.clear()  # and written to no more: what state_dict returned stays what it was
        self.state.update(kept)


def _batch(X: PyTree, y: PyTree, closure: Callable[[], Any] | None) -> tuple[PyTree, PyTree]:
    """Return the batch, given as such or by a function."""
    if callable(X) and y is None and closure is None:
        X, closure = None, X
    if closure is not None:
        given = closure()
        if X is None:
            if not (isinstance(given, (tuple, list)) and len(given) == 2):
                rule = "step: closure must return the batch, (X, y)"
                remedy = "There is no backward: pass X and y, or a function that returns them."
                raise BadType(sentence(rule, type(given).__name__, remedy))
            X, y = given
    if X is None or y is None:
        rule, remedy = "step: a step needs a batch", "Pass step(X, y), or a closure returning both."
        raise BadType(sentence(rule, "none" if X is None else "X without y", remedy))
    return X, y
