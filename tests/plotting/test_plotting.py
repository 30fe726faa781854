"""Figures: what is drawn is what the record says, without a warning."""

import matplotlib as mpl
import pytest
import torch
from torch import nn
from torch.func import functional_call

from ddnewton import fit, newton_step_and_info, plotting, top_k
from ddnewton.diagnostics import append, plain, read, summary
from ddnewton.plotting import run_figures


def everything(evals):
    return range(len(evals))


def record(select, dtype=torch.float32, damping=1.0, **options):
    """Two images the same: of 12 eigenvalues at most 9 are not rounding."""
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    X, y = torch.rand(4, 7, dtype=dtype), torch.rand(4, 3, dtype=dtype)
    X, y = X[[0, 0, 1, 2]], y[[0, 0, 1, 2]]

    def model_fn(params, X):
        return functional_call(model, params, (X,))

    params = dict(model.named_parameters())
    problem = (model_fn, params, X, y, nn.MSELoss(), damping)
    return newton_step_and_info(*problem, select=select, **options)[1]


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


def test_leading_eigenvalues_alone_are_all_drawn():
    info = record(top_k(4), torch.float64, gram="free")
    assert info.rank == -1
    with plotting.panels(1, 2) as (_, (left, right)):
        plotting.spectrum(left, info)
        plotting.curvatures(right, info)
    (line,) = left.get_lines()
    assert line.get_ydata().tolist() == info.evals.flip(0).tolist()
    assert len(right.get_lines()[-1].get_xdata()) == 4


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


OF_DIRECTIONS = [plotting.signal_to_noise, plotting.budget, plotting.curvature_bias]
SELECTS = [None, everything, top_k(1), top_k(4), lambda evals: [11, 3], lambda evals: []]


def handed(label, ax):
    """Return the numbers of the line whose legend begins so."""
    (line,) = [line for line in ax.get_lines() if str(line.get_label()).startswith(label)]
    return torch.as_tensor(line.get_ydata(), dtype=torch.float64)


@pytest.mark.parametrize("draw", OF_DIRECTIONS)
@pytest.mark.parametrize("select", SELECTS)
def test_a_record_and_its_summary_are_drawn_alike(draw, select, tmp_path):
    info = record(select)
    with plotting.panels(1, 2) as (figure, (left, right)):
        draw(left, info)
        draw(right, summary(info))
        figure.savefig(tmp_path / "figure.png")
    assert left.get_xscale() == left.get_yscale() == "log"
    drawn = [[line.get_xydata().tolist() for line in ax.get_lines()] for ax in (left, right)]
    assert repr(drawn[0]) == repr(drawn[1])  # where a nan is equal to itself


@pytest.mark.parametrize("draw", OF_DIRECTIONS)
def test_a_panel_with_nothing_to_draw_says_so(draw, tmp_path):
    none = record(lambda evals: [])
    zero = none._replace(
        **{name: torch.zeros(3) for name in ("evals", "dampings", "coefficients")},
        predicted_decrease=torch.zeros(3),
        gammas=torch.zeros(4, 3),
        lambdas=torch.zeros(4, 3),
    )
    with plotting.panels(1, 2) as (figure, (left, right)):
        draw(left, none)
        draw(right, zero._replace(rank=torch.tensor(0)))
        figure.savefig(tmp_path / "empty.png")
        draw(figure.add_subplot(), zero)
        figure.savefig(tmp_path / "zero.png")
    assert [ax.texts[0].get_text() for ax in (left, right)] == [left.texts[0].get_text()] * 2
    assert left.texts[0].get_text().startswith("no ")


def test_signal_to_noise_is_that_of_the_samples():
    info = record(top_k(4), torch.float64)
    with plotting.panels(1, 1) as (_, (ax,)):
        plotting.signal_to_noise(ax, info)
    for label, values in (("slope", info.gammas), ("curvature", info.lambdas)):
        ratio = (values.mean(0) ** 2 / values.var(0)).flip(0)
        torch.testing.assert_close(handed(label, ax), ratio)
    assert handed("1/N, N = 4", ax).tolist() == [0.25, 0.25]


def test_signal_to_noise_has_a_line_for_the_samples_of_each():
    info = record(top_k(4))
    with plotting.panels(1, 1) as (_, (ax,)):
        plotting.signal_to_noise(ax, info._replace(lambdas=info.lambdas[:2]))
    assert handed("1/N, N = 4", ax)[0] == 1 / 4
    assert handed("1/N, N = 2", ax)[0] == 1 / 2


def test_one_sample_has_no_signal_to_noise(tmp_path):
    info = record(None)
    with plotting.panels(1, 1) as (figure, (ax,)):
        plotting.signal_to_noise(
            ax, info._replace(gammas=info.gammas[:1], lambdas=info.lambdas[:1])
        )
        figure.savefig(tmp_path / "figure.png")
    assert ax.texts[0].get_text() == "no spread of samples"
    assert not ax.get_lines()


def test_a_budget_is_what_the_step_is_made_of():
    def damping(evals, evecs, gammas, lambdas):
        return torch.tensor([torch.inf, 0.5, 0.0, torch.inf, 2.0], dtype=evals.dtype)

    info = record(top_k(5), torch.float64, damping)
    with plotting.panels(1, 1) as (_, (ax,)):
        plotting.budget(ax, info)
    gamma, curvature = info.gammas.mean(0).flip(0), info.lambdas.mean(0).flip(0)
    torch.testing.assert_close(handed("curvature", ax), curvature)
    torch.testing.assert_close(handed("slope", ax), gamma.abs())
    none = torch.nan  # of what a logarithmic axis has no place for
    delta = torch.tensor([2.0, none, none, 0.5, none], dtype=torch.float64)
    torch.testing.assert_close(handed("damping", ax), delta, equal_nan=True)
    c = -gamma / (curvature + torch.tensor([2.0, torch.inf, 0.0, 0.5, torch.inf]))
    gain = -(gamma * c + curvature * c**2 / 2)
    gain[[1, 4]] = none
    torch.testing.assert_close(handed("predicted gain", ax), gain, equal_nan=True)
    (skipped,) = [line for line in ax.get_lines() if line.get_label() == "skipped: 2"]
    assert skipped.get_xdata().tolist() == [2, 5]


def test_the_bias_of_curvature_is_the_eigenvalue_over_the_mean_of_others():
    info = record(top_k(4), torch.float64, subsampling_curvature=[1, 2, 3], subsampling_ggn=[0, 2])
    with plotting.panels(1, 1) as (_, (ax,)):
        plotting.curvature_bias(ax, info, label="held out")
    ratio = info.evals / info.lambdas.mean(0)
    torch.testing.assert_close(handed("held out", ax), ratio.flip(0))
    error = (info.lambdas.var(0) / 3).sqrt() / info.lambdas.mean(0)
    (band,) = ax.collections
    corners = torch.as_tensor(band.get_paths()[0].vertices)[:, 1]
    torch.testing.assert_close(corners.max(), (ratio * error.exp()).max())
    torch.testing.assert_close(corners.min(), (ratio / error.exp()).min())


def test_the_directions_own_samples_show_no_bias():
    with plotting.panels(1, 1) as (_, (ax,)):
        plotting.curvature_bias(ax, record(None, torch.float64), label="own")
    torch.testing.assert_close(handed("own", ax), torch.ones(9, dtype=torch.float64))


def course(steps):
    """Return lines as they are read, with all that may happen."""
    inf, nan = torch.inf, torch.nan
    for i in range(steps):
        yield {
            "loss": nan if i == 3 else 100.0 / 2**i,
            "ratio": [1.0, -inf, 7.0, nan, 0.5][i % 5],
            "damping": [1.0, 10.0, 0.0, inf][i % 4],
            "rank": nan if i < 4 else 20.0 + i,
            "gradient_share": 0.5,
            "gradient_norm": 1.0 / (i + 1),
            "accepted": i != 1,
        } | ({"test_loss": 3.0 + i} if i % 3 == 2 else {})


def test_a_history_is_that_of_the_lines(tmp_path):
    lines = list(course(9))
    with plotting.panels(2, 3) as (figure, axes):
        plotting.history(axes, lines)
        figure.savefig(tmp_path / "figure.png")
    loss, damping, ratio, rank, share, norm = axes
    whole = torch.tensor([line["loss"] for line in lines]).double()
    assert torch.equal(handed("loss", loss).nan_to_num(-1), whole.nan_to_num(-1))
    assert handed("test_loss", loss).tolist() == [5.0, 8.0, 11.0]
    assert handed("no step: 1", loss).numel() == 1
    assert loss.get_yscale() == damping.get_yscale() == "log"
    assert damping.get_lines()[0].get_xdata().tolist() == [3, 7]  # where δ = 0
    drawn = torch.as_tensor(damping.get_lines()[1].get_ydata())
    assert drawn.nan_to_num(-1).tolist() == [1, 10, -1, -1, 1, 10, -1, -1, 1]
    assert handed("above 3: 2", ratio).tolist() == [3.0, 3.0]
    assert handed("below -1: 2", ratio).tolist() == [-1.0, -1.0]
    assert rank.get_lines()[0].get_xdata()[4] == 5
    assert rank.get_lines()[0].get_ydata()[4:].tolist() == [24, 25, 26, 27, 28]
    assert share.get_lines()[0].get_ydata().tolist() == [0.5] * 9
    assert handed("gradient", norm).tolist() == [1.0 / (i + 1) for i in range(9)]


def test_steps_are_the_users_where_every_line_has_one():
    lines = [line | {"step": 10 * i} for i, line in enumerate(course(4))]
    with plotting.panels(1, 2) as (_, axes):
        plotting.history(axes[:1], lines)
        plotting.history(axes[1:], [*lines, {"loss": 1.0}])
    assert axes[0].get_lines()[0].get_xdata().tolist() == [0, 10, 20, 30]
    assert axes[1].get_lines()[0].get_xdata().tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("lines", [[], [{}], [{"loss": None, "rank": "inf"}], [{"note": "x"}] * 3])
def test_a_history_of_nothing_says_so(lines, tmp_path):
    with plotting.panels(2, 3) as (figure, axes):
        plotting.history(axes, lines)
        figure.savefig(tmp_path / "figure.png")
    assert [ax.texts[0].get_text() for ax in axes] == ["not in this run"] * 6


def test_the_history_of_an_optimizer_has_one_loss():
    X, y = torch.rand(4, 2), torch.rand(4, 1)
    result = fit(lambda p, x: x @ p, torch.zeros(2, 1), X, y, max_updates=1)
    with plotting.panels(1, 1) as (_, axes):
        plotting.history(axes, [plain(result.info)])
    (curve,) = axes[0].get_lines()
    assert curve.get_ydata().tolist() == [result.info.loss.item()]


@pytest.mark.parametrize(
    "lines", [list(course(1)), list(course(2)), [{"loss": 0.0}, {"loss": -1.0}]]
)
def test_short_runs_can_be_drawn(lines, tmp_path):
    with plotting.panels(2, 3) as (figure, axes):
        plotting.history(axes, lines)
        figure.savefig(tmp_path / "figure.png")
    drawn = axes[0].get_lines()[0]
    assert len(drawn.get_xdata()) == len(lines)
    assert (drawn.get_marker() == ".") == (len(lines) == 1)


@pytest.mark.parametrize("groups", [0, 1, 2, run_figures.SHOWN_GROUPS + 1])
def test_an_overview_shows_the_last_directions(groups, tmp_path, monkeypatch):
    file, info, drawn = tmp_path / "run.jsonl", record(top_k(4)), []
    for draw in ("spectrum", "signal_to_noise", "budget"):
        monkeypatch.setattr(
            run_figures, draw, lambda ax, each: drawn.append((ax.get_title("left"), each))
        )
    for step in range(3):
        parts = [info._replace(loss=info.loss + step + i) for i in range(groups)]
        append(file, info, parts if groups and step < 2 else None)
    plotting.overview(read(file), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    shown = min(groups, run_figures.SHOWN_GROUPS)
    letters = "ghijklmnopqrstuvwxyz"[: 3 * shown]
    assert [letter for letter, _ in drawn] == list(letters)
    losses = [each.loss for _, each in drawn[::3]]
    expected = [(info.loss + 1 + i).double() for i in range(shown)]
    assert losses == expected


def test_an_overview_needs_a_step(tmp_path):
    with pytest.raises(ValueError, match=r"^overview: a run must have at least one step; got none"):
        plotting.overview([], tmp_path / "figure.png")
