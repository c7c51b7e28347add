"""scripts/build_emoji_clips.py: files in the ordinary format, and videos that show what was drawn."""

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from dataset.emoji_clip_words import KINDS
from dataset.emoji_clips import FRAMES, draw_clip, sample_clip
from model.video import frame_times, read_frames
from scripts import build_emoji_clips

pytest.importorskip("av", reason="videos are read with the package av: pip install -r requirements/video.txt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("clips")
    with pytest.MonkeyPatch.context() as patch:
        flags = ["--output", output, "--pretrain", 2, "--sft", 4, "--held_out", 5, "--questions", 6, "--concepts", 64]
        patch.setattr(sys, "argv", ["build_emoji_clips.py", *map(str, flags)])
        build_emoji_clips.main()
    return output


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def test_files_and_their_lines(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "LICENSE.txt", "clips", "held_out_clips.jsonl", "pretrain_clips.jsonl", "sft_clips.jsonl",
    ]  # fmt: skip
    assert "CC BY-SA" in (folder / "LICENSE.txt").read_text()
    for name, clips in (("pretrain", 2), ("sft", 4), ("held_out", 5)):
        videos = defaultdict(list)
        for record in lines(folder / f"{name}_clips.jsonl"):
            first, answer = record["conversations"]
            assert first["role"] == "user" and first["content"].startswith("<video>\n") and answer["content"]
            videos[record["video"]].append(record)
        assert [*videos] == [f"clips/{name}_{number:06d}.mp4" for number in range(clips)]
        assert all((folder / video).stat().st_size < 40_000 for video in videos)
        most = {"pretrain": 1, "sft": 8, "held_out": len(KINDS)}[name]
        assert all(1 <= len(records) <= most for records in videos.values())
    assert {record["language"] for record in lines(folder / "held_out_clips.jsonl")} == {"en", "zh"}


def test_videos_show_what_was_drawn(folder):
    """H.264 loses little: no thing, and no colour, is another after it."""
    for number in range(3):
        video = folder / f"clips/held_out_{number:06d}.mp4"
        times = frame_times(video, 8)
        assert times == tuple(frame + 0.5 for frame in range(FRAMES))
        drawn = draw_clip(sample_clip(42 * 10 + build_emoji_clips.SEEDS["held_out"], "held_out", number, 64))
        for read, frame in zip(read_frames(video, times), drawn, strict=True):
            difference = np.asarray(read, float) - np.asarray(frame, float)
            assert np.abs(difference).mean() < 3 and 10 * np.log10(255**2 / (difference**2).mean()) > 34


def test_without_the_package_one_sentence_ends_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr(sys, "argv", ["build_emoji_clips.py", "--output", str(tmp_path)])
    with pytest.raises(
        SystemExit, match="^build_emoji_clips: videos are read and written with .* -r requirements/video.txt$"
    ):
        build_emoji_clips.main()
