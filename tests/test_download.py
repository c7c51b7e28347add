"""Downloads from a hub on this machine: complete, resumed, refused, and what each says."""

import errno
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from hub_stand_in import COMMIT, HubStandIn, environment, local_hub, sha256  # noqa: F401 (a fixture)
from safetensors.torch import save
from torch import arange

from scripts import download
from scripts import hub as hubs
from scripts.hub import HubError, LocalError, RemoteFile
from trainer.config import StageConfig

WEIGHTS = save({"weight": arange(50_000)})  # 400 kB
CUT = 150_000  # bytes
CLIP_FILES = {
    "config.json": b'{"model_type": "clip"}',
    "preprocessor_config.json": b'{"size": 224}',
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"p" * 5000,
    "flax_model.msgpack": b"f" * 5000,
    "tf_model.h5": b"t" * 5000,
    "vocab.json": b"{}",
    ".gitattributes": b"*.bin lfs",
}
NEEDED = ("config.json", "preprocessor_config.json", "model.safetensors")
both_hubs = pytest.mark.parametrize("source", ["huggingface", "modelscope"])


@pytest.fixture
def clip(hub: HubStandIn) -> HubStandIn:
    for source in hubs.SOURCES:
        hub.add(f"models/{download.CLIP.repo_ids[source]}", dict(CLIP_FILES))
    return hub


def fetch(folder: Path, *arguments: str, what: str = "clip") -> None:
    download.main([what, "--to", str(folder), *arguments])


def refusal(folder: Path, *arguments: str, what: str = "clip") -> str:
    """The one sentence that a failing download ends with."""
    with pytest.raises(SystemExit) as caught:
        fetch(folder, *arguments, what=what)
    text = caught.value.code
    assert isinstance(text, str) and text.startswith("download: ") and "\n" not in text and "Traceback" not in text
    return text


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def needed_files() -> dict[str, bytes]:
    return {name: CLIP_FILES[name] for name in NEEDED}


@both_hubs
def test_what_is_needed_arrives_and_nothing_else(clip, tmp_path, source, capsys):
    fetch(tmp_path / "clip", "--source", source)
    assert tree(tmp_path / "clip") == needed_files()
    assert not list(tmp_path.glob("clip/.*")), "nothing unfinished may be left"
    said = capsys.readouterr().out
    assert "400.1 kB to fetch" in said and "3 fetched, 0 there already" in said and "--vision_model" in said
    assert (COMMIT in said) == (source == "huggingface")

    clip.heal()
    fetch(tmp_path / "clip", "--source", source)
    assert not clip.contents_sent() and "0 fetched, 3 there already" in capsys.readouterr().out


@both_hubs
def test_a_cut_download_goes_on_where_it_stopped(clip, tmp_path, source):
    clip.cut_after = CUT
    said = refusal(tmp_path / "clip", "--source", source)
    assert "the same command again" in said
    assert not (tmp_path / "clip/model.safetensors").exists()
    assert (tmp_path / "clip/.download/model.safetensors.incomplete").read_bytes() == WEIGHTS[:CUT]

    clip.heal()
    fetch(tmp_path / "clip", "--source", source)
    assert tree(tmp_path / "clip") == needed_files()
    (rest,) = [request for request in clip.contents_sent() if request.sent > 1000]
    assert rest.range == f"bytes={CUT}-" and rest.sent == len(WEIGHTS) - CUT
    assert len(clip.contents_sent()) == 1, "the small files were there already"


@pytest.mark.parametrize(("first", "second"), [("huggingface", "modelscope"), ("modelscope", "huggingface")])
def test_what_one_hub_began_the_other_goes_on_with(clip, tmp_path, first, second):
    clip.cut_after = CUT
    refusal(tmp_path / "clip", "--source", first)
    clip.heal()
    fetch(tmp_path / "clip", "--source", second)
    assert tree(tmp_path / "clip") == needed_files()
    assert [request.range for request in clip.contents_sent()] == [f"bytes={CUT}-"]


@both_hubs
@pytest.mark.parametrize("waiting", [b"x" * CUT, b"x" * (len(WEIGHTS) + 1), b"x" * len(WEIGHTS)])
def test_an_unfinished_file_of_another_revision_is_started_again(clip, tmp_path, source, waiting):
    partial = tmp_path / "clip/.download/model.safetensors.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(waiting)
    fetch(tmp_path / "clip", "--source", source)
    assert tree(tmp_path / "clip") == needed_files()


def test_a_server_that_knows_no_ranges_sends_all_again(clip, tmp_path, monkeypatch):
    partial = tmp_path / "clip/.download/model.safetensors.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"x" * CUT)
    monkeypatch.setattr(clip, "ignore_ranges", True)
    fetch(tmp_path / "clip", "--source", "huggingface")
    assert tree(tmp_path / "clip") == needed_files()


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
        process.send_signal(signal.SIGKILL)
    clip.release.set()
    kept = partial.stat().st_size
    assert kept <= CUT and not (tmp_path / "clip/model.safetensors").exists()
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
    assert what in said and cure in said and download.CLIP.repo_ids[source] in said
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
    assert not [path for path in tree(tmp_path / "clip") if name in path]
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
    assert "fetch config.json, preprocessor_config.json, model.safetensors" in said
    assert "https://huggingface.co/openai/clip-vit-base-patch16/tree/main" in said and str(tmp_path / "clip") in said
    assert not (tmp_path / "clip").exists()


def test_offline_on_purpose_asks_no_hub(clip, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(tmp_path / "clip")
    assert not clip.requests


def test_modelscope_fills_in_for_hugging_face(clip, tmp_path, capsys):
    del clip.repositories["models/openai/clip-vit-base-patch16"]
    fetch(tmp_path / "clip")
    assert tree(tmp_path / "clip") == needed_files() and "trying modelscope" in capsys.readouterr().out


def test_where_both_fail_both_say_why(clip, tmp_path):
    clip.repositories.clear()
    said = refusal(tmp_path / "clip")
    assert "openai/clip-vit-base-patch16" in said and "openai-mirror/clip-vit-base-patch16" in said


def test_modelscope_domain_is_still_read(clip, tmp_path, monkeypatch):
    monkeypatch.delenv("MODELSCOPE_ENDPOINT")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", clip.address)
    fetch(tmp_path / "clip", "--source", "modelscope")
    assert tree(tmp_path / "clip") == needed_files()


@both_hubs
def test_a_token_opens_what_is_private_and_goes_nowhere_else(clip, tmp_path, source, monkeypatch, capfd):
    name = f"models/{download.CLIP.repo_ids[source]}"
    clip.repositories[name].private = True
    assert "does not exist" in refusal(tmp_path / "clip", "--source", source)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "hf_secret")
    clip.requests.clear()
    fetch(tmp_path / "clip", "--source", source)
    assert tree(tmp_path / "clip") == needed_files()
    elsewhere = [request for request in clip.requests if request.path.startswith("/content/")]
    assert bool(elsewhere) == (source == "huggingface") and not any(request.token for request in elsewhere)
    assert all(r.token == "Bearer hf_secret" for r in clip.requests if r not in elsewhere and "internal" not in r.path)
    assert "hf_secret" not in "".join(capfd.readouterr())


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
    assert str(tmp_path / "clip") in said and "another place" in said


@both_hubs
def test_a_whole_repository_of_any_name(hub, tmp_path, source):
    files = {"config.json": b"{}", "sub/model.safetensors": WEIGHTS, "pytorch_model.bin": b"b" * 2000, "empty.txt": b""}
    hub.add("models/some/model", files)
    fetch(tmp_path / "m", "--source", source, what="some/model")
    assert tree(tmp_path / "m") == {name: files[name] for name in files if name != "pytorch_model.bin"}
    fetch(tmp_path / "b", "--source", source, "--files", "*.bin", what="some/model")
    assert tree(tmp_path / "b") == {"pytorch_model.bin": files["pytorch_model.bin"]}
    said = refusal(tmp_path / "n", "--source", source, "--files", "*.gguf", what="some/model")
    assert "*.gguf" in said and "sub/model.safetensors" in said


@both_hubs
def test_a_data_set_and_a_revision(hub, tmp_path, source):
    hub.add("datasets/some/data", {"a.parquet": WEIGHTS, "README.md": b"text"})
    fetch(tmp_path / "d", "--source", source, "--repo_type", "dataset", "--files", "*.parquet", what="some/data")
    assert tree(tmp_path / "d") == {"a.parquet": WEIGHTS}
    said = refusal(tmp_path / "e", "--source", source, "--repo_type", "dataset", "--revision", "v9", what="some/data")
    assert "revision" in said


@both_hubs
@pytest.mark.parametrize("word", list(download.WORDS))
def test_every_word_fetches_its_files(hub, tmp_path, source, word, capsys):
    for part in download.WORDS[word]:
        files = {pattern.replace("*", "sft_i2t"): pattern.encode() * 100 for pattern in part.patterns}
        hub.add(f"{part.repo_type}s/{part.repo_ids[source]}", {**files, "unwanted.zip": b"z"})
    fetch(tmp_path / word, "--source", source, what=word)
    wanted = {pattern.replace("*", "sft_i2t") for part in download.WORDS[word] for pattern in part.patterns}
    assert set(tree(tmp_path / word)) == wanted - ({"pytorch_model.bin"} if word == "clip" else set())
    assert f"next: {download.NEXT[word]}" in capsys.readouterr().out


def test_words_fill_the_places_where_training_looks():
    assert download.CLIP.folder == Path(StageConfig().vision_model)
    for word, parts in download.WORDS.items():
        for part in download.plan(word, "model", [], None):
            assert part.folder.is_relative_to(ROOT) and set(part.repo_ids) == set(hubs.SOURCES)
            ignored = subprocess.run(["git", "check-ignore", "-q", str(part.folder / "x.pth")], cwd=ROOT)
            assert ignored.returncode == 0, f"{word} would be committed"
        assert len(parts) == len(download.plan(word, "model", [], None))


@pytest.mark.parametrize("what", ["clipp", "a/b/c", "../x", "a/..", "/a/b", ""])
def test_what_is_neither_word_nor_repository_is_refused(what, tmp_path):
    assert "neither one of clip, llm, vlm, dataset nor" in refusal(tmp_path, what=what)


def files_of(*paths: str) -> list[RemoteFile]:
    return [RemoteFile(path, 1, None, "sha256") for path in paths]


@pytest.mark.parametrize(
    ("paths", "patterns", "chosen"),
    [(["a.safetensors", "a.bin"], [], ["a.safetensors"]), (["a.bin", "a.h5"], [], ["a.bin"]),
     (["a.safetensors", "a.bin"], ["*.bin"], ["a.bin"]), (["a.safetensors", "a.bin"], ["a.*"], ["a.safetensors"]),
     (["x/.hidden/a", ".git", "b"], [], ["b"]), (["tf_model.h5", "config.json"], [], ["config.json"]),
     (["config.json", "pytorch_model.bin"], download.CLIP.patterns, ["config.json", "pytorch_model.bin"])],
)  # fmt: skip
def test_the_same_weights_are_not_fetched_twice(paths, patterns, chosen):
    assert [file.path for file in download.choose(files_of(*paths), patterns)] == chosen


def test_nothing_that_fits_is_an_error_with_what_there_is():
    with pytest.raises(HubError, match="no file fits [*].gguf; the repository holds a.bin, b.json"):
        download.choose(files_of("b.json", "a.bin"), ["*.gguf"])


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (598_641_023, "598.6 MB"), (4_934_887_104, "4.9 GB"),
     (12e12, "12000.0 GB")],
)  # fmt: skip
def test_sizes_are_readable(size, text):
    assert download.size_text(size) == text


def test_ctrl_c_is_a_sentence(clip, tmp_path, monkeypatch):
    def stop(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(hubs.HuggingFace, "fetch", stop)
    assert "stopped" in refusal(tmp_path / "clip", "--source", "huggingface")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_behind_a_network_error_is_told_as_one(code):
    network = ConnectionError("failed after retries")
    network.__cause__ = OSError(code, os.strerror(code))
    assert isinstance(hubs._no_network("https://x", network), LocalError)
    assert isinstance(hubs._no_network("https://x", ConnectionError("refused")), hubs.NoNetworkError)


def test_a_digest_is_compared_whole(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"hello")
    assert RemoteFile("f", 5, sha256(b"hello"), "sha256").problem(path) is None
    # git's own: printf hello | git hash-object --stdin
    assert RemoteFile("f", 5, "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0", "git").problem(path) is None
    assert RemoteFile("f", 5, None, "sha256").problem(path) is None
    assert "instead of" in RemoteFile("f", 5, sha256(b"hello")[:-1] + "0", "sha256").problem(path)
    assert "5 bytes instead of 6" in RemoteFile("f", 6, None, "sha256").problem(path)
