"""A group of one rank in the process of the tests, where the shapes of arguments are checked."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ddnewton import Group, above, monte_carlo, newton_step_and_info, prepare, top_k
from ddnewton.damping import constant


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dist.ProcessGroup]:
    """Return the group of this process alone."""
    store = tmp_path_factory.mktemp("ranks") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def problem() -> tuple[Callable[..., Tensor], dict[str, Tensor], Tensor, Tensor]:
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    params = {name: p.detach() for name, p in net.named_parameters()}
    X, y = torch.randn(9, 6, dtype=torch.float64), torch.randint(3, (9,))
    return lambda p, x: torch.func.functional_call(net, p, (x,)), params, X, y


OPTIONS: dict[str, dict[str, object]] = {
    "factorized": {"damping": 0.1},
    "structured": {"damping": 0.1, "gram": "structured"},
    "chunks": {"damping": 0.1, "chunk_size": 2},
    "leading": {"damping": constant(0.1), "select": top_k(3), "complement": 1.0},
    "blocks": {
        "damping": 0.1,
        "groups": [Group(["0.weight"], select=above(0.1)), Group(["2.weight", "2.bias"])],
    },
    "sub-samples": {
        "damping": 0.1,
        "subsampling_grad": [8, 0, 3],
        "subsampling_ggn": [1, 2, 5, 4],
        "subsampling_curvature": [7, 6, 1],
        "select": top_k(2),
    },
    "units": {"damping": 0.1, "scale": "jac", "subsampling_ggn": range(9)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_one_rank_gives_the_step_of_no_group(
    alone: dist.ProcessGroup, options: dict[str, object]
) -> None:
    call = (*problem(), F.cross_entropy)
    ours = newton_step_and_info(*call, **options, process_group=alone)
    expected = newton_step_and_info(*call, **options)
    for x, y in zip(tree_leaves(ours), tree_leaves(expected), strict=True):
        assert torch.equal(x, y) or (x.isnan().all() and y.isnan().all())


def test_layers_that_are_found_before_and_random_draws(alone: dist.ProcessGroup) -> None:
    model_fn, params, X, y = problem()
    steps = [
        newton_step_and_info(
            *(prepare(model_fn, params, X), params, X, y),
            monte_carlo(F.cross_entropy, 2, torch.Generator().manual_seed(4)),
            *(0.1,),
            process_group=group,
        )[0]
        for group in (alone, None)
    ]
    assert all(torch.equal(steps[0][name], steps[1][name]) for name in params)
