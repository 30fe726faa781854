"""Dense Jacobian columns of every sample, by torch.func, a chunk of samples at a time.

A column a_i = J_nᵀ L_nm [d] is the pullback of column m of the loss's basis at sample n; all
of them make A [d, i].
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.columns.factors import Jacobian, written_out
from ddnewton.errors import TooLarge
from ddnewton.inputs.checks import check_derivatives
from ddnewton.inputs.memory import check_fits, samples_at_once
from ddnewton.linearize.basis import Basis, basis_at, combined, stored, with_stored
from ddnewton.linearize.calls import refusal
from ddnewton.linearize.independence import SamplesMix, check_independent
from ddnewton.linearize.model import Model, at_samples, pullback_of
from ddnewton.linearize.sample_columns import Way, ways
from ddnewton.transforms import is_transformed
from ddnewton.trees import chunks, parameter_count, take, tree_leaves

logger = logging.getLogger(__name__)


def jacobian(
    models: Sequence[Model],
    basis: Basis,
    samples: Int[Tensor, " n"] | None,
    chunk_size: int | None,
) -> Jacobian:
    """Return the columns of some samples by the first of the models that can be differentiated.

    For every model the ways are tried from the fastest to the slowest, as one may fail, or be
    wrong: in torch 2.13 ``vmap`` mistakes an axis of PReLU's weight for one of the samples.
    """
    errors: list[Exception] = []
    if samples is not None:
        models = [at_samples(model, samples) for model in models]
    n, _, m = basis.shape
    at_once, d = min(chunk_size or n, n), parameter_count(models[0].params)
    for model, (way, cost) in product(models, ways(at_once, m, d)):
        if cost:
            by = "torch.func" if is_transformed() else "plain autograd"
            logger.info("Jacobian columns by %s: %s", cost.format(by), errors[-1])
        try:
            in_dtype = with_stored(basis, stored(basis).to(model.outputs.dtype))
            return _jacobian_by(way, model, in_dtype, chunk_size)
        except (torch.OutOfMemoryError, TooLarge):
            raise
        except Exception as error:  # noqa: BLE001 - torch raises all kinds, and one is told
            errors.append(error)
    # Samples that mix are the user's to mend; any other error is the last one's.
    mixing = [error for error in errors if isinstance(error, SamplesMix)]
    raise mixing[0] if mixing else refusal(models[-1], errors[-1])


def _jacobian_by(way: Way, model: Model, basis: Basis, chunk_size: int | None) -> Jacobian:
    """Return the columns of all samples, those of the first and the last chunk checked."""
    # The columns of the first chunk, of two samples at least: one cannot show that samples mix.
    n, _, m = basis.shape
    size = chunk_size or _samples_at_once(model, m)
    parts = chunks(n, size)
    first_chunk = slice(0, min(max(2, size), n))
    columns = _columns(way, model, first_chunk, basis)
    _check_pullback(model, first_chunk, basis, columns)
    # Every leaf is a factor of its own, in the order of the parameters.
    dtypes = {leaf.dtype for leaf in (model.outputs, *tree_leaves(model.params))}
    eps = max(model.rounding, *(torch.finfo(dtype).eps for dtype in dtypes))
    sizes = [leaf.numel() for leaf in tree_leaves(model.params)]
    pieces = [[piece] for piece in enumerate(sizes)]
    record = partial(Jacobian, samples=n, columns=m, sizes=sizes, pieces=pieces, order=None)
    record = partial(record, device=basis.device, eps=eps, sums=0.0)
    if first_chunk.stop == n:  # all samples are in it: keep the columns
        return written_out(record(lambda _: columns, [first_chunk]), columns)
    _check_pullback(model, parts[-1], basis, _columns(way, model, parts[-1], basis))
    return record(lambda chunk: _columns(way, model, chunk, basis), parts)


def _columns(way: Way, model: Model, chunk: slice, basis: Basis) -> list[Float[Tensor, "nm _"]]:
    """Return the columns of some samples along every leaf, each sample evaluated by itself."""
    X, basis = take(model.X, chunk), basis_at(basis, chunk)
    of_samples, leaves = way(model.function, model.params, X, basis)
    of_batch = model.outputs[chunk]
    # Residuals may be differences of terms as large as parameters times their derivatives.
    size = of_batch.abs().amax()
    pairs = zip(leaves, tree_leaves(model.params), strict=True)
    terms = [_largest(columns) * _largest(leaf) for columns, leaf in pairs if leaf.numel()]
    floor = torch.stack([size, *(term.to(size) for term in terms)]).nan_to_num(0, 0).amax()
    check_independent(of_batch, of_samples, size, floor, "outputs", model.rounding)
    rows = basis.shape[0] * basis.shape[2]
    return [leaf.reshape(rows, leaf.numel() // rows) for leaf in leaves]


def _largest(tensor: Tensor) -> Float[Tensor, ""]:
    """Return the largest size of an entry."""
    largest: Tensor = torch.linalg.vector_norm(tensor, math.inf)
    return largest


def _check_pullback(model: Model, chunk: slice, basis: Basis, columns: Sequence[Tensor]) -> None:
    """Compare a pullback of a batch with the sum of its samples' pullbacks.

    Outputs may agree by chance: where samples mix through a weight that is zero, say.
    """
    # Σ_i w_i a_i of the batch, as the pullback of Σ_m w_nm L_nm, with weights w of any sign.
    X, basis = take(model.X, chunk), basis_at(basis, chunk)
    n, _, m = basis.shape
    weights = torch.arange(1, n * m + 1, device=basis.device, dtype=basis.dtype).cos()
    outputs, pullback = model.outputs, model.pullback
    if pullback is None or n < len(outputs):
        outputs, pullback = pullback_of(lambda p: model.function(p, X), model.params)
    cotangent = combined(basis, weights.reshape(n, m)).reshape(outputs.shape)
    # The scale of the sum, were all its terms as large as the largest: what may cancel.
    sizes = [
        n * m * torch.linalg.vector_norm(leaf, math.inf) if leaf.numel() else leaf.new_zeros(())
        for leaf in columns
    ]
    largest = torch.stack([outputs.abs().amax(), *(size.to(outputs) for size in sizes)]).amax()
    # Compare it with the same sum of the samples' columns, all leaves of a dtype at once.
    leaves = list(zip(pullback(cotangent[None]), columns, sizes, strict=True))
    for dtype in {leaf_columns.dtype for leaf_columns in columns if leaf_columns.numel()}:
        of_dtype = [leaf for leaf in leaves if leaf[1].dtype == dtype]
        of_batch = torch.cat([pulled.reshape(-1) for pulled, _, _ in of_dtype])
        check_derivatives(of_batch)
        of_samples = torch.cat([weights.to(dtype) @ part for _, part, _ in of_dtype])
        scale = torch.cat([size.to(dtype).expand(part.shape[1]) for _, part, size in of_dtype])
        floor, rounding = largest.to(dtype), model.rounding
        check_independent(of_batch, of_samples, scale, floor, "derivatives", rounding)


def _samples_at_once(model: Model, m: int) -> int:
    """Return so many samples that four times their columns fill a chunk.

    Twice, as the columns of every chunk are multiplied with those of another, and as much again for
    what they are made of.
    """
    n, width, d = len(model.outputs), model.outputs.element_size(), parameter_count(model.params)
    sample_bytes = 2 * width * m * d + 1
    what = f"dense columns of one sample, {m} along {d} parameters, twice"
    remedy = (
        'Pass gram="free", which needs no columns, or "structured", which holds them as outer '
        "products; or monte_carlo(criterion, 1, generator), which has few."
    )
    check_fits(sample_bytes, what, remedy, model.outputs.device)
    return samples_at_once(n, 2 * sample_bytes, min(n * m, d), model.outputs.device)
