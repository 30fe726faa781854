"""Steps as on a GPU whose float64 is slow, on a machine without one."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from ddnewton.columns import exact_products, factors
from ddnewton.linearize import precision


@contextmanager
def as_where_float64_is_slow(cheap_flops: float = 0.0) -> Iterator[None]:
    """Compute as there, with so few flops of a step taken for cheap in float64."""
    with ExitStack() as stack:
        for room in (exact_products, factors, precision):
            stack.enter_context(mock.patch.object(room, "has_fast_float64", return_value=False))
        stack.enter_context(mock.patch.object(precision, "CHEAP_FLOPS", cheap_flops))
        yield
