"""How right a float32 step on a GPU is, against dense float64, with TF32 allowed and not."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map

import ddnewton
from benchmarks.accuracy import OPTIONS
from benchmarks.bench import difference
from benchmarks.gpu_process import Job, Measurement
from benchmarks.peers import jacobians, prepared
from benchmarks.recipes import build
from tests.nets_in_training import DELTAS, exact, in_float32
from tests.reference import flat

NETS = (("tanh", 0), ("tanh", 1000), ("relu", 1000))
CONVOLUTIONS = (("tiny-conv", 6), ("2c2d-32", 8))
SEED = 0


def allow(*, tf32: bool) -> None:
    """Let a user allow TF32 everywhere, or nowhere."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32


def of_perceptron(
    job: Job, net: tuple[str, int], name: str, *, prepare: bool, tf32: bool
) -> dict[str, Any]:
    """Return the errors of a perceptron's step for every damping."""
    allow(tf32=tf32)
    options, reference_options = OPTIONS[name]
    model_fn, params, X, y, criterion = in_float32(SEED, net)
    params, X, y = tree_map(lambda leaf: leaf.to(job.device), (params, X, y))
    model_fn = ddnewton.prepare(model_fn, params, X) if prepare else model_fn
    errors = []
    for delta in DELTAS:
        step = ddnewton.newton_step(model_fn, params, X, y, criterion, delta, **options)
        truth = flat(exact(SEED, net, delta, **reference_options))
        errors.append(difference(flat(step).double().cpu(), truth))
    return {"errors": errors}


def of_convolution(job: Job, problem: str, samples: int, *, tf32: bool) -> dict[str, Any]:
    """Return the errors of a convolutional net's step, whose reference is of torch.func alone."""
    allow(tf32=False)
    wide = build(problem, job.device, torch.float64, samples)
    truths = [jacobians(wide._replace(damping=delta), "all")() for delta in DELTAS]
    allow(tf32=tf32)
    case = build(problem, job.device, torch.float32, samples)
    steps = [prepared(case._replace(damping=delta), "all")() for delta in DELTAS]
    return {
        "errors": [
            difference(step.double(), truth) for step, truth in zip(steps, truths, strict=True)
        ]
    }


def measurements(job: Job) -> Iterator[Measurement]:
    """Yield the nets, fresh and trained, without TF32 and with it."""
    # What goes wrong with TF32 is seen beside what goes right without.
    for problem, samples in CONVOLUTIONS[:1] if job.quick else CONVOLUTIONS:
        for tf32 in (False, True):
            about = {"net": f"{problem}, N = {samples}", "way": "prepared", "TF32": tf32}
            about |= {"directions": "all directions", "dampings": DELTAS}
            yield about, partial(of_convolution, job, problem, samples, tf32=tf32)
    for activation, updates in NETS[:1] if job.quick else NETS:
        for name in OPTIONS:
            for tf32 in (False, True):
                for prepare in (True, False):
                    way = "prepared" if prepare else "un-prepared"
                    about = {"net": f"{activation}, {updates} updates", "way": way, "TF32": tf32}
                    about |= {"directions": name, "dampings": DELTAS}
                    options = {"prepare": prepare, "tf32": tf32}
                    yield about, partial(of_perceptron, job, (activation, updates), name, **options)
