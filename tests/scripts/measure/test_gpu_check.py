"""The GPU check, whole and tiny on a CPU, and what becomes of checks that fail, cannot be done, or take too long."""

import json
import sys
import time
from dataclasses import replace

import pytest
import torch

from model.messages import UserError
from scripts import gpu_check
from scripts.gpu_check import Row, bars_of, main, run_checks
from scripts.measure import gpu_checks, stage_runs
from scripts.measure.gpu_checks import TINY, Check, Figures, Machine, Skipped
from scripts.measure.memory import step_memory
from scripts.measure.real_step import RealStep
from scripts.measure.stage_runs import run_process


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(torch.device("cpu"), torch.float32, TINY, 1, tmp_path)


def test_the_whole_command_runs_tiny_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_checks.shutil, "which", lambda name: None)  # compiling takes half a minute
    assert main(["--device", "cpu", "--tiny", "1", "--ranks", "2", "--output", str(tmp_path)]) == 0
    report, table = json.loads((tmp_path / "report.json").read_text()), (tmp_path / "report.md").read_text()
    assert {check["check"] for check in report["checks"]} == set(gpu_checks.NAMES)
    results = {f"{check['check']}: {check['setting']}": check["result"] for check in report["checks"]}
    skipped = {name for name, result in results.items() if result != "ok"}
    assert skipped == {
        "stages: stage 2, one process, float16", "stages: stage 2, one process, --compile 1",
        "steps: stage 1, 32 x 1, cached, compiled", "steps: stage 2, 32 x 1, cached, compiled",
    }  # fmt: skip
    assert all(results[name].startswith("skipped: ") for name in skipped)
    assert results["stages: stage 2, torchrun 2, gloo"] == "ok"
    for check in report["checks"]:
        if check["check"] == "steps" and check["result"] == "ok":
            figures = check["figures"]
            assert figures["samples_per_second"] > 0 and 0 < figures["mfu"] < 1
            assert figures["peak_gb"] == pytest.approx(figures["predicted_gb"], rel=0.02)
        assert f"| {check['check']} | {check['setting']} |" in table
    assert "not measured" in table and report["facts"]["torch"] == torch.__version__
    assert f"{len(results)} checks, 0 failed" in capsys.readouterr().out


def test_a_check_that_fails_is_a_row_and_the_others_go_on(machine):
    def broken(*_: object) -> Figures:
        raise RuntimeError("no kernel\nfor | this")

    def impossible(*_: object) -> Figures:
        raise Skipped("no such card")

    fine = Figures(samples_per_second=3.0)
    checks = [Check("a", "", 5, broken), Check("b", "", 5, impossible), Check("c", "", 5, lambda *_: fine)]
    rows = run_checks(checks, machine, 60)
    assert [row.result for row in rows] == ["failed: no kernel\nfor | this", "skipped: no such card", "ok"]
    assert [row.failed for row in rows] == [True, False, False] and rows[2].figures is fine
    assert gpu_check.cells_of(rows[0])[-1] == "failed: no kernel for / this"


def test_a_failed_check_is_in_the_exit_code(tmp_path, monkeypatch):
    def broken(*_: object) -> Figures:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(gpu_check, "checks_of", lambda machine: [Check("steps", "x", 5, broken)])
    assert main(["--device", "cpu", "--tiny", "1", "--output", str(tmp_path)]) == 1
    assert "failed: no kernel |" in (tmp_path / "report.md").read_text()


def test_time_is_kept(machine):
    begun = []

    def slow(*_: object) -> Figures:
        begun.append(1)
        time.sleep(60)
        return Figures()

    started = time.perf_counter()
    (row,) = run_checks([Check("a", "", 1, slow)], machine, 60)
    assert row.result == "failed: not done after the 1 s that it may take"
    rows = run_checks([Check("a", "", 30, slow), Check("b", "", 30, slow)], machine, 3.5)
    assert [row.result for row in rows] == ["not run: out of time"] * 2
    assert len(begun) == 2  # the last was not even begun
    assert time.perf_counter() - started < 20


def test_a_process_that_takes_too_long_is_ended(tmp_path):
    program = tmp_path / "slow.py"
    program.write_text(f"import time\ntime.sleep(3)\nopen({str(tmp_path / 'lived')!r}, 'w')")
    with pytest.raises(gpu_check.TimeUp), gpu_check.time_limit(0.5):
        run_process([sys.executable, program])
    time.sleep(3)
    assert not (tmp_path / "lived").exists()


def test_a_process_that_fails_says_what_it_said(tmp_path):
    program = tmp_path / "broken.py"
    program.write_text("raise SystemExit('the disk is full')")
    with pytest.raises(UserError, match="broken.py ended with code 1:\nthe disk is full"):
        run_process([sys.executable, program])


def test_a_run_of_too_few_log_lines_is_said_in_a_sentence(tmp_path, monkeypatch):
    def run(command: list, threads: int | None) -> None:
        (tmp_path / "stage").mkdir()
        (tmp_path / "stage/metrics.jsonl").write_text('{"rows_per_second": 1.0}\n' * 2)

    monkeypatch.setattr(stage_runs, "run_process", run)
    with pytest.raises(UserError, match="the run was too short to be measured"):
        stage_runs.stage_metrics("train_sft_vlm", [], tmp_path)


@pytest.mark.parametrize(
    ("card", "said"),
    [("1 x NVIDIA H100 80GB HBM3", ["6,000 here: reached", "3,900 here: MISSED"]),
     ("1 x NVIDIA GeForce RTX 3090", ["6,000 here, on another card", "3,900 here, on another card"])],
)  # fmt: skip
def test_bars_are_for_the_best_of_a_card_that_has_them(card, said):
    speeds = {"stage 1, 512 x 8, cached": 4000.0, "stage 1, 512 x 8, cached, compiled": 6000.0,
              "stage 1, 512 x 8, online": 9000.0, "stage 2, 512 x 8, cached": 3900.0}  # fmt: skip
    rows = [Row("steps", setting, "ok", 1.0, Figures(speed)) for setting, speed in speeds.items()]
    assert all(line.endswith(end) for line, end in zip(bars_of(rows, card), said, strict=True))


def test_torchrun_doubles_its_ranks_up_to_all_cards(machine):
    for most, ranks in ((1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8])):
        settings = gpu_checks.stage_settings(replace(machine, ranks=most))
        assert [ranks for _, _, ranks, _ in settings if ranks] == ranks


def test_without_a_gpu_it_says_how_to_try_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="gpu_check: --device cuda: .* use --device cpu, with --tiny 1"):
        main([])


def test_a_window_of_steps_is_the_steps_that_are_taken(machine):
    step = machine.step("stage 2", TINY.sizes[0], rows=2, cached=True)
    real, other = RealStep(step), RealStep(step)
    for _ in range(3):
        real.timed(step, real.make_batch(step))
    assert other.mean_seconds(step, other.make_batch(step), 3) > 0
    assert all(torch.equal(a, b) for a, b in zip(real.learning, other.learning, strict=True))
    figures = gpu_checks.measure_steps(step, machine)
    assert figures.peak_gb == pytest.approx(step_memory(step).peak / 1e9, rel=0.02)
