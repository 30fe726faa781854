"""Steps in several threads are those of one thread, and what threads share stays as it was."""

import sys
import threading

import pytest
import torch
from torch import nn
from torch.func import functional_call

from ddnewton import as_function, newton_step, prepare
from ddnewton.optim import DirectionalNewton
from tests.reference import error

CROSS_ENTROPY = nn.CrossEntropyLoss()
THREADS = 4


def switches() -> dict:
    return {
        "attention": torch.backends.mha.get_fastpath_enabled(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "memory": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
        "call": nn.Module.__call__,
        "getattr": nn.Module.__getattr__,
        "gradients": torch.is_grad_enabled(),
    }


@pytest.fixture(autouse=True)
def often():
    """Switch threads a thousand times as often, and see that nothing of the process changes."""
    before, interval = switches(), sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(interval)
    assert switches() == before


def in_threads(task):
    """The results of a task, called with its number in as many threads, all at once."""
    results, start = [None] * THREADS, threading.Barrier(THREADS)

    def run(number):
        try:
            start.wait()
            results[number] = task(number)
        except Exception as caught:  # noqa: BLE001 - it is raised again, where the test runs
            results[number] = caught

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def data(number):
    generator = torch.Generator().manual_seed(number)
    X = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    return X, torch.arange(8) % 3


class Net(nn.Module):
    """Attention, a submodule of two names, and what it keeps of every call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 6)
        self.also = nn.Sequential(self.first, nn.Tanh())
        self.attention = nn.TransformerEncoderLayer(6, 2, 6, 0.0, batch_first=True)
        self.head, self.kept = nn.Linear(6, 3), []
        self.double().eval()

    def forward(self, x):
        h = self.also(x)
        self.kept.append(h)
        self.last = h = self.attention(torch.stack([h, self.first(x)], 1))
        return self.head(h.mean(1))


def task_of(way, module):
    """A step of some kind on the data of that number, of a module that may be shared."""
    model_fn, params = as_function(module)

    def by_hand(p, x):
        return functional_call(module, p, (x,))

    def step(number, function=by_hand, **options):
        return newton_step(function, params, *data(number), CROSS_ENTROPY, 0.1, **options)

    return {
        "dense": lambda number: step(number, gram="dense"),
        "structured": lambda number: step(number, gram="structured"),
        "as_function": lambda number: step(number, model_fn, gram="structured"),
        "prepare": lambda number: step(number, prepare(by_hand, params, data(number)[0])),
        "called": lambda number: {"outputs": model_fn(params, data(number)[0])},
    }[way]


@pytest.mark.parametrize("way", ["dense", "structured", "as_function", "prepare", "called"])
def test_threads_that_share_a_module(way):
    module = Net()
    task = task_of(way, module)
    expected = [task(number) for number in range(THREADS)]
    held = {part: dict(vars(part)) for part in module.modules()}
    parameters = dict(module.named_parameters())
    kept = list(module.kept)
    for number, result in enumerate(in_threads(task)):
        assert error(result, expected[number]) < 1e-10
    assert all(dict(module.named_parameters())[name] is p for name, p in parameters.items())
    if way != "called":  # where the user calls it, it keeps what it likes
        assert module.kept == kept
        for part, before in held.items():
            assert vars(part).keys() == before.keys()
            assert all(vars(part)[name] is value for name, value in before.items())


def test_threads_with_a_module_each():
    def train(module, number):
        optimizer = DirectionalNewton(module, CROSS_ENTROPY)
        return torch.stack([optimizer.step(*data(number)) for _ in range(2)])

    expected = [train(Net(), number) for number in range(THREADS)]
    modules = [Net() for _ in range(THREADS)]
    results = in_threads(lambda number: train(modules[number], number))
    for number in range(THREADS):
        assert error(results[number], expected[number]) < 1e-10
