"""`fit`: updates until there is nothing more to gain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ddnewton.criteria import Criteria
from ddnewton.distributed.agreement import Processes, agreeing, team_of
from ddnewton.distributed.fingerprints import options_told
from ddnewton.edge import computing
from ddnewton.errors import on_behalf
from ddnewton.inputs.checks import check_params
from ddnewton.inputs.dtensor_arguments import any_dtensor, ways_of, whole_tree
from ddnewton.inputs.groups import Group, blocks_of
from ddnewton.inputs.scale import Scale, scale_of
from ddnewton.inputs.terms import TermIndices
from ddnewton.optim.adaptation import Adaptation, LearningRate
from ddnewton.optim.box import Bounds, box_of
from ddnewton.optim.fit_loop import Job, check_alone, check_watching, fitted, watcher
from ddnewton.optim.fit_record import Fit
from ddnewton.optim.fitted_model import with_fitted_model
from ddnewton.optim.functional import directional_newton
from ddnewton.optim.points import are_fixed, check_points, points_at
from ddnewton.optim.progress import progress_of
from ddnewton.optim.settings import Complement, WeightDecay, check_bounded, decays_of
from ddnewton.optim.state import State, check_state, first_state
from ddnewton.optim.stopping import Limits, check_limits
from ddnewton.types import AnyModelFn, DampingRule, GramWays, Precision, PyTree, Select


@computing
def fit(
    model_fn: AnyModelFn,
    params: PyTree,
    X: PyTree,
    y: PyTree,
    criterion: Criteria = F.mse_loss,
    damping: float | Tensor | DampingRule | Adaptation | None = None,
    *,
    scale: Scale | Literal["auto"] = "auto",
    bounds: Bounds | None = None,
    ftol: float | None = 1e-15,
    xtol: float | None = 1e-15,
    gtol: float | None = 1e-15,
    max_updates: int | None = 1000,
    max_seconds: float | None = None,
    callback: Callable[[Fit], object] | None = None,
    progress: bool = False,
    state: State | None = None,
    learning_rate: LearningRate | None = None,
    momentum: float | Literal["exact"] | None = None,
    weight_decay: WeightDecay = 0.0,
    trust_radius: float | None = None,
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
) -> Fit:
    r"""Fit parameters: update them until the loss is at its minimum.

    What `scipy.optimize.curve_fit` and `least_squares` are for vectors, for any pytree of tensors,
    any loss, several terms, any device: damped Gauss-Newton steps, as long as the loss falls.

    .. code-block:: python

        result = fit(model_fn, params, X, y)
        errors = standard_errors(model_fn, result.params, X, y)

    Parameters
    ----------
    model_fn, params, X, y, criterion
        As for `ddnewton.newton_step`, dicts of terms included; ``params`` are the start. X and y,
        or entries of them, may be functions of the number of updates so far: see below. A larger
        model is traced once at the start, as `ddnewton.prepare` does: what else ``model_fn`` reads
        has to stay as it is during the fit.
    damping
        As for `ddnewton.directional_newton`; None is `trust_region`. For points that are drawn anew
        in every update take `spring`.
    scale
        As for `ddnewton.directional_newton`, SciPy's ``x_scale``. "auto" is what goes with the
        damping: "jac", by which parameters may be of any size, unless that is a number or made for
        mini-batches.
    bounds
        ``(lower, upper)``, each a number or a pytree like ``params`` of numbers or tensors; inf and
        -inf where there is none. The fit starts inside, and no update leaves the box, not by a
        rounding. A parameter whose bounds are equal is constant.
    ftol, xtol, gtol
        The fit has converged when a step lowers the loss by less than ``ftol`` of it, is shorter
        than ``xtol`` of the parameters, in units of the scale, or starts where the gradient is zero
        to ``gtol``; None leaves a test out. The first two are `scipy.optimize.least_squares`'s, the
        last is MINPACK's, the largest cosine between the residuals and the column of a parameter.
        All of them ask also that a step without damping has no more to gain. Whatever they are, a
        fit ends where what is left to gain is lost in the rounding of the loss. As they are, they
        ask for all digits; the 1e-8 of SciPy ends sooner.
    max_updates, max_seconds
        How many updates, and how long on the clock, at most. An update that has begun is ended.
    callback
        ``callback(fit)`` is called after every update with a `Fit` of what there is so far. It
        ends the fit by ``raise StopIteration``, as in SciPy; any other exception passes on.
    progress
        Show a bar of tqdm, or lines where that is not installed.
    state
        `Fit.state`, to go on, with `Fit.params` as ``params``, where a fit ended: the updates are
        those that it would have made itself, to the bit.
    learning_rate, momentum, weight_decay, trust_radius, complement
        As for `ddnewton.directional_newton`. Bounds do not go with momentum.
    select, groups, subsampling_grad, subsampling_ggn, subsampling_curvature, gram, tol, chunk_size,
    precision
        As for `ddnewton.newton_step`.
    process_group
        As for `ddnewton.newton_step`: X and y, or what they return, are this rank's samples, and
        the `Fit` is the same on all. ``callback`` is called on all, and ends the fit on all; the
        first one shows the progress and has the clock. Ctrl-C is not caught.

    Returns
    -------
    Fit
        ``params``, ``loss``, the number of ``updates``, the ``reason`` why it ended, ``info``,
        ``state`` and ``history``. The parameters are the best so far, whatever ended the fit: those
        of the lowest loss (the penalty of a weight decay included), or, where the points change, of
        the last update. That holds for Ctrl-C too (the second one goes through), and where an
        update finds nan or inf.

    Raises
    ------
    ValueError, TypeError
        Where an argument breaks a rule, and where the loss is not finite at the start.

    Notes
    -----
    **New points.** ``X=lambda t: draw(t // 10)`` draws anew every ten updates. A function is called
    once in every update; for a draw to be made once, and shared by X and y, remember the last one:

    .. code-block:: python

        draw = functools.lru_cache(1)(draw)        # draw(k) -> points, targets, for the k-th draw
        fit(model_fn, params, lambda t: draw(t // 10)[0], lambda t: draw(t // 10)[1])

    Let it depend on k alone, by a generator with the seed k: then a fit that goes on from a state
    draws what it would have drawn.

    **Bounds** are kept by projected steps with an active set (Bertsekas, 1982; Kanzow, Yamashita,
    Fukushima, 2004): a parameter at a bound whose slope points outwards is held, the step of the
    others is cut to the box. The tests are of the parameters that no bound holds.

    Sources: Moré, "The Levenberg-Marquardt algorithm: implementation and theory", 1978, for the
    tests; Branch, Coleman, Li, SIAM J. Sci. Comput. 21, 1999, for those of SciPy.

    Examples
    --------
    A curve fit, with bounds, and how well the data determine it:

    >>> import torch
    >>> from ddnewton import standard_errors
    >>> decay = lambda p, x: p["height"] * torch.exp(-p["rate"] * x)
    >>> x = torch.linspace(0, 3, 8, dtype=torch.float64)
    >>> y = torch.tensor([2.98, 2.41, 1.96, 1.59, 1.26, 1.03, 0.84, 0.67], dtype=torch.float64)
    >>> start = {"height": torch.ones((), dtype=torch.float64), "rate": torch.ones(()).double()}
    >>> result = fit(decay, start, x, y, bounds=({"height": 0.0, "rate": 0.0}, torch.inf))
    >>> result.reason
    'converged: what is left to gain is lost in the rounding of the loss'
    >>> {name: round(value.item(), 3) for name, value in result.params.items()}
    {'height': 2.983, 'rate': 0.495}
    >>> errors = standard_errors(decay, result.params, x, y)
    >>> {name: round(value.item(), 3) for name, value in errors.items()}
    {'height': 0.008, 'rate': 0.003}

    An equation u″ = −π² sin πx and its two ends, with the height of the force unknown and three
    measurements of u: three terms of one loss.

    >>> def wave(p, x):
    ...     return p["u"][0] * torch.sin(torch.pi * x) + p["u"][1] * x
    >>> def equation(p, x):
    ...     u = lambda t: wave(p, t)
    ...     curvature = torch.func.jvp(torch.func.grad(lambda t: u(t).sum()), (x,), (1 + 0 * x,))[1]
    ...     return curvature + p["force"] * torch.sin(torch.pi * x)
    >>> params = {"u": torch.ones(2).double(), "force": torch.ones(()).double()}
    >>> points = {"inside": x[1:7] / 3, "ends": x[[0, 7]] / 3, "data": x[2:5] / 3}
    >>> zero = {"inside": torch.zeros(6), "ends": torch.zeros(2)}
    >>> targets = {**zero, "data": torch.sin(torch.pi * points["data"])}
    >>> result = fit({"inside": equation, "ends": wave, "data": wave}, params, points, targets)
    >>> round(result.params["force"].item() / torch.pi**2, 6)
    1.0

    To stop early, and go on later:

    >>> def stop(fit):
    ...     if fit.loss < 1e-2:
    ...         raise StopIteration
    >>> result = fit(decay, start, x, y, callback=stop)
    >>> result.reason
    'stopped: by the callback'
    >>> result = fit(decay, result.params, x, y, state=result.state)
    >>> result.reason.startswith("converged")
    True
    """
    limits = Limits(ftol, xtol, gtol, max_updates, max_seconds)
    points = lru_cache(1)(partial(points_at, (X, y)))
    team = team_of(process_group, params)
    with agreeing(team, lambda: options_told({"bounds": whole_tree(bounds), **limits._asdict()})):
        # Refuse what breaks a rule, before any work.
        check_limits(limits, ranks=team is None and any_dtensor(params))
        check_watching(callback, progress)
        check_params(params)
        check_points(X=X, y=y)
        check_alone(params, X, y)
        gram = ways_of(gram, params) if team is None else gram
        plan = on_behalf(directional_newton)(
            model_fn,
            criterion,
            damping,
            learning_rate=learning_rate,
            momentum=momentum,
            weight_decay=weight_decay,
            trust_radius=trust_radius,
            scale=scale,
            select=select,
            complement=complement,
            groups=groups,
            subsampling_grad=subsampling_grad,
            subsampling_ggn=subsampling_ggn,
            subsampling_curvature=subsampling_curvature,
            gram=gram,
            tol=tol,
            chunk_size=chunk_size,
            precision=precision,
            process_group=process_group,
        ).update
        settings = plan.settings
        blocks_of(groups, params, select, settings.adaptation.rule)
        decays_of(weight_decay, params)
        scale_of(whole_tree(settings.scale), whole_tree(params))
        kept = {"momentum": bool(settings.momentum), "sizes": isinstance(settings.scale, str)}
        start = first_state(params, **kept) if state is None else state
        check_state(start, params, **kept)
        if bounds is not None:
            check_bounded(settings, subsampling_curvature)
            box = box_of(whole_tree(bounds), whole_tree(params))
            plan = replace(plan, settings=settings._replace(box=box))
        # Find the layers of the model, if that pays, at the first points.
        traced = params if team is None else whole_tree(params)
        plan = with_fitted_model(plan, traced, *points(int(start.updates)), team=team)
        fixed = are_fixed(team, X, y)
    # Update until there is a reason to end.
    with progress_of(progress and (team is None or team.leads), max_updates) as tell:
        job = Job(plan, points, fixed, limits, watcher(callback, tell), team)
        return fitted(job, params, start)
