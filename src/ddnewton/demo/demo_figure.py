"""The figure of the demo: a physics-informed net, directions of a Newton step, training curves."""

from __future__ import annotations

from pathlib import Path

from ddnewton import plotting
from ddnewton.demo.digits_training import Run
from ddnewton.demo.poisson_fits import PoissonRuns

PANEL_TITLES = (
    *("physics-informed net", "its fit, term by term", "digits: Gauss-Newton spectrum"),
    *("digits: curvatures, last step", "1,408 training images", "389 test images"),
)


def draw_demo(poisson: PoissonRuns, digits: dict[str, Run], path: Path) -> None:
    """Save the figure of both examples."""
    newton = digits["damped Newton"]
    first, last = newton.infos[0], newton.infos[-1]
    named = {f"{name}, {sum(run.seconds):.1f} s": run for name, run in digits.items()}
    with plotting.panels(2, 3) as (figure, (a, b, c, d, e, f)):
        # The physics-informed net: errors of all methods, and losses of the fit.
        for color, (name, course) in zip(plotting.COLORS, poisson.courses.items(), strict=False):
            a.plot(course.seconds, course.errors, color=color, label=name, linewidth=1.1)
        a.set(yscale="log", xlabel="seconds", ylabel="relative error of the solution")
        a.set_ylim(top=1e4)  # room for the legend
        a.legend(loc="upper right")
        losses = {name: values.tolist() for name, values in poisson.term_losses.items()}
        plotting.training(b, losses, "mean square of a term")
        b.set(yscale="log")
        # The digits: the directions of a Newton step, and what steps come to.
        plotting.spectrum(c, first, color="0.6", label=f"first mini-batch, rank {first.rank}")
        plotting.spectrum(c, last, label=f"last mini-batch, rank {last.rank}")
        plotting.curvatures(d, last)
        plotting.training(e, {key: run.losses for key, run in named.items()}, "training loss")
        plotting.training(f, {key: run.accuracies for key, run in digits.items()}, "test accuracy")
        e.set(yscale="log")
        f.set(ylim=(0.7, 1.0))
        for ax, title in zip((a, b, c, d, e, f), PANEL_TITLES, strict=True):
            ax.set_title(title)
        figure.savefig(path)
