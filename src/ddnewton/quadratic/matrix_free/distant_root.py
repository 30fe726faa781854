"""The roots of losses whose samples may not be at hand: what is kept of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from jaxtyping import Bool, Float
from torch import Tensor

from ddnewton.criteria.root import Product, Root, Rows


class AnyRoot(Protocol):
    """A `Root` of a batch, at hand or made anew where it is asked for."""

    @property
    def value(self) -> Float[Tensor, " n"]:
        """The losses of all samples."""

    @property
    def gradient(self) -> Float[Tensor, "n c"]:
        """Their gradients in the outputs."""

    @property
    def columns(self) -> int:
        """The number of columns of a sample."""

    @property
    def times(self) -> Product | None:
        """Products with the roots, None where there are none."""

    @property
    def spans(self) -> bool:
        """Whether the gradients lie in the span of the columns."""

    @property
    def squares(self) -> Float[Tensor, " n"] | None:
        """Gradients squared over curvatures, None where these are not known."""

    def product(self, v: Float[Tensor, "n c"], /) -> Float[Tensor, "n c"]:
        """Return ∇²ℓ v."""

    def at(self, samples: Rows, /) -> Root:
        """Return the root of some samples."""


class Known(NamedTuple):
    """What is kept of the losses of samples that are not at hand."""

    value: Float[Tensor, " n"]
    steepness: Float[Tensor, " n"]
    is_uncurved: Bool[Tensor, " n"]
    squares: Float[Tensor, " n"] | None
    rounding: Float[Tensor, ""]
    columns: int
    spans: bool
    has_factors: bool

    def divided(self, total: float) -> Known:
        """Return the same of losses that are divided by a number."""
        return self._replace(
            value=self.value / total,
            steepness=self.steepness / total,
            squares=None if self.squares is None else self.squares / total,
            rounding=self.rounding / total,
        )


class DistantRoot(NamedTuple):
    """The root of losses of samples that are not at hand, of which it knows what is kept."""

    known: Known
    root: Callable[[], AnyRoot]  # of the samples, where they can be visited again

    @property
    def value(self) -> Float[Tensor, " n"]:
        """The losses of all samples."""
        return self.known.value

    @property
    def columns(self) -> int:
        """The number of columns of a sample."""
        return self.known.columns

    @property
    def spans(self) -> bool:
        """Whether the gradients lie in the span of the columns."""
        return self.known.spans

    @property
    def squares(self) -> Float[Tensor, " n"] | None:
        """Gradients squared over curvatures, None where these are not known."""
        return self.known.squares

    @property
    def gradient(self) -> Float[Tensor, "n c"]:
        """The gradients of the losses in the outputs."""
        return self.root().gradient

    @property
    def times(self) -> Product | None:
        """Products with the roots, None where there are none."""
        return self._multiplied if self.known.has_factors else None

    @property
    def transposed(self) -> Product | None:
        """Products with the transposed roots, None where there are none."""
        return self._multiplied if self.known.has_factors else None

    def product(self, v: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """Return ∇²ℓ v."""
        return self.root().product(v)

    def at(self, samples: Rows) -> Root:
        """Return the root of some samples."""
        return self.root().at(samples)

    def _multiplied(self, vector: Tensor) -> Tensor:
        """Refuse a product with all samples at once: they are visited in parts."""
        raise AssertionError(vector.shape)
