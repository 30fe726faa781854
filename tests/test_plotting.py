"""Figures: what is drawn is what the record says, without a warning."""

import matplotlib as mpl
import pytest
import torch
from torch import nn
from torch.func import functional_call

from ddnewton import newton_step_and_info, plotting, top_k


def everything(evals):
    return range(len(evals))


def record(select, dtype=torch.float32):
    """Two images the same: of 12 eigenvalues at most 9 are not rounding."""
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    X, y = torch.rand(4, 7, dtype=dtype), torch.rand(4, 3, dtype=dtype)
    X, y = X[[0, 0, 1, 2]], y[[0, 0, 1, 2]]

    def model_fn(params, X):
        return functional_call(model, params, (X,))

    params = dict(model.named_parameters())
    _, info = newton_step_and_info(model_fn, params, X, y, nn.MSELoss(), 1.0, select=select)
    return info


@pytest.mark.parametrize("draw", [plotting.spectrum, plotting.slopes, plotting.curvatures])
@pytest.mark.parametrize("select", [None, everything, top_k(1), top_k(4), lambda evals: [11, 3]])
def test_every_record_can_be_drawn(draw, select, tmp_path):
    with plotting.panels(1, 1) as (figure, (ax,)):
        draw(ax, record(select))
        figure.savefig(tmp_path / "figure.png")
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert ax.get_ylabel()


def test_the_spectrum_is_the_records_and_marks_its_rank():
    info = record(everything)
    with plotting.panels(1, 1) as (_, (ax,)):
        plotting.spectrum(ax, info, label="all")
    resolved, rounding, mark = ax.get_lines()
    drawn = torch.as_tensor(resolved.get_ydata())
    assert torch.equal(drawn.float(), info.evals.flip(0)[: info.rank])
    assert info.rank == 9
    assert len(rounding.get_xdata()) == 3
    assert mark.get_xdata()[0] == 9.5


def test_curvatures_average_to_the_eigenvalues():
    info = record(everything, torch.float64)
    with plotting.panels(1, 1) as (_, (ax,)):
        plotting.curvatures(ax, info)
    mean = torch.as_tensor(ax.get_lines()[-1].get_ydata())
    torch.testing.assert_close(mean, info.evals.flip(0)[: info.rank])


@pytest.mark.parametrize("draw", [plotting.spectrum, plotting.slopes, plotting.curvatures])
def test_nothing_to_draw_leaves_empty_axes(draw, tmp_path):
    none = record(lambda evals: [])
    zero = none._replace(evals=torch.zeros(3), gammas=torch.zeros(4, 3), lambdas=torch.zeros(4, 3))
    with plotting.panels(1, 2) as (figure, (left, right)):
        draw(left, none)
        draw(right, zero)
        figure.savefig(tmp_path / "figure.png")


def test_samples_without_slope_do_not_stretch_the_axis(tmp_path):
    info = record(None)
    info.gammas[0] = info.lambdas[0] = 0
    with plotting.panels(1, 2) as (figure, axes):
        plotting.slopes(axes[0], info)
        plotting.curvatures(axes[1], info)
        figure.savefig(tmp_path / "figure.png")
    assert all(ax.get_ylim()[0] > 1e-20 for ax in axes)


def test_training_curves_and_decreases(tmp_path):
    with plotting.panels(1, 2) as (figure, (left, right)):
        plotting.training(left, {"a": [2.0, 1.0], "b": [2.0, 1.5]}, "loss")
        plotting.decreases(right, [1.0, 0.1, 0.5], [0.9, 0.1, -0.2])
        figure.savefig(tmp_path / "figure.png")
    assert [line.get_color() for line in left.get_lines()] == list(plotting.COLORS[:2])
    assert len(right.collections[0].get_offsets()) == 2


def test_no_decrease_at_all_draws_no_point(tmp_path):
    with plotting.panels(1, 1) as (figure, (ax,)):
        plotting.decreases(ax, [1.0], [-1.0])
        figure.savefig(tmp_path / "figure.png")


def test_panels_restore_matplotlibs_settings():
    before = dict(mpl.rcParams)
    with plotting.panels(2, 2) as (_, axes):
        assert [ax.get_title(loc="left") for ax in axes] == ["a", "b", "c", "d"]
    assert dict(mpl.rcParams) == before
