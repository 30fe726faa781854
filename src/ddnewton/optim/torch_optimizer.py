"""The optimizer in the form of `torch.optim`, for modules that are trained in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from ddnewton.criteria import Criteria
from ddnewton.distributed.agreement import Processes, agreeing, team_of
from ddnewton.edge import computing_in_place
from ddnewton.errors import BadValue, sentence
from ddnewton.inputs.checks import check_nonnegative
from ddnewton.inputs.dtensor_arguments import ways_of
from ddnewton.inputs.module_function import Forward, module_functions
from ddnewton.inputs.scale import Scale
from ddnewton.inputs.term_names import one_or_several
from ddnewton.optim.adaptation import Adaptation, as_adaptation, trust_region
from ddnewton.optim.agreed_layers import Traced, agreed_layers
from ddnewton.optim.closures import batch_of_step
from ddnewton.optim.functional import FunctionalOptimizer, directional_newton
from ddnewton.optim.group_reference import GroupReference
from ddnewton.optim.modules import TracedModule, traced_terms
from ddnewton.optim.notices import Notices
from ddnewton.optim.parameter_groups import (
    as_blocks,
    group_decays,
    rate_after,
    trained_parameters,
    without_options,
)
from ddnewton.optim.settings import Complement, WeightDecay, check_weight_decay
from ddnewton.optim.state import UpdateInfo
from ddnewton.optim.stored_state import (
    as_saved,
    first_stored,
    from_stored,
    load_draws,
    restoring_draws,
    stored_draws,
    to_stored,
)
from ddnewton.quadratic.matrix_free.ways import is_automatic
from ddnewton.types import AnyModelFn, DampingRule, GramWays, Precision, PyTree, Select


class DirectionalNewton(Optimizer):
    r"""Damped Newton steps for a module, in place: `ddnewton.directional_newton` as an optimizer.

    .. code-block:: python

        optimizer = DirectionalNewton(module, torch.nn.CrossEntropyLoss(), held_out())
        for X, y in batches:
            loss = optimizer.step(X, y)

    A step needs the batch instead of gradients. There is no ``backward``, and nothing reads or
    writes ``.grad``. Parameter groups are blocks of the Gauss-Newton matrix, with ``"lr"``,
    ``"weight_decay"``, ``"damping"`` and ``"select"`` of their own. Buffers, and parameters that
    are in no group or require no gradient, are used as they are at every step; layers that mix
    samples have to be in eval mode. The layers are found in the first step, and again when the
    shape of a sample changes, or anything in the module but the trained parameters.

    Parameters
    ----------
    module
        The module to train, called with ``X``; wrappers are taken off as by `ddnewton.as_function`.
    criterion, damping, momentum, trust_radius, scale, select, complement, gram, tol, chunk_size,
    precision
        As for `ddnewton.directional_newton`.
    params
        Parameters of the module, or groups as in `torch.optim`; None: all that require gradients.
    weight_decay
        A number, which parameter groups may replace by their own, or a dict with one for the name
        of every trained parameter.
    lr
        Learning rate, for schedulers to change. None is 1, times that of the damping.
    forward
        ``forward(module, X) -> outputs``, where the outputs are not ``module(X)``; or, of a loss of
        several terms, a dict of such; X, y and criterion are dicts of the same keys.
    process_group
        As for `ddnewton.newton_step`, of X and y of ``step``. Copies share it, a pickle refuses it.

    Attributes
    ----------
    info
        The `ddnewton.UpdateInfo` of the last step; None before the first.

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
    >>> f"{losses[0]:.2f}", bool(losses[-1] < 1e-5)
    ('0.37', True)
    """

    info: UpdateInfo | None

    def __init__(
        self,
        module: nn.Module,
        criterion: Criteria,
        damping: float | Tensor | DampingRule | Adaptation | None = None,
        *,
        params: Iterable[Any] | None = None,
        lr: float | None = None,
        momentum: float | str | None = None,
        weight_decay: WeightDecay = 0.0,
        trust_radius: float | None = None,
        scale: Scale | Literal["auto"] = "auto",
        select: Select | None = None,
        complement: Complement = None,
        forward: Forward | Mapping[Any, Forward] | None = None,
        gram: GramWays = "auto",
        tol: float = 1e-2,
        chunk_size: int | None = None,
        precision: Precision = "auto",
        process_group: Processes = None,
    ) -> None:
        # Check the arguments that only this class has.
        self._functions = module_functions("DirectionalNewton", module, forward, process_group)
        if lr is not None:
            check_nonnegative("DirectionalNewton: lr", lr)
        # Keep the options: the functional optimizer is made anew in every step, for its groups.
        adaptation = as_adaptation(trust_region() if damping is None else damping)
        self._criterion = criterion
        self._base_rate = adaptation.learning_rate if lr is None else 1.0
        self._options: dict[str, Any] = {
            "damping": adaptation,
            "momentum": adaptation.momentum if momentum is None else momentum,
            "trust_radius": trust_radius,
            "scale": scale,
            "select": select,
            "complement": complement,
            "gram": gram,
            "tol": tol,
            "chunk_size": chunk_size,
            "precision": precision,
        }
        self._group = GroupReference(process_group)
        self._group_options: list[dict[str, Any]] = []
        self._traced: dict[Any, list[TracedModule]] = {}
        self._notices = Notices()
        self.info = None
        # Make the groups, and check the other options, by making an optimizer of them.
        if params is None:
            params = [p for p in self._parameters().values() if p.requires_grad]
        check_weight_decay(weight_decay)
        decay = weight_decay if isinstance(weight_decay, Mapping) else float(weight_decay)
        super().__init__(params, {"lr": 1.0 if lr is None else float(lr), "weight_decay": decay})
        optimizer = self._optimizer(one_or_several(self._functions))
        # A state from the start, for what loads a checkpoint into the entries that there are.
        self.state.update(first_stored(optimizer.init, self._trained(), self.param_groups))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the module, as a block of the Gauss-Newton matrix."""
        group, options = without_options(param_group)
        super().add_param_group(group)
        of_module = {id(p) for p in self._parameters().values()}
        if any(id(p) not in of_module for p in self.param_groups[-1]["params"]):
            self.param_groups.pop()
            rule = "DirectionalNewton: params must be parameters of the module"
            raise BadValue(sentence(rule, "others", "Pass some of module.parameters()."))
        self._group_options.append(options)

    @computing_in_place
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
            Inputs and targets; or one function in place of X that returns both, as ``closure``.
        closure
            Function that returns the batch, ``(X, y)``. Where X is given as well, it is called
            before the step, and its result is not used.
        """
        team = team_of(self._group.processes, self._parameters())
        with agreeing(team):
            # Read the batch, and the parameters as they are now.
            X, y = batch_of_step(X, y, closure)
            params = self._trained()
            # Find the layers of the module, unless they are those of the last step.
            gram, least = self._options["gram"], int(team is None)
            gram = ways_of(gram, params) if least else gram
            self._traced = traced_terms(self._traced, self._functions, params, X, gram, least)
            parts = {name: Traced(t.model_fn, t.slow) for name, (t, *_) in self._traced.items()}
            layers = agreed_layers(parts, gram, team)
            optimizer = self._optimizer(layers.model_fn, gram=layers.gram)
            state = from_stored(self.state, optimizer.init(params), params, self.param_groups)
        for reason in layers.slow:
            self._notices.once("layers", reason)
        # Make the step as a pure function of parameters and state.
        with restoring_draws(self._criterion):
            updated, state, info = optimizer.update(params, state, X, y)
        # In place, and to new dicts: those of before are not written.
        for name, p in params.items():
            p.copy_(updated[name])
        self.state.clear()
        self.state.update(to_stored(state, params, self.param_groups))
        self.info = info
        return info.loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state, including that of the random numbers of `ddnewton.monte_carlo`."""
        return super().state_dict() | stored_draws(self._criterion)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, to go on from where it was saved, on any number of ranks."""
        super().load_state_dict(as_saved(state_dict))
        load_draws(self._criterion, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes to copy or pickle: no hooks, and no layers, to be found anew."""
        names = ("_functions", "_criterion", "_base_rate", "_options", "_group_options", "_group")
        attributes: dict[str, Any] = super().__getstate__()
        attributes |= {name: getattr(self, name) for name in (*names, "_notices", "info")}
        return attributes | {"_traced": {}}

    def _parameters(self) -> dict[str, Tensor]:
        """Return the parameters of the module by name."""
        return next(iter(self._functions.values())).parameters()

    def _trained(self) -> dict[str, Tensor]:
        """Return the parameters in groups that require gradients, in the module's order."""
        return trained_parameters(self.param_groups, self._parameters())

    def _optimizer(self, model_fn: AnyModelFn, **options: Any) -> FunctionalOptimizer:
        """Return the optimizer as pure functions, with the groups as they are now."""
        optimizer = directional_newton(
            *(model_fn, self._criterion),
            learning_rate="exact" if self._base_rate == "exact" else self._rate,
            weight_decay=group_decays(self.param_groups, self._trained()),
            groups=as_blocks(self.param_groups, self._group_options, self._trained()),
            process_group=self._group.processes,
            **self._options | options,
        )
        kept: Any = {"notices": self._notices, "automatic": is_automatic(self._options["gram"])}
        return optimizer._replace(update=replace(optimizer.update, **kept))

    def _rate(self, updates: Tensor) -> float | Tensor:
        """Return the learning rate: that of the damping, times those of the groups."""
        return rate_after(self._base_rate, self.param_groups, self._trained().values(), updates)
