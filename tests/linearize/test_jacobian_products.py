"""J v and Jᵀu of every model by two graphs, against Jacobians that are formed row by row."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ddnewton import newton_step
from ddnewton.linearize.free_linearization import linearized_freely
from ddnewton.linearize.jacobian_products import graph_bytes, products_of
from tests.linearize.autograd_cases import CASES, given_and_truth
from tests.methods import DTYPES, FLOAT32, FLOAT64, seeded, truth
from tests.models import PROBLEMS, problem
from tests.reference import error


def of_leaves(given):
    """The model as a function of its leaves."""
    leaves, spec = tree_flatten(given[1])
    return (lambda leaves: given[0](tree_unflatten(leaves, spec), given[2])), leaves


def vectors(leaves, wanted, dtype, seed=0):
    generator = seeded(seed)
    return [torch.randn(leaves[i].shape, generator=generator, dtype=dtype) for i in wanted]


def check(given, jacobians, tolerance):
    """Compare products along all leaves, and along some."""
    function, leaves = of_leaves(given)
    offsets = torch.tensor([0, *(leaf.numel() for leaf in leaves)]).cumsum(0).tolist()
    n, c, _ = jacobians.shape
    for wanted in (range(len(leaves)), [len(leaves) - 1], list(range(len(leaves)))[::-2]):
        products = products_of(function, leaves, wanted)
        J = torch.cat([jacobians[:, :, offsets[i] : offsets[i + 1]] for i in wanted], 2)
        v = vectors(leaves, wanted, leaves[0].dtype)
        u = torch.randn(n, c, generator=seeded(1), dtype=FLOAT64).to(products.outputs.dtype)
        # Twice, for the graphs are kept.
        for _ in range(2):
            flat = torch.cat([part.double().reshape(-1) for part in v])
            assert error(products.push(v), J @ flat) < tolerance
            pulled = torch.cat([part.double().reshape(-1) for part in products.pull(u)])
            assert error(pulled, torch.einsum("ncd,nc->d", J, u.double())) < tolerance
        assert not products.push(v).requires_grad
        assert not any(part.requires_grad for part in products.pull(u))


@DTYPES
@pytest.mark.parametrize("name", PROBLEMS)
def test_products_of_every_model(name, dtype):
    check(problem(name, dtype), truth(name).jacobians, 1e-4 if dtype == FLOAT32 else 1e-11)


# A bag of embeddings has a kernel with one derivative.
@pytest.mark.parametrize("case", [case for case in CASES if case != "sparse bag"])
def test_products_of_models_that_torch_func_refuses(case):
    given, reference = given_and_truth(case, FLOAT64)
    check(given, reference.jacobians, 1e-10)


def test_leaves_that_are_not_used():
    leaves = [torch.ones(3), torch.ones(2), torch.ones(())]
    products = products_of(lambda p: (p[0] * torch.eye(3)) + p[2].detach(), leaves, [0, 1, 2])
    v = vectors(leaves, range(3), FLOAT32)
    assert torch.equal(products.push(v), torch.diag(v[0]))
    pulled = products.pull(torch.ones(3, 3))
    assert torch.equal(pulled[0], torch.ones(3))
    assert [part.shape for part in pulled] == [leaf.shape for leaf in leaves]
    assert not pulled[1].any()
    assert not pulled[2].any()
    constant = products_of(lambda p: torch.ones(4, 2), leaves, [0, 1])
    assert torch.equal(constant.push(v[:2]), torch.zeros(4, 2))
    assert not any(part.any() for part in constant.pull(torch.ones(4, 2)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_in_any_mode(mode):
    given = problem("tanh_mlp")
    with mode():
        check(given, truth("tanh_mlp").jacobians, 1e-11)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 4, 100])
def test_chunks_of_samples(chunk_size):
    given, J = problem("relu_mlp"), truth("relu_mlp").jacobians
    with linearized_freely(*given[:3], chunk_size) as linearization:
        assert linearization.samples_at_once == min(chunk_size or 5, 5)
        assert linearization.graphs_fit(5) == (linearization.samples_at_once >= 5)
        every = range(len(linearization.leaves))
        for samples in (slice(1, 4), torch.tensor([4, 0])):
            products = linearization.products(every, samples)
            v = vectors(linearization.leaves, every, FLOAT64)
            flat = torch.cat([part.reshape(-1) for part in v])
            assert error(products.push(v), J[samples] @ flat) < 1e-12


@pytest.mark.parametrize("gram", ["free", "dense"])
def test_samples_that_mix_are_refused(gram):
    def centred(p, x):
        outputs = x @ p
        return outputs - outputs.mean(0)

    given = (centred, torch.ones(3, 2), torch.randn(6, 3), torch.zeros(6, 2), nn.MSELoss())
    with pytest.raises(ValueError, match="one sample's output"):
        newton_step(*given, 0.1, gram=gram)


def test_a_graph_is_measured_by_what_it_keeps():
    leaves = [torch.ones(10, 10)]
    X = torch.ones(7, 10)
    size = graph_bytes(lambda p: torch.tanh(torch.tanh(X @ p[0])), leaves)
    # The two results, and X.
    assert size == 4 * (7 * 10 * 2 + 7 * 10 + 7 * 10)
