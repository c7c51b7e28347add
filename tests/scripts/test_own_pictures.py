"""docs/own_pictures.md as a user follows it: a fresh clone, own pictures, from the first command to the last."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from helpers.own_pictures import BROKEN, draw_own_pictures
from helpers.repository import ROOT

PAGES = {"en": ROOT / "docs/own_pictures.md", "zh": ROOT / "docs/own_pictures_zh.md"}
PROGRAMS = ("model", "trainer", "dataset", "scripts", "eval_vlm.py", "web_demo.py", ".streamlit")
PATIENCE = 240  # seconds of a core's work, training and scoring together, whoever else shares the machine


def steps(page: Path) -> list[str]:
    """The shell commands and the Python programs of a page, in order."""
    found = []
    for kind, block in re.findall(r"```(sh|python)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        found += block.splitlines() if kind == "sh" else [block]
    return found


@pytest.fixture
def clone(tmp_path) -> Path:
    """What a clone holds, and the user's pictures in it."""
    for name in PROGRAMS:
        source = ROOT / name
        if source.is_dir():
            unwanted = shutil.ignore_patterns("__pycache__", "clip-vit-*", "data")
            shutil.copytree(source, tmp_path / name, ignore=unwanted)
        else:
            shutil.copy(source, tmp_path / name)
    draw_own_pictures(tmp_path / "mine/images")
    return tmp_path


def start(step: str, clone: Path) -> subprocess.Popen:
    """A step as the user would type it, with this environment's Python and no package but the clone's own."""
    environment = {**os.environ, "PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", step] if "\n" in step else [re.sub("^python", sys.executable, step)]
    return subprocess.Popen(
        program, shell="\n" not in step, cwd=clone, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def follow(step: str, clone: Path) -> str:
    process = start(step, clone)
    said, _ = process.communicate()
    assert process.returncode == 0, said[-3000:]
    return said


def work_of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def exact_match(path: Path) -> dict[str, float]:
    return json.loads(path.read_text())["exact_match"]


def test_both_pages_have_the_same_commands():
    assert steps(PAGES["en"]) == steps(PAGES["zh"]) and len(steps(PAGES["en"])) > 8


def test_own_pictures_are_learnt_from_a_fresh_clone(clone):
    write, train, ask, score, *_ = steps(PAGES["en"])
    started = work_of_children()
    follow(write, clone)
    said = follow(train, clone)
    assert "so the base that ships: model/language_model/emoji-llm.safetensors" in said
    assert f"{BROKEN}: it cannot be read as a picture" in (clone / "out/mine/sft_vlm_192/quarantine.jsonl").read_text()
    assert (clone / "out/mine/sft_vlm_192/loss.png").is_file()
    for command in (ask, score):  # the end of the stage printed them, with its own choice of picture and sheet
        assert command.split(" --image ")[0].split(" --sheet ")[0].removeprefix("python ") in said
    assert "A cup of tea." in follow(ask, clone)
    follow(score, clone)
    shares = exact_match(clone / "out/mine/score.json")
    print(f"{work_of_children() - started:.0f} s of work, {shares}")
    assert shares["right"] >= shares["none"] + 0.5 and shares["right"] >= shares["shuffled"] + 0.5
    assert work_of_children() - started < PATIENCE
    with Image.open(clone / "out/mine/sheet.png") as sheet:
        assert sheet.width > 900 and sheet.height > 600


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def serves(command: str, clone: Path) -> bool:
    port = free_port()
    process = start(f"exec {sys.executable} {command.removeprefix('python ')} --server.headless true "
                    f"--server.port {port}", clone)  # fmt: skip
    try:
        for _ in range(120):
            time.sleep(0.5)
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=5) as answer:
                    return answer.status == 200
            except OSError:
                continue
        return False
    finally:
        process.kill()
        process.wait()


@pytest.mark.soak
def test_the_whole_page(clone):
    """The quickstart on three tenths of its data; forgetting is seen, and mixing cures most of it."""
    for step in steps(PAGES["en"]):
        if "streamlit" in step:
            assert serves(step, clone)
        else:
            follow(step + " --scale 0.3" * step.endswith("quickstart.py"), clone)
    known, forgot, mixed = (
        exact_match(clone / f"out/{name}.json")["right"] for name in ("quickstart/score", "forgot/old", "mixed/old")
    )
    own = exact_match(clone / "out/mixed/own.json")
    print(f"Emoji World {known:.2f}, after own pictures {forgot:.2f}, mixed {mixed:.2f}; own pictures mixed {own}")
    assert forgot < known - 0.15 and mixed > forgot + 0.1
    assert own["right"] >= own["none"] + 0.5
