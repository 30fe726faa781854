"""The checker of shapes is a test helper: it is tested too."""

import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from tests.shapes import check_shapes


@jaxtyped(typechecker=check_shapes)
def scaled(x: Float[Tensor, "n k"], y: Float[Tensor, " k"], label: int) -> Float[Tensor, " n"]:
    return (x * y).sum(1)[: None if label else 1]


def test_fitting_shapes_pass_whatever_the_other_arguments_are():
    assert scaled(torch.ones(2, 3), torch.ones(3), "no integer").shape == (2,)


@pytest.mark.parametrize(
    ("x", "y", "label"),
    [
        (torch.ones(2, 3), torch.ones(2), 1),
        (torch.ones(2, 3, 1), torch.ones(3), 1),
        (torch.ones(2, 3), torch.ones(3, dtype=torch.int64), 1),
        (torch.ones(2, 3), torch.ones(3), 0),
    ],
    ids=["axis", "axes", "dtype", "result"],
)
def test_shapes_that_do_not_fit_are_found(x, y, label):
    with pytest.raises(TypeCheckError):
        scaled(x, y, label)
