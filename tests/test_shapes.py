"""The checker of shapes is a test helper: it is tested too."""

import threading
from concurrent.futures import ThreadPoolExecutor

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


def shifted_by(shift):
    @jaxtyped(typechecker=check_shapes)
    def shifted(x: Float[Tensor, " n"], y: Float[Tensor, " n"], scale=shift) -> Float[Tensor, " n"]:
        return scale * (x + y)[: -shift or None]

    return shifted


def test_a_function_that_is_defined_again_is_checked_again_and_is_another():
    ones, more = torch.ones(2), torch.ones(3)
    for _ in range(2):
        one, two = shifted_by(0), shifted_by(1)
        assert one(ones, ones).tolist() == [0, 0]
        with pytest.raises(TypeCheckError):
            two(ones, ones)
        with pytest.raises(TypeCheckError):
            one(ones, more)
        with pytest.raises(TypeCheckError):
            two(x=ones, y=ones.int())
        assert one(more, y=more, scale=2).tolist() == [4, 4, 4]
    assert (one.__name__, one.__module__) == ("shifted", __name__)


def test_functions_that_call_themselves_are_checked_at_every_depth():
    def halves(count):
        @jaxtyped(typechecker=check_shapes)
        def half(x: Float[Tensor, " n"]) -> Float[Tensor, " m"]:
            if len(x) > 4:
                return halves(count + 1)(x[::2])
            return x[:, None] if count == 2 else x

        return half

    assert len(halves(0)(torch.ones(8))) == 4
    with pytest.raises(TypeCheckError):
        halves(0)(torch.ones(16))


def test_where_no_annotation_names_axes_there_is_nothing_to_check():
    def plain(x: Tensor) -> Tensor:
        return x

    assert jaxtyped(plain, typechecker=check_shapes) is plain


def test_threads_call_their_own_functions():
    waiting = threading.Barrier(2)

    def labelled(label):
        @jaxtyped(typechecker=check_shapes)
        def label_of(x: Float[Tensor, " n"], pause=waiting.wait) -> Float[Tensor, " n"]:
            pause()
            return x * 0 + label

        return label_of

    with ThreadPoolExecutor(2) as pool:
        for _ in range(20):
            results = pool.map(lambda label: labelled(label)(torch.ones(2)), (1, 2))
            assert [result.tolist() for result in results] == [[1, 1], [2, 2]]
