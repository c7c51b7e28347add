"""A converted folder is old or new, whole, whenever the conversion dies; what is no conversion is never replaced."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from helpers.models import broken_files
from scripts import convert_vlm
from scripts.convert_vlm import convert, parse_arguments
from scripts.export import folder as export_folder
from scripts.export.folder import MANIFEST, claim, publish, seal
from scripts.export.formats import Source

TOUCHING = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.listdir", "os.scandir"}


@pytest.fixture
def tiny(monkeypatch, tmp_path, make_vlm):
    """tiny(seed, output): a conversion that neither loads a weight file nor proves anything, only writes."""
    weight = tmp_path / "weight.safetensors"
    weight.write_bytes(b"")
    small = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))  # the real one costs 0.1 s a conversion
    sources = {seed: Source(make_vlm(seed=seed), small, "tiny") for seed in (1, 2)}
    monkeypatch.setattr(convert_vlm, "proof", lambda *arguments: {"largest_logit_difference": 0.0})
    monkeypatch.setattr(convert_vlm, "read_facts", lambda path: {})
    monkeypatch.setattr(convert_vlm, "read_source", lambda options: sources[options.num_attention_heads])

    def run(seed: int, output) -> dict:
        command = f"--weight {weight} --to minimind --output {output} --num_attention_heads {seed}"
        return convert(parse_arguments(command.split()))

    return run


def in_child(work, root, die_at: int) -> int:
    """Run work() in a forked process that kills itself before its die_at-th touch of a file under root.

    Returns the touches of a process that lived to the end, else 0.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        touches = 0

        def count(event: str, arguments: tuple) -> None:
            nonlocal touches
            if event in TOUCHING and str(arguments[0]).startswith(str(root)):
                touches += 1
                if touches == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(count)
            work()
            os.write(writer, str(touches).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return int(text or 0)


def state_of(folder) -> str:
    """The seed's mark of a whole folder, or `absent`; fails on anything between."""
    if not folder.exists():
        return "absent"
    assert broken_files(folder) == []
    return json.loads((folder / MANIFEST).read_text())["files"]["tiny.pth"]


@pytest.mark.parametrize("over_an_old_one", [False, True], ids=["new", "over an old one"])
def test_killed_at_every_touch_of_a_file(tmp_path, tiny, over_an_old_one):
    root = tmp_path / "models"
    output = root / "converted"

    def reset(seed: int) -> str:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        if seed:
            tiny(seed, output)
        return state_of(output)

    new, before = reset(2), reset(1 if over_an_old_one else 0)
    assert new != before
    states, number, touches = [], 0, 0
    while not touches:  # every run also clears up what the one before it left
        number += 1
        touches = in_child(lambda: tiny(2, output), root, die_at=number)
        state = state_of(output)
        if state == "absent" and over_an_old_one:  # died between the two renames
            export_folder.recover(output)
            assert state_of(output) == before
        else:
            assert state in (before, new), f"after a kill at touch {number}"
        states.append(state)
        if state == new:
            reset(1 if over_an_old_one else 0)
    assert number > 25 and set(states) >= {before, new}
    assert states.count("absent") == 1 or not over_an_old_one  # there is one such instant
    tiny(2, output)
    assert [path.name for path in root.iterdir()] == ["converted"]


def test_folder_that_no_conversion_wrote_is_kept(tmp_path, tiny):
    output = tmp_path / "mine"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is no converted model"):
        tiny(1, output)
    assert [path.name for path in output.iterdir()] == ["thesis.txt"]
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ValueError, match="is no converted model"):
        tiny(1, file)
    empty = tmp_path / "empty"
    empty.mkdir()
    tiny(1, empty)
    assert broken_files(empty) == []


def test_exception_leaves_nothing_behind(tmp_path, tiny, monkeypatch):
    def refuse(*arguments):
        raise ValueError("not the same logits")

    tiny(1, tmp_path / "out" / "model")
    before = state_of(tmp_path / "out" / "model")
    monkeypatch.setattr(convert_vlm, "proof", refuse)
    with pytest.raises(ValueError, match="not the same"):
        tiny(2, tmp_path / "out" / "model")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]
    assert state_of(tmp_path / "out" / "model") == before


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one_in_its_place(tmp_path, tiny, monkeypatch):
    def refuse(self, target):
        if self.name.endswith(".tmp"):
            raise PermissionError(13, "in use", str(self))
        return rename(self, target)

    rename = Path.rename
    tiny(1, tmp_path / "out" / "model")
    before = state_of(tmp_path / "out" / "model")
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError):
        tiny(2, tmp_path / "out" / "model")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]
    assert state_of(tmp_path / "out" / "model") == before


def test_modes_and_broken_files(tmp_path, tiny):
    output = tmp_path / "model"
    tiny(1, output)
    assert {path.stat().st_mode & 0o777 for path in output.iterdir()} == {0o644}
    assert output.stat().st_mode & 0o777 == 0o755
    (output / "tokenizer.json").write_text("{}")
    (output / "tokenizer_config.json").unlink()
    (output / "extra").write_text("")
    assert broken_files(output) == ["extra", "tokenizer.json", "tokenizer_config.json"]


def test_living_conversion_keeps_its_folder(tmp_path):
    """Two at once: neither removes what the other is writing; the later one wins."""
    target = tmp_path / "model"
    elsewhere = tmp_path / f".model.{os.getppid()}.tmp"
    elsewhere.mkdir()
    mine = claim(target)
    assert elsewhere.exists() and mine.parent == tmp_path
    torch.save({}, mine / "x.pth")
    seal(mine, {"format": "none"})
    publish(mine, target)
    assert broken_files(target) == []
