"""A bar where somebody looks at a terminal, plain lines now and then everywhere else."""

import io
import sys

import pytest

from model import progress
from model.progress import Progress, progress_over


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_file_gets_a_line_now_and_then_and_no_carriage_returns(clock, capsys):
    for _ in progress_over(range(1000), "shuffled", "batch"):
        clock[0] += 0.25
    said = capsys.readouterr().err
    assert "\r" not in said
    lines = said.splitlines()
    assert len(lines) == int(250 / progress.EVERY)
    assert lines[0].startswith("shuffled:  12% 120/1000 [00:30<03:40,") and lines[0].endswith("4.00batch/s]")


def test_what_is_done_soon_says_nothing(clock, capsys):
    assert list(progress_over("abc", "encoding", "picture")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_a_download_that_goes_on_counts_in_bytes_from_where_it_was(clock, capsys):
    with Progress(3_000_000, "model.bin", "B", done=1_000_000) as shown:
        clock[0] += 50
        shown.update(1_000_000)
    assert capsys.readouterr().err == "model.bin:  67% 2.00M/3.00M [00:50<00:50, 20.0kB/s]\n" and shown.n == 2_000_000


def test_silent_ranks_say_nothing(clock, capsys):
    for _ in progress_over(range(9), "encoding", "picture", silent=True):
        clock[0] += 100
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress(3, "sft_vlm", "step") as shown:
        shown.update()
        shown.note("loss 1.5")
        assert shown.is_bar and shown.n == 1
    assert (
        "\rsft_vlm:" in sys.stderr.getvalue() and "1/3" in sys.stderr.getvalue() and "loss 1.5" in sys.stderr.getvalue()
    )
