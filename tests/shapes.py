"""The run-time checker of the tests: shapes and dtypes of tensors, and nothing else.

What else a user may pass is the business of ddnewton's own checks, whose messages are tested.
"""

import functools
import inspect
import threading
import typing
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., object])


def check_shapes(function: F) -> F:
    """Check the annotations of a function that name a tensor's axes."""
    from beartype import beartype  # here, so that the measures of the house need no package

    shapes = {name: hint for name, hint in function.__annotations__.items() if is_shape(hint)}
    function.__annotations__ = shapes
    return beartype(function)


def is_shape(hint: object) -> bool:
    """Return whether an annotation is one of jaxtyping's, evaluated or not."""
    return "[Tensor," in (hint if isinstance(hint, str) else str(hint))


def evaluated(function: Callable[..., object]) -> inspect.Signature:
    """Return a signature whose annotations are no strings; what has no value may be anything."""

    def value(hint: object) -> object:
        def holder(): ...

        holder.__annotations__ = {"hint": hint}
        try:
            names = function.__globals__
            return typing.get_type_hints(holder, names, include_extras=True)["hint"]
        except Exception:  # noqa: BLE001 - as jaxtyping has it
            return Any

    signature = inspect.signature(function)
    arguments = [a.replace(annotation=value(a.annotation)) for a in signature.parameters.values()]
    result = value(signature.return_annotation)
    return signature.replace(parameters=arguments, return_annotation=result)


class Latest(threading.local):
    """The functions that a stand-in is to call, the last one first: in every thread its own."""

    def __init__(self) -> None:
        self.functions: list[Callable[..., object]] = []


def stand_in(
    function: Callable[..., object], decorate: Callable[..., Any]
) -> tuple[Latest, Callable[..., Any]] | None:
    """Return functions to call, and what checks and calls the last of them; or nothing."""
    signature, latest = evaluated(function), Latest()
    hints = [a.annotation for a in signature.parameters.values()]
    if not any(map(is_shape, [*hints, signature.return_annotation])):
        return None

    def call(*args, **kwargs):
        return latest.functions.pop()(*args, **kwargs)

    for name in ("__name__", "__qualname__", "__module__"):
        setattr(call, name, getattr(function, name))
    call.__signature__ = signature
    return latest, decorate(call)


def jaxtyped_once(jaxtyped: Callable[..., Any]) -> Callable[..., Any]:
    """Return jaxtyping's decorator, but quick for functions that are defined again and again.

    The import hook decorates a function inside a function at every call of the outer one, and each
    time writes and compiles the code of its checks: a third of the time of all tests. Here a `def`
    is looked at once. Its checks are those of a stand-in, which calls the function of the day; and
    where no annotation names axes, there are none.
    """
    seen = {}

    def decorator(function=None, *, typechecker):
        if function is None:
            return functools.partial(decorator, typechecker=typechecker)
        decorate = jaxtyped(typechecker=typechecker)
        if not inspect.isfunction(function):
            return decorate(function)
        key = function.__code__, typechecker
        if key not in seen:
            seen[key] = stand_in(function, decorate)
        if seen[key] is None:
            return function
        latest, checked = seen[key]

        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            functions = latest.functions
            depth = len(functions)
            functions.append(function)
            try:
                return checked(*args, **kwargs)
            finally:
                del functions[depth:]  # where an argument did not fit, nobody has called it

        return wrapped

    return decorator
