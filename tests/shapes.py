"""The run-time checker of the tests: shapes and dtypes of tensors, and nothing else.

What else a user may pass is the business of ddnewton's own checks, whose messages are tested.
"""

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def check_shapes(function: F) -> F:
    """Check the annotations of a function that name a tensor's axes."""
    from beartype import beartype  # here, as tests/house.py runs without what tests install

    shapes = {name: hint for name, hint in function.__annotations__.items() if is_shape(hint)}
    function.__annotations__ = shapes
    return beartype(function)


def is_shape(hint: object) -> bool:
    """Return whether an annotation is one of jaxtyping's, evaluated or not."""
    return "[Tensor," in (hint if isinstance(hint, str) else str(hint))
