"""Float32 without TF32 while the library computes, and which GPUs are fast in float64."""

import threading

import pytest
import torch
from torch import nn
from torch.func import functional_call

from ddnewton import (
    covariance,
    directional_newton,
    fit,
    gram_matrix,
    newton_step,
    newton_step_and_info,
    prepare,
)
from ddnewton.devices import (
    DEFAULTS,
    KERNELS,
    full_float32,
    has_fast_float64,
    in_full_float32,
    is_float64_fast,
)
from ddnewton.optim import DirectionalNewton

get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
NEWER = [*KERNELS, *DEFAULTS]


def older() -> list:
    """The switches by their older names, which raise where they contradict the newer ones."""
    switches = []
    for name in (torch._C._get_cudnn_allow_tf32, torch._C._get_cublas_allow_tf32):
        try:
            switches.append(name())
        except RuntimeError:
            switches.append("contradiction")
    return switches


def switches() -> list:
    return [*(get(*name) for name in NEWER), *older()]


def high():
    torch.set_float32_matmul_precision("high")


def medium():
    torch.set_float32_matmul_precision("medium")


def by_older_names():
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


def by_newer_names():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "ieee"


def for_all():
    torch.backends.fp32_precision = "tf32"


def for_all_of_cuda():
    torch.backends.cudnn.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def as_torch_ships_them():
    pass


SETTINGS = [
    *(as_torch_ships_them, high, medium),
    *(by_older_names, by_newer_names, for_all, for_all_of_cuda),
]
SETTING = pytest.mark.parametrize("setting", SETTINGS, ids=[f.__name__ for f in SETTINGS])


@pytest.fixture(autouse=True)
def _switches_put_back():
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for name in NEWER:
        default = "tf32" if name in (("cuda", "conv"), ("cuda", "rnn")) else "none"
        put(*name, default)


FULL = ["ieee"] * len(KERNELS) + ["none"] * len(DEFAULTS) + [False, False]
X, Y = torch.linspace(-1, 1, 24).sin().reshape(8, 3), torch.linspace(0, 1, 16).reshape(8, 2)
net = nn.Linear(3, 2)
PARAMS = {name: p.detach() for name, p in net.named_parameters()}
MSE = nn.MSELoss()


def watched(seen):
    """A model that notes the switches whenever it is called."""

    def model_fn(params, x):
        seen.append(switches())
        return functional_call(net, params, (x,))

    return model_fn


class Watched(nn.Linear):
    def forward(self, x):
        if not torch.compiler.is_compiling():
            SEEN.append(switches())
        return super().forward(x)


SEEN: list = []


def an_update(model_fn):
    optimizer = directional_newton(model_fn, MSE)
    optimizer.update(PARAMS, optimizer.init(PARAMS), X, Y)


CALLS = {
    "newton_step": lambda f: newton_step(f, PARAMS, X, Y, MSE, 0.1),
    "structured": lambda f: newton_step(f, PARAMS, X, Y, MSE, 0.1, gram="structured"),
    "free": lambda f: newton_step(f, PARAMS, X, Y, MSE, 0.1, gram="free"),
    "info": lambda f: newton_step_and_info(f, PARAMS, X, Y, MSE, 0.1),
    "gram_matrix": lambda f: gram_matrix(f, PARAMS, X, Y, MSE),
    "covariance": lambda f: covariance(f, PARAMS, X, Y),
    "prepare": lambda f: prepare(f, PARAMS, X),
    "update": an_update,
    "fit": lambda f: fit(f, PARAMS, X, Y, max_updates=2),
}


@SETTING
@pytest.mark.parametrize("call", CALLS)
def test_no_kernel_rounds_float32_inside_and_all_switches_are_put_back(call, setting):
    setting()
    seen, before = [], switches()
    CALLS[call](watched(seen))
    assert seen
    assert all(inside == FULL for inside in seen)
    assert switches() == before


def test_a_module_in_training():
    SEEN.clear()
    optimizer = DirectionalNewton(Watched(3, 2), MSE)
    high()
    before = switches()
    for _ in range(2):
        optimizer.step(X, Y)
    assert SEEN
    assert all(inside == FULL for inside in SEEN)
    assert switches() == before


@SETTING
def test_the_older_names_may_be_read_and_written_inside(setting):
    """As by torch.backends.cudnn.flags, without which cuDNN differentiates no LSTM twice."""
    setting()
    before = switches()

    @in_full_float32
    def inside():
        with torch.backends.cudnn.flags(enabled=False, allow_tf32=False):
            return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()

    assert inside() == (False, "highest")
    assert switches() == before


@SETTING
def test_switches_are_put_back_after_an_error(setting):
    setting()
    before = switches()

    def model_fn(params, x):
        raise RuntimeError("a model's own error")

    with pytest.raises(RuntimeError, match="a model's own error"):
        newton_step(model_fn, PARAMS, X, Y, MSE, 0.1)
    assert switches() == before


def test_the_last_of_several_threads_puts_them_back():
    high()
    before = switches()
    first_is_in, second_is_out = threading.Event(), threading.Event()
    seen = []

    def first():
        with full_float32():
            first_is_in.set()
            second_is_out.wait(30)
            seen.append(switches())

    thread = threading.Thread(target=first)
    thread.start()
    first_is_in.wait(30)
    with full_float32():
        pass
    seen.append(switches())
    second_is_out.set()
    thread.join()
    assert seen == [FULL, FULL]
    assert switches() == before


def test_where_nothing_rounds_nothing_is_switched(monkeypatch):
    torch.backends.cudnn.allow_tf32 = False
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: pytest.fail("switched"))
    with full_float32():
        assert not torch.backends.cudnn.allow_tf32


GPUS = {
    "P100": ((6, 0), True),
    "GTX 1080": ((6, 1), False),
    "V100": ((7, 0), True),
    "T4": ((7, 5), False),
    "A100": ((8, 0), True),
    "A10": ((8, 6), False),
    "L4": ((8, 9), False),
    "H100": ((9, 0), True),
    "B200": ((10, 0), True),
    "B300": ((10, 3), False),
    "RTX 5090": ((12, 0), False),
}


@pytest.mark.parametrize("name", GPUS)
def test_which_gpus_are_fast_in_float64(name):
    capability, fast = GPUS[name]
    assert is_float64_fast(capability) is fast


@pytest.mark.parametrize(("capability", "fast"), [((9, 0), True), ((8, 9), False)])
def test_a_gpu_is_asked_for_its_capability(capability, fast, monkeypatch):
    class Properties:
        major, minor = capability

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert has_fast_float64(torch.device("cuda", 0)) is fast
    assert has_fast_float64(torch.device("cpu"))
