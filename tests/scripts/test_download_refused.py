"""Downloads that fail: what each says, and what it leaves behind."""

import errno
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from helpers.faults import held_by_another
from helpers.hub import (
    CLIP_FILES,
    CUT,
    WEIGHTS,
    environment,
    fetch,
    needed_files,
    refusal,
    tree,
)
from helpers.repository import ROOT
from scripts.hub import clients as hubs
from scripts.hub.clients import LocalError
from scripts.hub.words import CLIP

both_hubs = pytest.mark.parametrize("source", ["huggingface", "modelscope"])


def child(arguments: list[str], environment_: dict[str, str], **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/download.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment_},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def test_a_killed_download_goes_on_where_it_stopped(clip, tmp_path):
    clip.hang_after = CUT
    arguments = ["clip", "--to", str(tmp_path / "clip"), "--source", "huggingface"]
    with child(arguments, environment(clip.address, tmp_path)) as process:
        assert clip.hanging.wait(60)
        partial = tmp_path / "clip/.download/model.safetensors.incomplete"
        deadline = time.monotonic() + 60
        while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
            os.sched_yield()  # what was sent is still on its way to the disk
        process.send_signal(signal.SIGKILL)
    clip.release.set()
    kept = partial.stat().st_size
    assert 0 < kept <= CUT and not (tmp_path / "clip/model.safetensors").exists()
    clip.heal()
    fetch(tmp_path / "clip", "--source", "huggingface")
    assert tree(tmp_path / "clip") == needed_files()
    assert sum(request.sent for request in clip.contents_sent()) == len(WEIGHTS) - kept


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (CUT, CUT))


@both_hubs
def test_a_disk_that_fills_up_ends_in_a_sentence_and_keeps_what_came(clip, tmp_path, source):
    arguments = ["clip", "--to", str(tmp_path / "clip"), "--source", source]
    with child(arguments, environment(clip.address, tmp_path), preexec_fn=limit_file_size) as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in said
    assert said.splitlines()[-1].startswith("download: the disk is full")
    assert not (tmp_path / "clip/model.safetensors").exists()
    assert 0 < (tmp_path / "clip/.download/model.safetensors.incomplete").stat().st_size <= CUT
    clip.heal()
    fetch(tmp_path / "clip", "--source", source)
    assert tree(tmp_path / "clip") == needed_files()
    assert max(request.sent for request in clip.contents_sent()) < len(WEIGHTS)


@both_hubs
def test_no_space_left_is_known_before_anything_is_fetched(clip, tmp_path, source, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=100_000))
    said = refusal(tmp_path / "clip", "--source", source)
    assert "needs 400.1 kB" in said and "100.0 kB free" in said and "--to" in said
    assert not clip.contents_sent() and not (tmp_path / "clip").exists()


def test_what_waits_already_needs_no_space_again(clip, tmp_path, monkeypatch):
    clip.cut_after = CUT
    refusal(tmp_path / "clip", "--source", "huggingface")
    clip.heal()
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=len(WEIGHTS) - CUT))
    fetch(tmp_path / "clip", "--source", "huggingface")
    assert tree(tmp_path / "clip") == needed_files()


REFUSALS = [
    ("huggingface", 401, {}, "does not exist, or is private", "hf auth login"),
    ("huggingface", 403, {"X-Error-Code": "GatedRepo"}, "is gated", "ask for access"),
    ("huggingface", 403, {}, "forbids", "hf auth login"),
    ("huggingface", 404, {"X-Error-Code": "RepoNotFound"}, "does not exist", "check the name"),
    ("huggingface", 404, {"X-Error-Code": "RevisionNotFound"}, "no such revision", "leave it out"),
    ("huggingface", 429, {}, "slow down", "wait"),
    ("huggingface", 503, {}, "503", "try later"),
    ("modelscope", 401, {}, "does not exist, or is private", "modelscope login"),
    ("modelscope", 403, {}, "forbids", "modelscope login"),
    ("modelscope", 404, {}, "does not exist", "check the name"),
    ("modelscope", 429, {}, "slow down", "wait"),
    ("modelscope", 503, {}, "503", "try later"),
]


@pytest.mark.parametrize(("source", "status", "headers", "what", "cure"), REFUSALS)
def test_a_refusal_says_what_and_how_to_mend_it(clip, tmp_path, source, status, headers, what, cure):
    clip.refuse = (status, headers)
    said = refusal(tmp_path / "clip", "--source", source)
    assert what in said and cure in said and CLIP.repo_ids[source] in said
    assert not (tmp_path / "clip").exists()


@both_hubs
def test_a_token_that_is_not_accepted_is_told(clip, tmp_path, source, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "hf_old")
    clip.refuse = (401, {"X-Error-Message": "Invalid credentials in Authorization header"})
    said = refusal(tmp_path / "clip", "--source", source)
    assert "does not accept the token" in said and "login" in said and "hf_old" not in said


@both_hubs
@pytest.mark.parametrize(("status", "what"), [(401, "private"), (403, "forbids"), (404, "does not exist")])
def test_a_content_that_is_refused_leaves_nothing_under_its_name(clip, tmp_path, source, status, what):
    clip.refuse_content = status
    assert what in refusal(tmp_path / "clip", "--source", source)
    assert not [name for name in tree(tmp_path / "clip") if not name.startswith(".download/")]


@both_hubs
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_wrong_content_is_thrown_away(clip, tmp_path, source, name):
    right = CLIP_FILES[name]
    clip.wrong[name] = right[:-1] + bytes([right[-1] ^ 1])
    said = refusal(tmp_path / "clip", "--source", source)
    assert name in said and ("damaged" in said or "something else" in said)
    assert not [path for path in tree(tmp_path / "clip") if name in path or ".download" in path]
    clip.heal()
    fetch(tmp_path / "clip", "--source", source)
    assert tree(tmp_path / "clip") == needed_files()


@both_hubs
@pytest.mark.parametrize("change", [lambda content: content[:-10], lambda content: content + b"more"])
def test_a_content_of_another_size_is_not_taken(clip, tmp_path, source, change):
    clip.wrong["model.safetensors"] = change(WEIGHTS)
    refusal(tmp_path / "clip", "--source", source)
    assert not (tmp_path / "clip/model.safetensors").exists()
    clip.heal()
    fetch(tmp_path / "clip", "--source", source)
    assert tree(tmp_path / "clip") == needed_files()


@pytest.fixture
def closed_port(monkeypatch) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", address)
    return address


@pytest.mark.parametrize("source", ["huggingface", "modelscope", "auto"])
def test_without_a_network_it_says_what_to_do_by_hand(clip, closed_port, tmp_path, source):
    said = refusal(tmp_path / "clip", "--source", source)
    assert said.count("cannot be reached") == (2 if source == "auto" else 1) and closed_port in said
    assert "fetch config.json, preprocessor_config.json, model.safetensors from" in said
    assert "https://huggingface.co/openai/clip-vit-base-patch16/tree/main" in said and str(tmp_path / "clip") in said
    assert not (tmp_path / "clip").exists()


def test_offline_on_purpose_asks_no_hub(clip, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(tmp_path / "clip")
    assert not clip.requests


def test_where_both_fail_both_say_why(clip, tmp_path):
    clip.repositories.clear()
    said = refusal(tmp_path / "clip")
    assert "openai/clip-vit-base-patch16" in said and "openai-mirror/clip-vit-base-patch16" in said


@both_hubs
@pytest.mark.parametrize("path", ["../evil.json", "/evil.json", "a/../../evil.json", "..\\evil.json"])
def test_a_hub_cannot_write_outside_the_folder(hub, tmp_path, source, path):
    hub.add("models/some/model", {path: b"x", "config.json": b"{}"})
    assert "outside the folder" in refusal(tmp_path / "in", "--source", source, what="some/model")
    assert not list(tmp_path.rglob("evil*"))


@both_hubs
def test_another_file_is_not_overwritten_unasked(clip, tmp_path, source):
    mine = tmp_path / "clip/model.safetensors"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    said = refusal(tmp_path / "clip", "--source", source)
    assert str(mine) in said and "--replace" in said and mine.read_bytes() == b"mine" and not clip.contents_sent()
    clip.cut_after = CUT
    refusal(tmp_path / "clip", "--source", source, "--replace")
    assert mine.read_bytes() == b"mine", "until the new one is whole"
    clip.heal()
    fetch(tmp_path / "clip", "--source", source, "--replace")
    assert tree(tmp_path / "clip") == needed_files()


@both_hubs
def test_a_file_in_the_place_of_the_folder_is_a_sentence(clip, tmp_path, source):
    (tmp_path / "clip").write_text("a file")
    said = refusal(tmp_path / "clip", "--source", source)
    assert str(tmp_path / "clip") in said and "--to" in said and (tmp_path / "clip").is_file()


@pytest.mark.parametrize("what", ["clipp", "a/b/c", "../x", "a/..", "/a/b", ""])
def test_what_is_neither_word_nor_repository_is_refused(what, tmp_path):
    assert "neither one of clip, siglip2, llm, vlm, minimind3, minimind3v, smollm2, dataset, efficient" in refusal(
        tmp_path, what=what
    )


def test_ctrl_c_is_a_sentence(clip, tmp_path, monkeypatch):
    def stop(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(hubs.HuggingFace, "fetch", stop)
    assert "stopped" in refusal(tmp_path / "clip", "--source", "huggingface")


@both_hubs
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_behind_a_network_error_is_told_as_one(hub, source, code):
    network = ConnectionError("failed after retries")
    with pytest.raises(hubs.NoNetworkError), hubs.SOURCES[source]().plain_errors("https://x"):
        raise network
    with pytest.raises(LocalError, match="disk is full"), hubs.SOURCES[source]().plain_errors("https://x"):
        raise network from OSError(code, os.strerror(code))


@both_hubs
def test_two_downloads_into_one_folder_do_not_mix(clip, tmp_path, source):
    staging = tmp_path / "clip/.download"
    staging.mkdir(parents=True)
    with held_by_another(staging / ".lock"):
        said = refusal(tmp_path / "clip", "--source", source)
        assert "another download into" in said and "wait for it" in said and not clip.contents_sent()
    fetch(tmp_path / "clip", "--source", source)
    assert tree(tmp_path / "clip") == needed_files()
