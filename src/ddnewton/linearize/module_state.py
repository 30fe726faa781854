"""The modules that a model refers to: every call leaves them as they were.

`torch.func.functional_call` puts other tensors in the place of a module's parameters, and does not
put all of them back where a submodule has two names. A module may also store what it computes, in
buffers, attributes, or lists and dicts of these: under a transform that are tensors which are dead
after it. So a module's ``__dict__`` and all containers in it are compared after every call, object
by object, and what changed is put back. A thread that calls a module has it to itself. Modules and
functions that are compiled are called as they were written, since no transform can look inside.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import is_
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ddnewton.errors import BadValue, sentence
from ddnewton.linearize.references import modules_of
from ddnewton.process import ONE_THREAD
from ddnewton.transforms import untransformed, unwrapped

Function: TypeAlias = Callable[..., Any]
Container: TypeAlias = "dict[Any, Any] | list[Any] | deque[Any] | set[Any]"

PARTS = (dict, list, tuple, deque, set, nn.Module)
"""What a module's attributes are searched for, and searched in."""

HOOKS = {name for name in vars(nn.Module()) if "hooks" in name}
"""Attributes of every module that hold none of these, to be passed over quickly."""

LEAVES = {Tensor, nn.Parameter, bool, int, float, str, type(None)}
"""The commonest types that are none of these."""


class ModuleBuffers(NamedTuple):
    """The buffers of one module, and copies of those that can be copied."""

    module: nn.Module
    tensors: dict[str, Tensor | None]
    copies: dict[str, tuple[int, Tensor]]  # with the number of writes to the buffer so far


class ModuleState(NamedTuple):
    """Modules as they were: what their containers held, their buffers, the flags of parameters."""

    containers: Sequence[tuple[Container, Container]]  # and a copy of each
    slots: Sequence[tuple[dict[str, Any], str, Tensor]]  # of TorchScript, that can only be set
    buffers: Sequence[ModuleBuffers]
    flags: Sequence[tuple[Tensor, bool]]
    uncompiled: Sequence[tuple[dict[str, Any], str, Any]]  # attributes to set during a call


def kept(function: Function) -> tuple[Function, Function]:
    """Return a function twice, both leaving the modules that it refers to as they are now.

    The first raises if a call changes the values of a buffer. A buffer that a model makes anew,
    from nothing or to the same values, is only put back, and so is any other attribute.
    """
    # What it refers to, as it is now; a compiled function is called as it was written.
    function = getattr(function, "_torchdynamo_orig_callable", function)
    modules = modules_of(function)
    if not modules:
        return function, function
    with ONE_THREAD:
        state = _state(modules)

    # Called by one thread at a time, with everything put back whether it fails or not.
    def call(check: Callable[[Sequence[ModuleBuffers]], None] | None, *args: Any) -> Any:
        with ONE_THREAD:
            try:
                for attributes, name, value in state.uncompiled:
                    attributes[name] = value
                result = function(*args)
                if check is not None:
                    check(state.buffers)
                return result
            finally:
                _put_back(state)

    return partial(call, _check_unchanged), partial(call, None)


def restoring(function: Function) -> Function:
    """Return a function that leaves the modules that it refers to as they are before every call."""
    if not modules_of(function):
        return function

    def call(*args: Any) -> Any:
        _, later = kept(function)
        return later(*args)

    return call


def _state(roots: Sequence[nn.Module]) -> ModuleState:
    """Return the state of modules and of all that they hold, registered or not."""
    queue: list[Any] = [module for root in roots for module in root.modules()]
    containers: list[tuple[Container, Container]] = []
    modules, seen = [], set()
    while queue:
        part = queue.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        # Take it apart; what is neither a module nor a container is left as it is.
        if isinstance(part, nn.Module):
            modules.append(part)
            part = vars(part)
            items = [value for name, value in part.items() if name not in HOOKS]
        else:
            items = list(part.values() if isinstance(part, dict) else part)
        if not isinstance(part, tuple):
            containers.append((part, _copy(part)))
        queue += [item for item in items if type(item) not in LEAVES and isinstance(item, PARTS)]
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    scripted = [module for module in modules if isinstance(module, torch.jit.ScriptModule)]
    dicts: Any = [tensors for m in scripted for tensors in (m._parameters, m._buffers)]
    return ModuleState(
        containers=containers,
        slots=[(tensors, name, tensor) for tensors in dicts for name, tensor in tensors.items()],
        buffers=[_buffers(module) for module in modules if module._buffers],
        flags=[(p, p.requires_grad) for p in parameters],
        uncompiled=[change for module in modules for change in _uncompiled(module)],
    )


def _uncompiled(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Yield what makes a compiled module one that is not, as attributes, name and value."""
    attributes = vars(module)
    if attributes.get("_compiled_call_impl") is not None:  # by module.compile()
        yield attributes, "_compiled_call_impl", None
    if "dynamo_ctx" in attributes:  # by torch.compile(module)
        original: Any = module._orig_mod
        yield attributes, "forward", original.__call__


def _copy(container: Container) -> Container:
    """Return a plain copy of a container."""
    if isinstance(container, dict):
        return dict(container)
    return set(container) if isinstance(container, set) else list(container)


def _buffers(module: nn.Module) -> ModuleBuffers:
    """Copy the buffers of a module, except those that have no values yet."""
    tensors = dict(module._buffers)
    copies = {
        name: (writes(buffer), buffer.clone())
        for name, buffer in tensors.items()
        if buffer is not None and not buffer.is_meta and not is_lazy(buffer)
    }
    return ModuleBuffers(module, tensors, copies)


def _put_back(state: ModuleState) -> None:
    """Put back what has changed."""
    # The objects that containers hold: a module's ``__dict__``, its parameters, lists in it, …
    for container, before in state.containers:
        if not _is_same(container, before):
            _refill(container, before)
    for slots, name, tensor in state.slots:
        if slots[name] is not tensor:
            slots[name] = tensor
    # The values of buffers that were written to, and flags of parameters: a transform hides them.
    with torch.no_grad(), untransformed():
        for _, buffers, copies in state.buffers:
            for name, (version, copy) in copies.items():
                buffer = buffers[name]
                if buffer is not None and writes(buffer) != version:
                    buffer.copy_(copy)
                    copies[name] = (writes(buffer), copy)
        for parameter, flag in state.flags:
            if parameter.requires_grad is not flag:
                parameter.requires_grad_(flag)


def _is_same(container: Container, before: Container) -> bool:
    """Return whether a container holds the objects that it held, in the same order."""
    if len(container) != len(before):
        return False
    if not before:
        return True
    if isinstance(container, set):
        return container == before
    same_objects = all(map(is_, container, before))
    if isinstance(container, dict) and isinstance(before, dict):
        same_objects = same_objects and all(map(is_, container.values(), before.values()))
    return same_objects


def _refill(container: Container, before: Container) -> None:
    """Let a container hold what it held before, in the same order."""
    container.clear()
    if isinstance(container, dict) and isinstance(before, dict):
        for key, value in before.items():  # a Counter's update would add
            container[key] = value
    elif isinstance(container, set):
        container.update(before)
    elif isinstance(container, (list, deque)):
        container.extend(before)


def _check_unchanged(state: Sequence[ModuleBuffers]) -> None:
    """Require every buffer to have the values that it had."""
    for module, buffers, copies in state:
        now = dict(module._buffers)
        for name, (version, copy) in copies.items():
            buffer = now.get(name)
            # The same tensor, not written to, needs no look at its values.
            if buffer is not None and buffer is buffers[name] and writes(buffer) == version:
                continue
            if buffer is None or not equal(unwrapped(buffer), copy):
                rule = "model_fn must not change what it refers to"
                got = f"a change of the buffer {name!r} of {type(module).__name__}"
                remedy = "Put the module in eval mode, or return what is counted as an output."
                raise BadValue(sentence(rule, got, remedy))


def writes(buffer: Tensor) -> int:
    """Return the number of writes to a tensor, −1 if it was made in inference mode."""
    return -1 if buffer.is_inference() else buffer._version


def equal(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors have the same shape, dtype, device and values; nan equals nan."""
    if (left.shape, left.dtype, left.device) != (right.shape, right.dtype, right.device):
        return False
    left, right = left.to_dense(), right.to_dense()
    if torch.equal(left, right):  # the quickest, if there is no nan
        return True
    return bool(torch.isclose(left, right, rtol=0, atol=0, equal_nan=True).all())
