"""`as_function`: a module as a pure function of the parameters that it trains."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, overload

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ddnewton.errors import BadType, BadValue, sentence, warn
from ddnewton.inputs.term_names import EXAMPLE, is_several
from ddnewton.process import ONE_THREAD
from ddnewton.types import PyTree

FSDP_REMEDY = (
    "Call a copy of the module from before, or one made on the meta device, with gathered "
    "parameters: lambda p, X: functional_call(copy, {name: x.full_tensor() for name, x in "
    "p.items()}, (X,)); and let params be dict(module.named_parameters())."
)

Forward: TypeAlias = Callable[[Any, Any], Tensor]
"""``forward(module, X) -> outputs``."""


@dataclass(frozen=True)
class ModuleFunction:
    """A module as ``model_fn(params, X)``; it can be pickled where module and forward can."""

    module: nn.Module
    forward: Forward | None = None

    def __call__(self, params: Mapping[str, Tensor], X: PyTree) -> Tensor:
        """Return the module's outputs with other tensors in the place of its parameters."""
        with ONE_THREAD:
            # A parameter is replaced wherever the module has it. A module of two names is one.
            slots = {
                f"{prefix}{'.' if prefix else ''}{name}": (part._parameters, name, p)
                for prefix, part in self.module.named_modules()
                for name, p in part._parameters.items()
                if p is not None
            }
            unknown = params.keys() - slots.keys()
            if unknown:
                rule = "params must have the names of parameters of the module"
                raise BadValue(sentence(rule, sorted(unknown), "Pass those of as_function."))
            values = {id(slots[name][2]): value for name, value in params.items()}
            if len(values) < len(params):
                rule = "params must have one value for a parameter that is tied"
                raise BadValue(sentence(rule, "several", "Pass those of as_function."))
            replaced = [slot for slot in slots.values() if id(slot[2]) in values]
            try:
                for parameters, name, p in replaced:
                    parameters[name] = values[id(p)]
                return self.module(X) if self.forward is None else self.forward(self.module, X)
            finally:
                for parameters, name, p in replaced:
                    parameters[name] = p

    def parameters(self) -> dict[str, Tensor]:
        """Return the parameters of the module by name, while no other thread calls it."""
        with ONE_THREAD:
            return dict(self.module.named_parameters())


@overload
def as_function(
    module: nn.Module, forward: Forward | None = None
) -> tuple[ModuleFunction, dict[str, Tensor]]: ...
@overload
def as_function(
    module: nn.Module, forward: Mapping[Any, Forward]
) -> tuple[dict[Any, ModuleFunction], dict[str, Tensor]]: ...
def as_function(
    module: nn.Module, forward: Forward | Mapping[Any, Forward] | None = None
) -> tuple[ModuleFunction | dict[Any, ModuleFunction], dict[str, Tensor]]:
    """Return a module as a pure function, and the parameters that it is a function of.

    .. code-block:: python

        model_fn, params = as_function(net)
        step = newton_step(model_fn, params, X, y, criterion, damping)

    Buffers and frozen parameters are used as the module has them at every call. Parameters that
    are tied are one, under the first of their names, and so are those of a submodule that has two
    names. The module itself is left as it is; ``params`` share its memory.

    Parameters
    ----------
    module
        A module. `torch.nn.DataParallel`, `torch.nn.parallel.DistributedDataParallel` and
        `torch.compile` are taken off: names are those of the module inside.
    forward
        ``forward(module, X) -> outputs``, where the outputs are not ``module(X)``; for models of
        Hugging Face ``lambda module, X: module(**X).logits``. For a loss of several terms, a dict
        of such functions.

    Returns
    -------
    model_fn
        ``model_fn(params, X) -> outputs``. It can be pickled where module and forward can. A dict
        of them where ``forward`` is one.
    params
        The parameters that require gradients, by name, detached.

    Raises
    ------
    ValueError, TypeError
        Where an argument breaks a rule, or no parameter requires a gradient.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1))
    >>> _ = net[2].requires_grad_(False)
    >>> model_fn, params = as_function(net)
    >>> {name: tuple(p.shape) for name, p in params.items()}
    {'0.weight': (2, 3), '0.bias': (2,)}
    >>> X = torch.ones(4, 3)
    >>> torch.equal(model_fn(params, X), net(X))
    True
    """
    # The function, and its parameters: some to train, all of them with values.
    functions = module_functions("as_function", module, forward)
    first = next(iter(functions.values()))
    params = {name: p for name, p in first.parameters().items() if p.requires_grad}
    if not params:
        rule = "as_function: a parameter of the module must require a gradient"
        remedy = "Call requires_grad_()."
        raise BadValue(sentence(rule, "none", remedy))
    lazy = [name for name, p in params.items() if is_lazy(p)]
    if lazy:
        rule, remedy = (
            "as_function: parameters must have values",
            "Call the module on a batch first.",
        )
        raise BadValue(sentence(rule, f"none yet of {', '.join(lazy)}", remedy))
    model_fn = functions if is_several(forward) else first
    return model_fn, {name: p.detach() for name, p in params.items()}


def module_functions(
    caller: str,
    module: nn.Module,
    forward: Forward | Mapping[Any, Forward] | None,
    process_group: object = None,
) -> dict[Any, ModuleFunction]:
    """Return a module, without what runs it in parallel or compiled, as a function of every term.

    The name of a loss that is one term is None. Where samples are of a ``process_group``, it stands
    in for what a wrapper exchanges.
    """
    if not isinstance(module, nn.Module):
        rule, remedy = f"{caller}: module must be an nn.Module", "Pass the net itself."
        raise BadType(sentence(rule, type(module).__name__, remedy))
    # Of every term a function; of the only one, which may be the module's own, None.
    several = isinstance(forward, Mapping)
    forwards = dict(forward) if isinstance(forward, Mapping) else {None: forward}
    for function in forwards.values():
        if not callable(function) and (several or function is not None):
            rule = f"{caller}: forward must be a function of module and X"
            remedy = "Pass forward(module, X), or a dict of such, one for every term."
            raise BadType(sentence(rule, type(function).__name__, remedy))
    if not forwards:
        rule, remedy = f"{caller}: forward must hold at least one term", f"Pass {EXAMPLE}."
        raise BadValue(sentence(rule, "an empty dict", remedy))
    inside = _inside_wrappers(module, exchanging=process_group is not None)
    check_not_fully_sharded(caller, [inside])
    return {name: ModuleFunction(inside, function) for name, function in forwards.items()}


def check_not_fully_sharded(where: str, modules: Sequence[nn.Module]) -> None:
    """Refuse modules of FSDP, whose hooks put their own parameters in the place of others."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    kinds = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
    for part in (part for module in modules for part in module.modules()):
        if isinstance(part, kinds):
            rule = f"{where}: a module must be called with any parameters, which FSDP replaces"
            raise BadValue(sentence(rule, type(part).__name__, FSDP_REMEDY))


def _inside_wrappers(module: nn.Module, *, exchanging: bool) -> nn.Module:
    """Return the module inside of wrappers that run it in parallel or compiled.

    It has the same parameters, under names without the wrapper's prefix.
    """
    while True:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            if module.process_group.size() > 1 and not exchanging:
                warn(
                    "nothing is exchanged with other processes by the module: a step is that of the"
                    " batch of this process alone, and modules stay the same only where all have "
                    "the same batches, or the step has a process_group. Pass module.module and "
                    "process_group=module.process_group."
                )
            module = module.module
        elif isinstance(module, nn.DataParallel):
            module = module.module
        elif "dynamo_ctx" in vars(module):  # torch._dynamo is not imported only to ask for its type
            module = module._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            return module
