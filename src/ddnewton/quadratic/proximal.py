r"""Steps whose damping pulls them to a centre c instead of to zero: momentum and weight decay.

With momentum μ (Goldshlager, Abrahamsen, Lin, 2024, arXiv 2401.10190) and weight decay w a step is
the minimum over s of

    gᵀs + ½ sᵀG s + ½ δ ‖s − μ s'‖² + ½ w ‖θ + s‖²,        s' the step before,

so that damping by δ + w pulls it to c = (δ μ s' − w θ) / (δ + w). In general, with c_k = e_kᵀc,

    gᵀs + ½ sᵀG s + ½ Σ_k δ_k (e_kᵀ(s − c))²,    s = c − Σ_k (γ_k + λ_k c_k) / (λ_k + δ_k) e_k:

c, and a step of a gradient that is further by G c = A₁ (h / N ∘ A₁ᵀc).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ddnewton.quadratic.gauss_newton import GaussNewton
from ddnewton.quadratic.kept import Directions


class Proximal(NamedTuple):
    """What pulls a step besides the gradient: the step before, and the parameters if they decay.

    A vector that does not pull is left out.
    """

    previous: Float[Tensor, "_ d"]
    params: Float[Tensor, "_ d"]
    decays: Sequence[float | Tensor]  # of every leaf
    decay: float | Tensor  # of every parameter, or of all


class ProximalBlock(NamedTuple):
    """The vectors that pull on the parameters of one block, and the columns' slopes along them.

    Where decays differ inside the block, a vector is cut into the parts that have one each.
    """

    vectors: Float[Tensor, "v d"]
    column_slopes: Float[Tensor, "a v"]
    counts: tuple[int, int]  # of vectors: of the step before, of the parameters
    decays: Sequence[float | Tensor]  # the different ones


class Centre(NamedTuple):
    """Where the damping δ of all directions pulls the step of a block: Aᵀc, for the columns A.

    ``decay`` is the part of it that weight decay makes. A rule adds to δ without it: the rule pulls
    to where the centre was before the decay.
    """

    weights: Float[Tensor, " v"]  # of the vectors that pull: c is their sum
    column_slopes: Float[Tensor, " a"]
    decay: Float[Tensor, " a"]
    delta: Float[Tensor, ""]


def proximal_blocks(
    proximal: Proximal,
    matrices: Sequence[GaussNewton],
    leaves: Sequence[Sequence[int]],
    sizes: Sequence[int],
) -> list[ProximalBlock]:
    """Return the vectors that pull, cut to the parameters of every block."""
    parts = torch.cat([proximal.previous, proximal.params]).split(list(sizes), 1)
    blocks = []
    for block, matrix in zip(leaves, matrices, strict=True):
        # The vectors along the parameters of the block.
        vectors = torch.cat([parts[leaf] for leaf in block], 1)
        # Where these decay by several numbers, the part along those of each, and else zero.
        decays = different([proximal.decays[leaf] for leaf in block])
        if len(decays) > 1:
            of_params = [vectors.new_full((sizes[i],), float(proximal.decays[i])) for i in block]
            masks = torch.cat(of_params) == vectors.new_tensor(decays)[:, None]
            vectors = (vectors[:, None] * masks).flatten(0, 1)
        # The slopes of the columns along them.
        counts = (len(decays) * len(proximal.previous), len(decays) * len(proximal.params))
        slopes = matrix.columns.rmatmat(vectors.mT)
        blocks.append(ProximalBlock(vectors, slopes, counts, decays))
    return blocks


def different(decays: Sequence[float | Tensor]) -> list[float | Tensor]:
    """Return the different ones of some decays; a tensor is the same for all leaves."""
    return list(dict.fromkeys(decays))


def centre_of(
    block: ProximalBlock, delta: Tensor, decay: float | Tensor, momentum: float | Tensor
) -> Centre:
    """Return the centre of a block for a damping δ of all directions, w included.

    Where decays differ inside the block, δ and w have an entry for each.
    """
    weights = _weights(block.counts, delta, decay, momentum)
    without_decay = _weights(block.counts, delta, 0.0, momentum)
    slopes = block.column_slopes
    return Centre(weights, slopes @ weights, slopes @ (weights - without_decay), delta)


def _weights(
    counts: tuple[int, int], delta: Tensor, decay: float | Tensor, momentum: float | Tensor
) -> Float[Tensor, " v"]:
    """Return the centre as weights of the step before, δ μ / (δ + w), and of θ, −w / (δ + w)."""
    decayed = isinstance(decay, Tensor) or decay > 0
    of_previous = momentum * (delta - decay) / delta if decayed else delta * 0 + momentum
    of_params = -decay / delta if decayed else delta * 0
    pairs = zip((of_previous, of_params), counts, strict=True)
    return torch.cat([weight.expand(count) for weight, count in pairs if count])


def centred_gradient_weights(
    gradient_weights: Float[Tensor, " a"],
    curvature_weights: Float[Tensor, " i"],
    centre: Centre | None,
) -> Float[Tensor, " a"]:
    """Return the weights of g + G c."""
    if centre is None:
        return gradient_weights
    further = curvature_weights * centre.column_slopes[: len(curvature_weights)]
    return gradient_weights + F.pad(further, (0, len(gradient_weights) - len(further)))


def along_directions(
    kept: Directions,
    curvature_weights: Float[Tensor, " i"],
    column_slopes: Float[Tensor, " a"],
) -> Float[Tensor, " k"]:
    """Return e_kᵀc from Aᵀc, by e_k = A √w u_k / √λ_k."""
    count = len(curvature_weights)
    inner = kept.evecs.mT @ (curvature_weights.sqrt() * column_slopes[:count])
    return torch.where(kept.live, inner / torch.where(kept.live, kept.evals, 1).sqrt(), 0)
