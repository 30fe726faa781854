"""A module as a pure function of its trained parameters, traced anew when the module changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddnewton.inputs.checks import check_batch
from ddnewton.inputs.module_function import ModuleFunction
from ddnewton.inputs.term_names import Name, about_term, check_keys, of_term, one_or_several
from ddnewton.linearize.independence import evaluate
from ddnewton.linearize.module_state import equal, writes
from ddnewton.linearize.structured.costs import dense_flops, is_tiny
from ddnewton.linearize.structured.prepare import Untraceable, no_layers, prepare
from ddnewton.linearize.structured.traced_model import Prepared
from ddnewton.process import ONE_THREAD
from ddnewton.trees import (
    TreeSpec,
    device_to_go_to,
    moving,
    parameter_count,
    sample_count,
    take,
    tree_flatten,
)
from ddnewton.types import GramWays, ModelFn, PyTree

COMPARED_BY_VALUE = (
    bool,
    int,
    float,
    complex,
    str,
    torch.dtype,
    torch.device,
    torch.Size,
    TreeSpec,
)
"""Types compared by value; everything else in a module is compared by identity."""

UPDATES_TO_TRACE = 40
"""How many updates of a tiny problem a trace takes as long as, and saves half of each."""

FLOPS_OF_NODE = 5e7
"""How many flops of dense products take as long as tracing one operation: some milliseconds."""

TRACES_KEPT = 4
"""The number of shapes of samples that traces are kept for, such as lengths of sentences."""


class TracedModule(NamedTuple):
    """A module as a function, perhaps with known layers, and what it was when it was looked at."""

    model_fn: ModelFn
    fingerprint: list[object]
    untrained: list[Tensor]  # copies: writing through .data leaves no other trace
    slow: str | None  # why it has no layers; empty where that costs nothing, None where it has
    updates_left: int  # until it is traced, below 0 after that


def traced_terms(
    before: Mapping[Name, Sequence[TracedModule]],
    functions: Mapping[Name, ModuleFunction],
    params: PyTree,
    X: PyTree,
    gram: GramWays,
    least: int = 1,
) -> dict[Name, list[TracedModule]]:
    """Return the function of every term, in front of those before: as `traced_modules` does.

    Layers are searched for at once where columns are to be formed from them, and not at all where
    they are to be dense, or free. There are the ``least`` number of samples of every term, or more;
    where there are none, those before are kept.
    """
    # Refuse terms that X is not of.
    check_keys(one_or_several(functions), X=X)
    traced = {}
    for name, function in functions.items():
        way = gram[name] if isinstance(gram, Mapping) else gram
        kept, inputs = before.get(name, []), of_term(X, name)
        with about_term(name):
            check_batch(X=inputs, least=least)
            # A sample is looked at, where layers are asked for and there is one.
            looks = way in ("auto", "structured")
            if looks and sample_count(inputs):
                traced[name] = traced_modules(kept, function, params, inputs, way == "structured")
            else:
                unseen = TracedModule(function, [], [], None if looks else "", -1)
                traced[name] = [unseen, *(one for one in kept if one.fingerprint)]
    return traced


def traced_modules(
    before: Sequence[TracedModule],
    model_fn: ModuleFunction,
    params: PyTree,
    X: PyTree,
    at_once: bool,
) -> list[TracedModule]:
    """Return a module as a function, in front of those before: one of these, while it is right.

    It is not where samples have another shape, or where the module has changed: other buffers,
    untrained parameters, submodules, attributes, hooks or modes. The layers are searched for
    ``at_once``, or when the updates without them have taken as long as the search does. For a
    module that cannot be traced the function is ``model_fn``, without layers.
    """
    module = model_fn.module
    with ONE_THREAD:
        # One before holds as long as nothing has changed but the trained parameters.
        trained = {id(p) for p in params.values()}
        tensors = (*module.parameters(), *module.buffers())
        untrained = [tensor for tensor in tensors if id(tensor) not in trained]
        fingerprint = list(_fingerprint(module, trained, params, X))
        fingerprinted = [one for one in before if one.fingerprint]
        alike = [one for one in fingerprinted if _all_alike(equal, one.untrained, untrained)]
        right = (one for one in alike if _all_alike(_is_same, one.fingerprint, fingerprint))
        current = next(right, None)
        kept = [one for one in alike if one is not current][: TRACES_KEPT - 1]
        if current is None:
            copies = kept[0].untrained if kept else [x.detach().clone() for x in untrained]
            count = 0 if at_once else _updates_to_trace(kept, model_fn, params, X)
            current = TracedModule(model_fn, fingerprint, copies, "", count)
        # Trace the module when it is time to, or call it as it is where that fails.
        if current.updates_left == 0:
            traced, slow = with_layers(model_fn, params, X, sample_count(X))
            current = current._replace(model_fn=traced, slow=slow)
        return [current._replace(updates_left=current.updates_left - 1), *kept]


def _updates_to_trace(
    before: Sequence[TracedModule], model_fn: ModelFn, params: PyTree, X: PyTree
) -> int:
    """Return how many updates without layers take as long as finding these.

    Of a tiny problem they save half of an update's overhead, of any other its dense products; what
    a trace of it takes is told by one of samples of another shape, and until there is one, nothing.
    """
    count, d = output_count(model_fn, params, X, sample_count(X)), parameter_count(params)
    if is_tiny(count, d):
        return UPDATES_TO_TRACE
    graphs = [one.model_fn.sample.graph for one in before if isinstance(one.model_fn, Prepared)]
    nodes = len(graphs[0].nodes) if graphs else 0
    return int(nodes * FLOPS_OF_NODE / dense_flops(count, d))


def output_count(model_fn: ModelFn, params: PyTree, X: PyTree, n: int) -> int:
    """Return the number of outputs of n samples, given some of them, perhaps on the host."""
    here = moving(model_fn, device_to_go_to(X, params))
    outputs = evaluate(here, params, take(X, slice(0, 1)), None).outputs
    return outputs.numel() * n


def with_layers(model_fn: ModelFn, params: PyTree, X: PyTree, n: int) -> tuple[ModelFn, str | None]:
    """Return a module as a function with layers, or as it is and why it has none.

    Of a batch of n samples some are given.
    """
    try:
        return prepare(model_fn, params, X), None
    except Untraceable as reason:
        tiny = is_tiny(output_count(model_fn, params, X, n), parameter_count(params))
        return model_fn, "" if tiny else no_layers(reason)


def _fingerprint(
    module: nn.Module, trained: set[int], params: PyTree, X: PyTree
) -> Iterator[object]:
    """Yield all that a trace depends on, except the values of the module's tensors."""
    # One sample of the batch: structure, shapes, dtypes and devices.
    leaves, structure = tree_flatten(X)
    yield structure
    for leaf in leaves:
        yield from (leaf.shape[1:], leaf.dtype, leaf.device)
    # The trained parameters, without their values.
    for name, p in params.items():
        yield from (name, p.shape, p.dtype, p.device)
    # Whether torch rounds on purpose.
    device = leaves[0].device.type
    yield from (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
    # The attributes of all submodules.
    for submodule in module.modules():
        yield submodule.training  # no attribute of Python's in a scripted module
        for name, value in vars(submodule).items():
            if name.startswith("_flat_weight"):  # a recurrent layer's parameters once more
                continue
            yield name
            # Of parameters and buffers the names alone: their values are passed to the trace, or
            # compared by `traced_modules`.
            of_tensors = name in {"_parameters", "_buffers"}
            yield from _comparable_parts(list(value.keys()) if of_tensors else value, trained)


def _comparable_parts(value: object, trained: set[int]) -> Iterator[object]:
    """Yield the objects in an attribute, with the containers taken apart."""
    if isinstance(value, (list, tuple)):
        yield len(value)
        for item in value:
            yield from _comparable_parts(item, trained)
    elif isinstance(value, dict):
        yield from value
        yield from _comparable_parts(list(value.values()), trained)
    else:
        yield value
        # A tensor that is written to in place stays the same object, but counts the writes.
        if isinstance(value, Tensor) and id(value) not in trained:
            yield writes(value)


def _all_alike(
    alike: Callable[[Any, Any], bool], before: Sequence[object], now: Sequence[object]
) -> bool:
    """Return whether two sequences are equally long, and alike item by item."""
    return len(before) == len(now) and all(map(alike, before, now))


def _is_same(before: object, now: object) -> bool:
    """Return whether two objects are one, or equal where values are compared."""
    return before is now or (
        type(before) is type(now) and isinstance(before, COMPARED_BY_VALUE) and before == now
    )
