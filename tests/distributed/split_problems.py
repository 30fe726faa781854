"""Small problems whose samples are split over ranks, and how what the ranks return is compared."""

import torch
from torch import distributed, nn
from torch.utils._pytree import tree_flatten

CUTS = {1: [0, 24], 2: [0, 15, 24], 4: [0, 5, 5, 17, 24]}
"""Where each rank's samples begin and end, by the number of ranks; one of four has none."""


def normal(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def params():
    return {"W": 0.5 * normal(1, 3, 2), "b": 0.1 * normal(2, 2)}


def curve(p, x):
    return torch.tanh(x @ p["W"] + p["b"])


def slope(p, x):
    return (1 - curve(p, x).square()) @ p["W"].mT


def inputs():
    return normal(3, 24, 3)


def targets():
    """Values that no parameters fit, so that there is curvature and noise everywhere."""
    return curve({"W": normal(4, 3, 2), "b": normal(5, 2)}, inputs()) + 0.2 * normal(6, 24, 2)


def labels():
    return torch.arange(24) % 2


def net(seed=7):
    """A module of two layers, with the same parameters wherever it is made."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def group_of(size):
    """The process group of a run on so many ranks; of one, none."""
    return distributed.group.WORLD if size > 1 else None


def own(tree, rank, size):
    """The samples of one rank: of a tensor, or of a dict of them."""
    if isinstance(tree, dict):
        return {name: own(part, rank, size) for name, part in tree.items()}
    start, stop = CUTS[size][rank : rank + 2]
    return tree[start:stop]


def jacobian(p):
    """J of the curve, [N, 2, D], with the parameters in the order of their names."""
    of_leaves = torch.func.jacrev(curve)(p, inputs())
    return torch.cat([of_leaves[name].flatten(2) for name in p], 2)


def assert_same_bits(results):
    """All ranks return the same, to the last bit."""
    first, spec = tree_flatten(results[0])
    for result in results[1:]:
        leaves, other = tree_flatten(result)
        assert other == spec
        for a, b in zip(first, leaves, strict=True):
            assert type(a) is type(b)
            if isinstance(a, torch.Tensor):
                assert (a.dtype, a.shape) == (b.dtype, b.shape)
                assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
                assert torch.equal(a.isnan(), b.isnan())
            else:
                assert repr(a) == repr(b)  # nan too


def assert_close(actual, expected, tolerance=1e-12):
    """Two trees are the same but for rounding."""
    (first, spec), (second, other) = tree_flatten(actual), tree_flatten(expected)
    assert spec == other
    for a, b in zip(first, second, strict=True):
        if isinstance(b, (torch.Tensor, float)):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
        else:
            assert a == b


def assert_all_raise(outcomes, kind, *parts):
    """Every rank has raised an error of one kind, whose message has these parts."""
    for outcome in outcomes:
        assert outcome.error is not None
        assert outcome.error[0] == kind, outcome.error
        for part in parts:
            assert part in outcome.error[1]
