"""curves.png: what of metrics.jsonl is drawn, on which scale, and which numbers stand beside it."""

import dataclasses
import json
import math

import pytest
from PIL import Image

from helpers.data import write_jsonl
from helpers.runs import run_until, tiny
from trainer.report import chart
from trainer.report.chart import GREY, logarithmic_ticks, thinned, ticks
from trainer.report.curves import TRAINING, VALIDATION, draw_curves, read_curves, smoothed
from trainer.stage import run_stage
from trainer.train_sft_vlm import SFT_VLM

KINDS = ("what", "where", "count")


def exams(step: int, *names: str) -> list[dict]:
    """What a run writes of exams with three kinds of questions each, and of the validation before them."""
    marks = {name: {kind: (step + 10 * place) / 100 for place, kind in enumerate(KINDS)} for name in names}
    record = {"step": step, "exam": (step + 10) / 100}
    for name, kinds in marks.items():
        record |= {f"exam/{name}": (step + 10) / 100, **{f"exam/{name}/{kind}": mark for kind, mark in kinds.items()}}
    return [{"step": step, "val_loss": 3 - step / 100}, record]


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """The texts of the pictures that are drawn."""
    texts, text = [], chart.Pen.text
    monkeypatch.setattr(
        chart.Pen, "text", lambda pen, at, words, *rest: (texts.append(words), text(pen, at, words, *rest))
    )
    return texts


@pytest.mark.parametrize(("val_samples", "steps"), [(0, [1, 2, 3]), (2, [1, 2])])
def test_a_stage_leaves_curves_and_a_resumed_one_goes_on_with_them(
    val_samples, steps, data_folder, tower_folder, capsys, written, monkeypatch
):
    config = tiny(SFT_VLM, data_folder, tower_folder, val_samples=val_samples, save_interval=1)
    run_until(config, 1, monkeypatch)
    assert not (config.run_dir / "curves.png").exists()
    run_stage(dataclasses.replace(config, from_resume=1))
    path = config.run_dir / "curves.png"
    assert f"curves:  {path}" in capsys.readouterr().out
    curves = read_curves(config.run_dir / "metrics.jsonl")
    assert [step for step, _ in curves["loss"]] == steps
    assert [step for step, _ in curves.get("val_loss", ())] == (steps if val_samples else [])
    with Image.open(path) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert TRAINING in colours and (VALIDATION in colours) == bool(val_samples)
    best = min(curves.get("val_loss", [(0, math.inf)]), key=lambda point: point[1])[0]
    assert [text for text in written if text.startswith("best: ")] == ([f"best: step {best}"] if val_samples else [])


def test_values_that_are_no_numbers_are_left_out_and_an_empty_log_draws_nothing(tmp_path):
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"step": 2, "val_loss": 1.5}, {"step": 3}]
    path = write_jsonl(tmp_path / "metrics.jsonl", [*records, {"step": 3, "loss": None, "exam/x": 0.5}])
    assert read_curves(path) == {"loss": [(1, 2.0)], "val_loss": [(2, 1.5)], "exam/x": [(3, 0.5)]}
    assert draw_curves(path, tmp_path / "curves.png", "title") and (tmp_path / "curves.png").is_file()
    path.write_text(json.dumps({"step": 1, "speed": 3.0}) + "\n")
    assert not draw_curves(path, tmp_path / "none.png", "title") and not (tmp_path / "none.png").exists()


def test_exams_have_a_panel_and_the_table_says_how_they_ended_and_what_the_best_had(tmp_path, written):
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    losses = [{"step": step, "loss": 3.0} for step in (20, 40, 60)]
    draw_curves(write_jsonl(tmp_path / "losses.jsonl", losses), one, "title")
    assert "exact match in exams" not in written and "best" not in written
    records = [*losses, *exams(20, "held_out"), *exams(40, "held_out"), *exams(60, "held_out")]
    written.clear()
    assert draw_curves(write_jsonl(tmp_path / "exams.jsonl", records), two, "title", best=40)
    with Image.open(one) as alone, Image.open(two) as both:
        assert both.height > 1.5 * alone.height and both.width == alone.width
    assert written.count("best: step 40") == 1 and written.count("best") == 2
    rows = written[written.index("held_out") :]
    assert rows[:12] == [
        "held_out", "0.700", "0.500", "count", "0.800", "0.600", "where", "0.700", "0.500", "what", "0.600", "0.400"
    ]  # fmt: skip


def test_two_exams_have_a_mean_and_of_many_exams_the_kinds_are_left_out(tmp_path, written):
    draw_curves(write_jsonl(tmp_path / "m.jsonl", exams(20, "a", "b")), tmp_path / "two.png", "title")
    assert [text for text in written if text in ("mean", "a", "b", *KINDS)] == [
        "mean", "a", "count", "where", "what", "b", "count", "where", "what"
    ]  # fmt: skip
    written.clear()
    draw_curves(write_jsonl(tmp_path / "m.jsonl", exams(20, "a", "b", "c")), tmp_path / "three.png", "title")
    assert [text for text in written if text in ("mean", "a", "b", "c", *KINDS)] == ["mean", "a", "b", "c"]
    assert written[-1] == "each kind: metrics.jsonl"


def test_a_name_that_is_too_long_ends_where_the_numbers_begin(tmp_path, written):
    draw_curves(write_jsonl(tmp_path / "m.jsonl", exams(20, "x" * 99)), tmp_path / "c.png", "title")
    (shown,) = [text for text in written if "xx" in text]
    assert shown.endswith("..") and 10 < len(shown) < 40


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 8.8, [0, 2, 4, 6, 8]), (0, 0.03, [0, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03]),
     (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0])],
)  # fmt: skip
def test_axes_have_round_numbers(low, high, expected):
    assert ticks(low, high, 6) == pytest.approx(expected)


def test_losses_that_fall_far_are_drawn_on_a_logarithmic_scale_that_says_so(tmp_path, written):
    assert logarithmic_ticks(0.07, 9) == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5])
    assert logarithmic_ticks(0.002, 30) == pytest.approx([0.01, 0.1, 1, 10])
    for last, says in ((0.05, True), (0.5, False), (0.0, False)):
        written.clear()
        records = [{"step": 1, "loss": 8.0}, {"step": 2, "loss": last}]
        draw_curves(write_jsonl(tmp_path / "m.jsonl", records), tmp_path / "c.png", "title")
        assert ("loss a trained token, logarithmic" in written) == says


def test_few_values_stay_as_they_are_and_many_are_smoothed():
    few = [(n, float(n % 2)) for n in range(20)]
    assert smoothed(few) == few
    many = [value for _, value in smoothed([(n, float(n % 2)) for n in range(400)])]
    assert max(many[20:]) - min(many[20:]) < 0.1 and abs(sum(many[20:]) / 380 - 0.5) < 0.01
    falling = smoothed([(n, 10.0 - n / 40) for n in range(400)])
    assert falling[0] == (0, 10.0) and falling[200] == pytest.approx((200, 5.0))  # no step behind, not even at first


def test_of_many_points_the_peaks_are_kept():
    points = [(n, float(n == 7777)) for n in range(30_000)]
    few = thinned(points, 600)
    assert len(few) < 1300 and (7777, 1.0) in few and few == sorted(few)
    assert thinned(points[:2400], 600) == points[:2400]


def test_a_single_step_is_a_dot(tmp_path):
    draw_curves(write_jsonl(tmp_path / "m.jsonl", [{"step": 1, "loss": 0.0}]), tmp_path / "c.png", "title", best=5)
    with Image.open(tmp_path / "c.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert {TRAINING, GREY} <= colours
