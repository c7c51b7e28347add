"""docs/your_own_data.md as a user follows it, and its notebook: own pictures, from the first command to the last."""

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

from helpers.own_pictures import BROKEN, draw_own_pictures, draw_stamps
from helpers.pages import follow, follow_notebook, steps
from helpers.repository import ROOT
from model.files import SHIPPED_MODEL

PAGES = {"en": ROOT / "docs/your_own_data.md", "zh": ROOT / "docs/your_own_data_zh.md"}
NOTEBOOK = ROOT / "docs/your_own_data.ipynb"
PROGRAMS = ("model", "trainer", "dataset", "scripts", "eval_vlm.py", "web_demo.py", ".streamlit")
QUICK = "--pretrain 0 --sft 2 --held_out 2 --concepts 64 --output out/quickstart/data"


def exact_match(path: Path) -> dict[str, float]:
    return json.loads(path.read_text())["exact_match"]


def shortened(step: str) -> str:
    """A step of the page in seconds; what the first training learns is left as it is."""
    if "build_stamps.py" in step:
        return f"{step} --stamps stamps --drawings 1"
    if "score.py" in step and "out/mine" not in step:
        return f"{step} --limit 6"
    if "train_sft_vlm.py" in step:
        return f"{step} --num_workers 0 --batch_size 4 --epochs {10 if 'out/mine' in step else 1}"
    return step


def test_both_pages_have_the_same_commands():
    assert steps(PAGES["en"]) == steps(PAGES["zh"]) and len(steps(PAGES["en"])) > 14


def test_own_pictures_are_learnt_and_the_page_goes_on_from_there(tmp_path):
    """The whole page, shortened: what the quickstart leaves behind is made of a few scenes and the first training."""
    draw_own_pictures(tmp_path / "mine/images", each=9)
    draw_stamps(tmp_path / "stamps")
    said = {}
    for step in steps(PAGES["en"]):
        if step.endswith("quickstart.py"):
            follow(f"python scripts/build_emoji_world.py {QUICK}", tmp_path)
            shutil.copy(tmp_path / "out/mine/sft_vlm_192.safetensors", tmp_path / "out/quickstart")
        elif "streamlit" not in step:
            said[step] = follow(shortened(step), tmp_path)
    check, look, prepare, train, ask, score, *_ = said
    assert "a picture that cannot be decoded" in said[check] and "training would start" in said[check]
    assert "[picture 1: tokens 4..199]" in said[look]
    assert f"{BROKEN}: it cannot be read as a picture" in (tmp_path / "mine/prepared/left_out.jsonl").read_text()
    assert f"parameters from {ROOT / SHIPPED_MODEL}" in said[train]
    assert (tmp_path / "out/mine/sft_vlm_192/curves.png").is_file()
    for command in (ask, score):  # the end of the stage printed them, with its own choice of picture and sheet
        assert command.split(" --image ")[0].split(" --sheet ")[0].removeprefix("python ") in said[train]
    assert said[ask].strip()
    shares = exact_match(tmp_path / "out/mine/score.json")
    print(shares)
    assert shares["right"] >= max(shares["none"], shares["shuffled"]) + 0.4
    with Image.open(tmp_path / "out/mine/sheet.png") as sheet:
        assert sheet.width > 900 and sheet.height > 600
    assert set(exact_match(tmp_path / "out/stamps/held_out.json")) == {"right", "shuffled", "none"}


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    draw_stamps(tmp_path / "stamps")
    (tmp_path / "trainer").symlink_to(ROOT / "trainer")  # by which the notebook knows the project's folder
    said = follow_notebook(NOTEBOOK, tmp_path, SHORT="1", STAMPS=str(tmp_path / "stamps"))
    assert "right picture" in said and (tmp_path / "out/mine/sheet.png").is_file()


def test_the_notebook_is_a_notebook_without_outputs():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("markdown", "code") and isinstance(cell["source"], list)
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


# ---- the whole of it, as a user would


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


def run_to_its_end(step: str, clone: Path) -> None:
    process = start(step, clone)
    said, _ = process.communicate()
    assert process.returncode == 0, said[-3000:]


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
    """From a clone, each command a process; the quickstart on three tenths of its data, and stamps of our own."""
    draw_stamps(clone / "stamps")
    for step in steps(PAGES["en"]):
        if "streamlit" in step:
            assert serves(step, clone)
        else:
            changes = {"quickstart.py": " --scale 0.3", "build_stamps.py": " --stamps stamps"}
            run_to_its_end(step + "".join(change for name, change in changes.items() if name in step), clone)
    learnt = exact_match(clone / "out/mine/score.json")
    known, forgot, mixed = (
        exact_match(clone / f"out/{name}.json")["right"] for name in ("quickstart/score", "forgot/old", "mixed/old")
    )
    own = exact_match(clone / "out/mixed/own.json")
    print(
        f"own pictures {learnt}; Emoji World {known:.2f}, after own pictures {forgot:.2f}, mixed {mixed:.2f}; own {own}"
    )
    assert learnt["right"] >= learnt["none"] + 0.5
    assert forgot < known - 0.15 and mixed > forgot + 0.1
    assert own["right"] >= own["none"] + 0.5
