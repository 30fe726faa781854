"""The tests, in folders like the source's; ``--jaxtyping-packages`` looks for ``shapes`` here."""

from tests import shapes as shapes
