"""What are no indices of samples is refused, before any work."""

import pytest
import torch

from ddnewton import (
    directional_derivatives,
    ggn_eigh,
    ggn_eigvalsh,
    gram_matrix,
    newton_step,
    newton_step_and_info,
)
from tests.methods import FLOAT32
from tests.models import problem
from tests.whole.chosen_samples import OPTIONS, refuse

RULE = "must hold distinct indices of samples"
REFUSED = {
    "repeated": ([1, 0, 1], ValueError, r"repeats in \[1, 0, 1\]"),
    "repeated from the end": ([4, -1], ValueError, r"repeats in \[4, -1\]"),
    "too large": ([0, 5], ValueError, "indices from 0 to 5"),
    "too small": ([-6, 0], ValueError, "indices from -6 to 0"),
    "empty": ([], ValueError, "got none"),
    "empty range": (range(0), ValueError, "got none"),
    "one number": (3, ValueError, r"got shape \[\]"),
    "a table": ([[0, 1], [2, 3]], ValueError, r"got shape \[2, 2\]"),
    "ragged": ([[0], [1, 2]], TypeError, r"got \[\[0\], \[1, 2\]\]"),
    "floats": ([0.0, 1.0], TypeError, "numbers of torch.float32"),
    "complex": (torch.tensor([0j]), TypeError, "numbers of torch.complex64"),
    "a mask": (torch.ones(5, dtype=torch.bool), TypeError, r"a mask\. .*mask.nonzero\(\)"),
    "a list of booleans": ([True, False, True, False, True], TypeError, "got a mask"),
    "a string": ("all", TypeError, "got 'all'"),
    "strings": (["0", "1"], TypeError, r"got \['0', '1'\]"),
    "a set": ({0, 1}, TypeError, r"got \{0, 1\}"),
    "an empty slice": (slice(5, None), ValueError, "got none"),
    "a slice of floats": (slice(0.5), TypeError, r"got slice\(None, 0.5, None\)"),
    "nothing inside": ([None], TypeError, r"got \[None\]"),
    "a function": (len, TypeError, "got <built-in function len>"),
}
TAKERS = {
    newton_step: OPTIONS,
    newton_step_and_info: OPTIONS,
    directional_derivatives: OPTIONS,
    ggn_eigh: OPTIONS[1:2],
    ggn_eigvalsh: OPTIONS[1:2],
    gram_matrix: OPTIONS[1:2],
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("function", TAKERS, ids=lambda f: f.__name__)
def test_what_are_no_indices_is_refused(function, case):
    subset, kind, message = REFUSED[case]
    arguments = [*problem("relu_mlp", FLOAT32)] + [0.1] * function.__name__.startswith("newton")
    for option in TAKERS[function]:
        pattern = f"^{function.__name__}: {option} {RULE}; .*{message}.*The batch has 5 samples"
        if case.startswith("a mask"):
            pattern = f"^{function.__name__}: {option} {RULE}; .*{message}"
        with pytest.raises(kind, match=pattern):
            function(*arguments, **{option: subset})


def test_refusals_come_before_any_work():
    given = problem("relu_mlp", FLOAT32)._replace(model_fn=refuse)
    for function, options in TAKERS.items():
        arguments = [*given] + [0.1] * function.__name__.startswith("newton")
        for option in options:
            with pytest.raises(ValueError, match=f"{option} must hold"):
                function(*arguments, **{option: [7]})


def test_a_batch_is_as_large_as_its_first_axis_says():
    """Not as its first leaf's second, nor as y's."""
    given = problem("attention", FLOAT32)
    with pytest.raises(ValueError, match="The batch has 3 samples"):
        ggn_eigvalsh(*given, subsampling_ggn=[3])
    assert len(ggn_eigvalsh(*given, subsampling_ggn=[2])) == 6
