"""Downloads from a hub on this machine: complete, resumed, and what is chosen."""

import subprocess
from pathlib import Path

import pytest

from helpers.hub import (
    COMMIT,
    CUT,
    WEIGHTS,
    fetch,
    needed_files,
    refusal,
    sha256,
    tree,
)
from helpers.repository import ROOT
from model.tower_folder import read_tower
from scripts import download
from scripts.hub import clients as hubs
from scripts.hub.clients import HubError, RemoteFile
from scripts.hub.words import CLIP
from trainer.config import StageConfig

both_hubs = pytest.mark.parametrize("source", ["huggingface", "modelscope"])


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
def test_training_can_read_what_arrived(hub, tower_folder, tmp_path, source):
    hub.add(f"models/{CLIP.repo_ids[source]}", tree(tower_folder))
    fetch(tmp_path / "clip", "--source", source)
    tower, digest = read_tower(tmp_path / "clip")
    assert digest == sha256((tower_folder / "model.safetensors").read_bytes()) and tower.config.image_size == 32


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


def test_a_server_that_knows_no_ranges_sends_all_again(clip, tmp_path):
    partial = tmp_path / "clip/.download/model.safetensors.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(WEIGHTS[:CUT])
    clip.ignore_ranges = True
    fetch(tmp_path / "clip", "--source", "huggingface")
    assert tree(tmp_path / "clip") == needed_files()
    # once, or twice with older packages, which append what they get to what they have
    sent = [request.sent for request in clip.contents_sent() if request.sent > 1000]
    assert sent in ([len(WEIGHTS)], 2 * [len(WEIGHTS)])


def test_modelscope_fills_in_for_hugging_face(clip, tmp_path, capsys):
    del clip.repositories["models/openai/clip-vit-base-patch16"]
    fetch(tmp_path / "clip")
    assert tree(tmp_path / "clip") == needed_files() and "trying modelscope" in capsys.readouterr().out


def test_modelscope_domain_is_still_read(clip, tmp_path, monkeypatch):
    monkeypatch.delenv("MODELSCOPE_ENDPOINT")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", clip.address)
    fetch(tmp_path / "clip", "--source", "modelscope")
    assert tree(tmp_path / "clip") == needed_files()


@both_hubs
def test_a_token_opens_what_is_private_and_goes_nowhere_else(clip, tmp_path, source, monkeypatch, capfd):
    name = f"models/{CLIP.repo_ids[source]}"
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
    assert set(tree(tmp_path / word)) == wanted - {"pytorch_model.bin"}
    usual = download.WORDS[word][0].folder.relative_to(ROOT).as_posix()
    assert f"next: {download.NEXT[word].replace(usual, str(tmp_path / word))}" in capsys.readouterr().out


def test_words_fill_the_places_where_training_looks():
    assert CLIP.folder == Path(StageConfig().vision_model)
    for word, parts in download.WORDS.items():
        for part in download.plan(word, "model", [], None):
            assert part.folder.is_relative_to(ROOT) and set(part.repo_ids) == set(hubs.SOURCES)
            assert parts[0].folder.relative_to(ROOT).as_posix() in download.NEXT[word]
            ignored = subprocess.run(["git", "check-ignore", "-q", str(part.folder / "x.pth")], cwd=ROOT)
            assert ignored.returncode == 0, f"{word} would be committed"
        assert len(parts) == len(download.plan(word, "model", [], None))


def files_of(*paths: str) -> list[RemoteFile]:
    return [RemoteFile(path, 1, None, "sha256") for path in paths]


@pytest.mark.parametrize(
    ("paths", "patterns", "chosen"),
    [(["a.safetensors", "a.bin"], [], ["a.safetensors"]), (["a.bin", "a.h5"], [], ["a.bin"]),
     (["a.safetensors", "a.bin"], ["*.bin"], ["a.bin"]), (["a.safetensors", "a.bin"], ["a.*"], ["a.safetensors"]),
     (["x/.hidden/a", ".git", "b"], [], ["b"]), (["tf_model.h5", "config.json"], [], ["config.json"]),
     (["config.json", "pytorch_model.bin"], CLIP.patterns, ["config.json", "pytorch_model.bin"])],
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


def test_a_digest_is_compared_whole(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"hello")
    assert RemoteFile("f", 5, sha256(b"hello"), "sha256").problem(path) is None
    # git's own: printf hello | git hash-object --stdin
    assert RemoteFile("f", 5, "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0", "git").problem(path) is None
    assert RemoteFile("f", 5, None, "sha256").problem(path) is None
    assert "instead of" in RemoteFile("f", 5, sha256(b"hello")[:-1] + "0", "sha256").problem(path)
    assert "5 bytes instead of 6" in RemoteFile("f", 6, None, "sha256").problem(path)
