"""The watch over a run's memory: rows that can be learnt from, whose memory counts, and a run that fails."""

import json
import sys
from pathlib import Path

import pytest

from dataset.readers.opening import read_samples
from model.messages import UserError
from scripts.measure import many_rows
from scripts.measure.many_rows import Look, Memory, figures, growth, last_step, memory_of, watched_run

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="memory as Linux tells it")
RUN = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1], "stage")
folder.mkdir(exist_ok=True)
for step in (1, 2, 3):
    time.sleep(0.02)
    (folder / "metrics.jsonl").open("a").write('{"step": %d}\\n' % step)
time.sleep(60)
"""


@pytest.mark.parametrize("kind", many_rows.KINDS)
def test_rows_can_be_learnt_from(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(many_rows, "PICTURES", 7)
    monkeypatch.setattr(many_rows, "AT_ONCE", 8)
    path = tmp_path / f"rows.{kind}"
    many_rows.KINDS[kind](path, 20)
    samples = read_samples(path, say=lambda _: None)
    assert [sample.messages[0]["content"] for sample in samples] == [f"<image>\nWhat is number {n}?" for n in range(20)]
    assert all(sample.open_pictures()[0].size == (16, 16) for sample in samples)
    assert len({picture for sample in samples for picture in sample.pictures}) == (20 if kind == "parquet" else 7)


def test_memory_of_a_process_and_its_children_is_counted():
    script = "import os, time; kept = b'x' * 40_000_000; os.fork(); print(flush=True); time.sleep(60)"
    process = many_rows.subprocess.Popen([sys.executable, "-c", script], stdout=many_rows.subprocess.PIPE)
    try:
        process.stdout.readline()
        process.stdout.readline()
        assert len(many_rows.family(process.pid)) == 2
        memory = memory_of(process.pid)
        assert 40 < memory.own < 60 and memory.own < memory.whole < 90  # shared by the two, once
    finally:
        for one in many_rows.family(process.pid):
            many_rows.os.kill(one, 9)
        process.wait()


def test_a_run_is_watched_until_its_steps_are_done(tmp_path, monkeypatch):
    monkeypatch.setattr(many_rows, "EVERY", 0.01)
    looks = watched_run([sys.executable, "-c", RUN, tmp_path], tmp_path, 3)
    assert looks[-1].step == 3 and looks[-1].memory.whole > 1 and looks[-1].seconds < 10


def test_a_run_that_fails_is_told_with_its_last_words(tmp_path, monkeypatch):
    monkeypatch.setattr(many_rows, "EVERY", 0.01)
    with pytest.raises(UserError, match="(?s)code 3.*no such flag"):
        watched_run([sys.executable, "-c", "print('no such flag'); exit(3)"], tmp_path, 1)


def test_growth_is_that_of_a_settled_run():
    looks = [Look(step / 10, step, Memory(500 + min(step, 100) + step / 50, 300)) for step in range(0, 2001, 10)]
    assert growth(looks, "whole") == pytest.approx(20, rel=0.05) and growth(looks, "own") == pytest.approx(0, abs=1e-6)
    found = figures(looks)
    assert found["first_step_seconds"] == 1 and found["starting_peak_mb"] == 510.2
    assert found["training_peak_mb"] == 640 and found["training_own_peak_mb"] == 300


def test_half_a_line_is_no_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_step(path) == 0
    path.write_text(json.dumps({"step": 4}) + '\n{"step": 5')
    assert last_step(path) == 4
