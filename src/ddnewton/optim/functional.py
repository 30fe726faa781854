"""Training with damped Newton steps: a pair of pure functions, ``init`` and ``update``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

from torch import Tensor

from ddnewton.criteria import Criteria
from ddnewton.distributed.agreement import Processes
from ddnewton.errors import public
from ddnewton.inputs.checks import check_functions
from ddnewton.inputs.groups import Group
from ddnewton.inputs.scale import Scale
from ddnewton.inputs.step_options import check_options
from ddnewton.inputs.terms import TermIndices
from ddnewton.optim.adaptation import (
    Adaptation,
    LearningRate,
    as_adaptation,
    trust_region,
)
from ddnewton.optim.group_reference import GroupReference
from ddnewton.optim.notices import Notices
from ddnewton.optim.pure_functions import FirstState, Update
from ddnewton.optim.settings import (
    Complement,
    Settings,
    WeightDecay,
    automatic_scale,
    check_settings,
)
from ddnewton.quadratic.arguments import arguments_of
from ddnewton.quadratic.matrix_free.ways import check_free_scale, is_automatic
from ddnewton.types import AnyModelFn, DampingRule, GramWays, Precision, Select


class FunctionalOptimizer(NamedTuple):
    """An optimizer as two pure functions."""

    init: FirstState
    update: Update


@public
def directional_newton(
    model_fn: AnyModelFn,
    criterion: Criteria,
    damping: float | Tensor | DampingRule | Adaptation | None = None,
    *,
    learning_rate: LearningRate | None = None,
    momentum: float | Literal["exact"] | None = None,
    weight_decay: WeightDecay = 0.0,
    trust_radius: float | None = None,
    scale: Scale | Literal["auto"] = "auto",
    select: Select | None = None,
    complement: Complement = None,
    groups: Sequence[Group] | None = None,
    subsampling_grad: TermIndices | None = None,
    subsampling_ggn: TermIndices | None = None,
    subsampling_curvature: TermIndices | None = None,
    gram: GramWays = "auto",
    tol: float = 1e-2,
    chunk_size: int | None = None,
    precision: Precision = "auto",
    process_group: Processes = None,
) -> FunctionalOptimizer:
    r"""Return an optimizer of damped Newton steps, as a pair of pure functions.

    .. code-block:: python

        optimizer = directional_newton(model_fn, criterion)
        state = optimizer.init(params)
        for X, y in batches:
            params, state, info = optimizer.update(params, state, X, y)

    By default for losses without noise, the same batch in every update: a trust region in units of
    the columns' sizes, with which the loss never rises. For points that are drawn anew in every
    update pass ``damping=spring()``, for mini-batches of noisy samples ``damping=held_out()``. An
    update tries a step, looks where it leads, and damps more where it has to, all from one
    decomposition; a step to no finite loss is never taken. Both functions work under
    `torch.func.vmap` over the parameters and the state; only `monte_carlo` draws random numbers.

    Parameters
    ----------
    model_fn, criterion
        As for `ddnewton.newton_step`. In a loop pass what `ddnewton.prepare` returns.
    damping
        `trust_region`, `levenberg_marquardt`, `spring` or `held_out`, which adapt the part δ of the
        damping that all directions share; or a number or a rule of `ddnewton.damping`, which stay
        as they are: `fixed`. None is ``trust_region()``.
    learning_rate
        How much of a step is taken: a number, a function of the number of updates so far (a
        tensor), or "exact" for where the damped quadratic model is lowest along it; that is 1 but
        for groups, a ``select`` or momentum. None is what goes with the damping: 1, but for
        `held_out` and `spring`, where it falls.
    momentum
        How much μ < 1 of the step before damping pulls a step to, instead of to zero (SPRING:
        Goldshlager, Abrahamsen, Lin, 2024, arXiv 2401.10190). "exact" adds as much of the
        step before as makes the damped quadratic model lowest (Martens, Grosse, 2015, arXiv
        1503.05671, section 7). None is what goes with the damping: 0, but for `held_out` and
        `spring`.
    weight_decay
        w ≥ 0: the penalty ½ w ‖θ‖² on all parameters is part of the loss, its gradient and its
        curvature; or a pytree like the parameters with a number for every leaf. Where these differ
        inside a block, or with a ``scale``, a step is −(G + diag(w) + δ diag(scale)⁻²)⁻¹ (g + w θ),
        which takes no rule, ``select``, number as ``complement`` or ``subsampling_curvature``.
        Along directions that nothing else damps, for a rule all that it is not asked about,
        parameters go to zero at once; there pass ``complement``.
    trust_radius
        Longest step: damping is raised until ‖s / scale‖ does not exceed it, as in MINPACK.
    scale
        As for `ddnewton.newton_step`: damping and ``trust_radius`` are of s / scale, while
        ``weight_decay`` is of the parameters themselves. "jac" is by the largest sizes of the
        columns so far. "auto" is what goes with the damping: "jac" for `trust_region` and
        `levenberg_marquardt`, but where there is ``weight_decay`` with a rule, a ``select``, a
        number as ``complement`` or ``subsampling_curvature``, and None for the others. In
        `UpdateInfo`, norms are those of s / scale and of its gradient.
    select, groups, subsampling_grad, subsampling_ggn, subsampling_curvature, gram, tol, chunk_size,
    precision
        As for `ddnewton.newton_step`. What a group or a rule damps by comes on top of what adapts.
        Where a criterion gives samples no losses of their own, as Σwℓ / Σw does not, that of a
        sub-sample, or of one held out, is the batch's, with all other outputs left as they are.
    complement
        As for `ddnewton.newton_step`, or "damping": outside the kept directions damp by δ, as
        inside. With it, and Monte-Carlo or sub-sampled curvature, all of the gradient counts. To a
        number, what adapts is added.
    process_group
        As for `ddnewton.newton_step`: X and y of ``update`` are this rank's samples; parameters,
        state and info are the same on all. Copies share the group, and a pickle refuses it.

    Returns
    -------
    FunctionalOptimizer
        ``init(params) -> state`` and ``update(params, state, X, y) -> (params, state, info)``; see
        `State` and `UpdateInfo`.

    Raises
    ------
    ValueError, TypeError
        Where an argument breaks a rule, here or in ``update``; the message names it.

    Examples
    --------
    >>> import torch
    >>> curve = lambda p, x: p["height"] * torch.exp(-p["rate"] * x)
    >>> params = {"height": torch.ones(1), "rate": torch.ones(1)}
    >>> x = torch.linspace(0, 3, 20)[:, None]
    >>> optimizer = directional_newton(curve, torch.nn.MSELoss())
    >>> state = optimizer.init(params)
    >>> for _ in range(8):
    ...     params, state, info = optimizer.update(params, state, x, 3 * torch.exp(-0.5 * x))
    >>> {name: round(value.item(), 4) for name, value in params.items()}
    {'height': 3.0, 'rate': 0.5}
    """
    # Refuse what breaks a rule now, not at the first update.
    adaptation = as_adaptation(trust_region() if damping is None else damping)
    settings = Settings(
        adaptation=adaptation,
        learning_rate=adaptation.learning_rate if learning_rate is None else learning_rate,
        momentum=adaptation.momentum if momentum is None else momentum,
        weight_decay=weight_decay,
        trust_radius=trust_radius,
        complement=complement,
        scale=scale,
        box=None,
    )
    free = "free" in (gram.values() if isinstance(gram, Mapping) else [gram])
    if isinstance(scale, str) and scale == "auto":
        rules = [adaptation.rule, *(group.damping for group in groups or ())]
        options = [select, subsampling_curvature, *(group.select for group in groups or ())]
        by_directions = any(map(callable, rules)) or complement not in (None, "damping")
        by_directions |= any(option is not None for option in options)
        of_damping = automatic_scale(settings, by_directions=by_directions)
        settings = settings._replace(scale=None if free else of_damping)
    check_settings(settings)
    check_functions(model_fn, select)
    number = None if complement == "damping" else complement
    check_options(adaptation.rule, number, gram, chunk_size, tol, precision)
    check_free_scale(by_columns=free and isinstance(settings.scale, str))
    arguments = partial(
        arguments_of,
        model_fn,
        criterion=criterion,
        damping=adaptation.rule,
        select=select,
        complement=number,
        groups=groups,
        subsampling_curvature=subsampling_curvature,
        gram=gram,
        tol=tol,
        chunk_size=chunk_size,
        precision=precision,
        scale=settings.scale,
        by_sample=False,
        takes_batches=False,
    )
    init = FirstState(bool(settings.momentum), isinstance(settings.scale, str))
    update = Update(
        settings,
        arguments,
        subsampling_grad,
        subsampling_ggn,
        Notices(),
        group=GroupReference(process_group),
        automatic=is_automatic(gram),
        automatic_scale=isinstance(scale, str) and scale == "auto",
    )
    return FunctionalOptimizer(init, update)
