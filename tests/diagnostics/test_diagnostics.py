"""Numbers written and read again are the same numbers; what is broken is named."""

import json
import math
import tempfile
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_map

from ddnewton import newton_step_and_info, per_layer, top_k
from ddnewton.damping import signal_to_noise
from ddnewton.diagnostics import Summary, append, plain, read, run_file, summaries, summary


class Told(NamedTuple):
    """A record of scalars, such as the optimizer's."""

    loss: Tensor
    ratio: Tensor
    attempts: Tensor
    accepted: Tensor


def told(loss=0.5, ratio=1.0):
    return Told(torch.tensor(loss), torch.tensor(ratio), torch.tensor(2), torch.tensor(True))


def record(damping=1.0, dtype=torch.float32, **options):
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    X, y = torch.rand(8, 7, dtype=dtype), torch.rand(8, 3, dtype=dtype)

    def model_fn(params, X):
        return functional_call(model, params, (X,))

    params = dict(model.named_parameters())
    if "groups" in options:
        options["groups"] = per_layer(params)
    return newton_step_and_info(model_fn, params, X, y, nn.MSELoss(), damping, **options)[1]


def same(left, right):
    return all(
        x.dtype == y.dtype and torch.equal(x.nan_to_num(-1), y.nan_to_num(-1))
        for x, y in zip(left, right, strict=True)
    )


def standard(text):
    """Parse what JSON's standard knows, and nothing else."""

    def refuse(token):
        raise AssertionError(token)

    return json.loads(text, parse_constant=refuse)


def test_a_summary_holds_means_and_variances():
    info = record(subsampling_grad=[0, 1, 2], subsampling_curvature=range(2, 8))
    found = summary(info)
    gammas, lambdas = info.gammas.double(), info.lambdas.double()
    torch.testing.assert_close(found.slope, gammas.mean(0))
    torch.testing.assert_close(found.slope_variance, gammas.var(0))
    torch.testing.assert_close(found.curvature, lambdas.mean(0))
    torch.testing.assert_close(found.curvature_variance, lambdas.var(0))
    assert (found.samples, found.curvature_samples, found.rank) == (3, 6, info.rank)
    for name in ("loss", "evals", "dampings", "coefficients", "predicted_decrease"):
        assert torch.equal(getattr(found, name), getattr(info, name).double())
    assert summary(found) is found


def test_the_spread_of_one_sample_is_not_known():
    found = summary(record(subsampling_grad=[3], subsampling_curvature=[1]))
    assert found.slope_variance.isnan().all()
    assert found.curvature_variance.isnan().all()
    assert found.slope.isfinite().all()


def test_slopes_may_be_so_small_that_their_squares_are_no_float32():
    info = record()
    small = summary(info._replace(gammas=info.gammas * 1e-30))
    torch.testing.assert_close(small.slope_variance * 1e60, summary(info).slope_variance)
    assert (small.slope_variance > 0).all()


def test_members_of_an_ensemble_are_summed_up_one_by_one():
    info = record(select=top_k(2))
    several = tree_map(lambda x: torch.stack([x, 2 * x]), info)
    members = vmap(summary)(several)
    first = tree_map(lambda x: x[0], members)
    assert same(first, summary(info))
    with pytest.raises(ValueError, match=r"summary: info must be one record; got evals of shape"):
        summary(several)


@pytest.mark.parametrize("wrong", [told(), {"evals": 1}, None])
def test_a_summary_is_of_a_record(wrong):
    with pytest.raises(TypeError, match=r"^summary: info must be a NewtonInfo or a Summary; got "):
        summary(wrong)


def test_blocks_are_summed_up_one_by_one():
    with pytest.raises(
        TypeError, match=r"got tuple\. With groups, pass their records one by one\."
    ):
        summary(record(groups=True))


def test_a_plain_record_has_the_numbers_of_the_tensors():
    info = record(signal_to_noise())
    numbers = standard(json.dumps(plain(info), allow_nan=False))
    assert list(numbers) == list(info._fields)
    assert numbers["rank"] == info.rank
    assert isinstance(numbers["rank"], int)
    assert numbers["lambdas"] == info.lambdas.tolist()
    dampings = torch.tensor([float(x) for x in numbers["dampings"]])
    assert torch.equal(dampings, info.dampings)
    assert numbers["dampings"].count("inf") == info.dampings.isinf().sum() > 0


def test_a_plain_record_of_scalars_has_booleans_and_integers():
    assert plain(told(0.5, math.nan)) == {
        "loss": 0.5,
        "ratio": None,
        "attempts": 2,
        "accepted": True,
    }
    assert plain(told(-math.inf))["loss"] == "-inf"


@pytest.mark.parametrize("wrong", [[1.0], (1.0,), {"loss": 1.0}, torch.ones(2), None])
def test_only_named_tuples_are_plain_records(wrong):
    with pytest.raises(TypeError, match=r"^plain: info must be a NamedTuple of tensors; got "):
        plain(wrong)


@pytest.mark.parametrize("wrong", ["0.5", None, 1j, torch.tensor(1j), {}, {"mean": 1.0}])
def test_what_is_no_number_is_refused(wrong, tmp_path):
    with pytest.raises(TypeError, match=r"^plain: loss must be a number; got "):
        plain(told()._replace(loss=wrong))
    with pytest.raises(TypeError, match=r"^append: note must be a number; got "):
        append(tmp_path, told(), note=wrong)
    assert not list(tmp_path.iterdir())


@given(st.lists(st.floats(), min_size=1, max_size=5))
@example([math.nan, math.inf, -math.inf, -0.0, 5e-324, 0.1])
def test_numbers_come_back_exactly(values):
    with tempfile.TemporaryDirectory() as folder:
        for value in values:
            loss = torch.tensor(value, dtype=torch.float64)
            append(folder, told()._replace(loss=loss), value=value, tensor=loss.float())
        lines = read(folder)
    for value, line in zip(values, lines, strict=True):
        single = torch.tensor(value, dtype=torch.float32).item()
        assert [repr(line["loss"]), repr(line["value"])] == [repr(value)] * 2
        assert repr(line["tensor"]) == repr(single)


@pytest.mark.parametrize("options", [{}, {"groups": True}, {"select": lambda evals: []}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions_come_back_exactly(options, dtype, tmp_path):
    infos = record(signal_to_noise(), dtype, **options)
    append(tmp_path, told(), infos)
    append(tmp_path, told())
    with_directions, without = read(tmp_path)
    found = summaries(with_directions)
    for back, info in zip(found, infos if "groups" in options else [infos], strict=True):
        assert isinstance(back, Summary)
        assert same(back, summary(info))
    assert summaries(without) == []
    assert "directions" not in without


def test_directions_may_be_summaries(tmp_path):
    info = record(subsampling_grad=[3])
    append(tmp_path, told(), summary(info))
    append(tmp_path, told(), [summary(info), info])
    one, two = map(summaries, read(tmp_path))
    assert [same(each, summary(info)) for each in one + two] == [True] * 3


def test_a_step_without_an_optimizer_has_the_totals_of_its_blocks(tmp_path):
    info, blocks = record(), record(groups=True)
    for each in (info, summary(info), blocks):
        append(tmp_path, each, step=1)
    one, summed_up, together = read(tmp_path)
    assert one == summed_up
    assert set(one) == {"loss", "predicted_decrease", "gradient_norm", "gradient_share"} | {
        "flat_share",
        "rank",
        "step",
    }
    for name in ("loss", "gradient_norm", "gradient_share", "rank"):
        assert one[name] == getattr(info, name).item()
    assert one["predicted_decrease"] == info.predicted_decrease.double().sum()
    assert together["rank"] == sum(block.rank for block in blocks)
    squares = [block.gradient_norm.item() ** 2 for block in blocks]
    assert together["gradient_norm"] == pytest.approx(sum(squares) ** 0.5)
    decreases = [block.predicted_decrease.double().sum().item() for block in blocks]
    assert together["predicted_decrease"] == pytest.approx(sum(decreases))
    assert together["gradient_share"] == min(block.gradient_share for block in blocks)


def test_the_rank_of_leading_directions_is_not_known(tmp_path):
    blocks = record(groups=True)
    unknown = (blocks[0]._replace(rank=torch.tensor(-1)), *blocks[1:])
    append(tmp_path, unknown)
    assert read(tmp_path)[0]["rank"] == -1


@pytest.mark.parametrize("wrong", [told(), [told()], [], (), {"evals": 1.0}, 1.0])
def test_directions_are_those_of_a_step(wrong, tmp_path):
    with pytest.raises(TypeError, match=r"^append: directions must be what newton_step_and_info"):
        append(tmp_path, told(), wrong)


@pytest.mark.parametrize("wrong", [(told(), told()), [], {"loss": 1.0}, None])
def test_a_line_is_of_one_record(wrong, tmp_path):
    with pytest.raises(TypeError, match=r"^append: info must be a NamedTuple of tensors; got "):
        append(tmp_path, wrong)


def test_a_line_has_one_number_for_a_name(tmp_path):
    with pytest.raises(ValueError, match=r"^append: loss must be one number; got 2 of them\."):
        append(tmp_path, told()._replace(loss=torch.ones(2)))
    with pytest.raises(ValueError, match=r"^append: classes must be one number; got 3 of them\."):
        append(tmp_path, told(), classes=[1, 2, 3])
    with pytest.raises(ValueError, match=r"name of its own; got attempts, loss\. Choose another"):
        append(tmp_path, told(), loss=1.0, attempts=3, epoch=1)
    assert not list(tmp_path.iterdir())


def test_the_file_is_standard_json_line_by_line(tmp_path):
    file = tmp_path / "new" / "folder.of" / "first.jsonl"
    append(file, told(math.nan, math.inf), record(signal_to_noise()), epoch=3)
    append(str(file), told(), accuracy=torch.tensor(0.5), share=True)
    first, second = map(standard, file.read_text().splitlines())
    assert (first["loss"], first["ratio"], first["epoch"]) == (None, "inf", 3)
    assert second == plain(told()) | {"accuracy": 0.5, "share": True}
    assert run_file(file.parent) == file.parent / "run.jsonl"


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path, caplog):
    for epoch in range(3):
        append(tmp_path, told(), epoch=epoch)
    whole = run_file(tmp_path).read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for end in range(start, len(whole) + 1):
        caplog.clear()
        run_file(tmp_path).write_bytes(whole[:end])
        complete = end >= len(whole) - 1
        cut = start < end and not complete
        left = [0, 1, 2] if complete else [0, 1]
        assert [line["epoch"] for line in read(tmp_path)] == left
        assert ("line 3 was cut off" in caplog.text) == cut
        append(tmp_path, told(), epoch=3)
        assert [line["epoch"] for line in read(tmp_path)] == [*left, 3]
        assert ("its last line was cut off, and is taken out" in caplog.text) == cut


@pytest.mark.parametrize("broken", ["", "{", '{"loss": }', "[1.0]", "1.0", "\N{SNOWMAN}"])
def test_a_broken_line_is_named(broken, tmp_path):
    file = run_file(tmp_path)
    file.write_text(f'{{"loss": 1.0}}\n{broken}\n{{"loss": 0.5}}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"^read: line 2 of .*run\.jsonl must be a JSON object; "):
        read(tmp_path)


def test_a_file_of_something_else_is_refused(tmp_path):
    file = tmp_path / "picture.jsonl"
    file.write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff\xfe")
    with pytest.raises(ValueError, match=r"^read: line 1 of .*picture\.jsonl must be a JSON obj"):
        read(file)


def test_a_missing_run_is_named(tmp_path):
    (tmp_path / "log.txt").touch()
    (tmp_path / "folder.jsonl").mkdir()
    for missing in ("", "none", "none.jsonl", "log.txt", "folder.jsonl"):
        with pytest.raises(ValueError, match=r"^read: path must name a run, a \.jsonl file or its"):
            read(tmp_path / missing)


def test_an_empty_run_has_no_lines(tmp_path):
    run_file(tmp_path).touch()
    assert read(tmp_path) == []


@pytest.mark.parametrize(
    "wrong", [1.0, {"evals": [1.0]}, [{"evals": [1.0]}], [1.0], ["evals"], [[1.0]]]
)
def test_other_directions_are_refused(wrong):
    with pytest.raises(ValueError, match=r"^summaries: directions must hold the fields of a Summ"):
        summaries({"directions": wrong})


def test_directions_of_words_are_refused():
    fields = plain(summary(record()))
    with pytest.raises(ValueError, match=r"^summaries: directions must hold the fields of a Summ"):
        summaries({"directions": [fields | {"slope": "steep"}]})
