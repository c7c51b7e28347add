"""Uploads to a hub on this machine: what arrives, and above all what never leaves."""

import json
import os

import pytest

from helpers.hub import sha256
from scripts import convert_vlm, upload
from scripts.hub.clients import HubError, LocalError

FILES = {
    "config.json": b'{"model_type": "llava"}',
    "model.safetensors": b"w" * 70_000,
    "README.md": b"---\nlicense: apache-2.0\n---\n# a model\n",
    "chat_template.jinja": b"{{ messages }}",
    "code/model.py": b"import torch\n",
    "LICENSE": b"Apache",
}
both_hubs = pytest.mark.parametrize("source", ["huggingface", "modelscope"])
# made up, and put together here so that no scanner takes this file for a leak
HF_TOKEN, SCOPE_TOKEN = "hf_" + "aB3" * 12, "ms-" + "0a1b2c3d-" + "0a1b-" * 3 + "0a1b2c3d4e5f"


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "model"


@pytest.fixture
def tokens(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", HF_TOKEN)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", SCOPE_TOKEN)


@both_hubs
@pytest.mark.parametrize("private", [True, False])
def test_the_folder_arrives(hub, tokens, folder, source, private, capfd):
    arguments = [str(folder), "--repo_id", "me/model", "--source", source]
    upload.main(arguments + ["--private"] * private)
    there = hub.repositories["models/me/model"]
    assert there.files == FILES and there.private == private
    assert list(hub.blobs) == [sha256(FILES["model.safetensors"])], "the weights go as a large file"
    said = "".join(capfd.readouterr())
    place = "" if source == "huggingface" else "models/"
    assert f"uploaded: {hub.address}/{place}me/model" in said
    assert HF_TOKEN not in said and SCOPE_TOKEN not in said
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == sorted(FILES)


def test_a_conversion_is_sent_when_that_is_asked_for(hub, tokens, folder, monkeypatch, capsys):
    monkeypatch.setattr(convert_vlm, "convert", lambda options: {"proved": "the same text", "format": "llava"})
    flags = ["--weight", "any", "--to", "llava", "--output", str(folder), "--push_to_hub"]
    monkeypatch.setattr("sys.argv", ["convert_vlm.py", *flags, "me/model"])
    convert_vlm.main()
    assert hub.repositories["models/me/model"].files == FILES
    assert f"sent: {hub.address}/me/model" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["convert_vlm.py", *flags, "no name"])
    with pytest.raises(SystemExit, match="convert_vlm: 'no name' is no repository's name"):
        convert_vlm.main()


@both_hubs
def test_a_second_upload_changes_what_changed(hub, tokens, folder, source):
    address = upload.push_folder(folder, "me/model", source, private=True)
    (folder / "config.json").write_text('{"model_type": "other"}')
    assert upload.push_folder(str(folder), "me/model", source, private=True) == address
    there = hub.repositories["models/me/model"]
    assert there.private and there.files == {**FILES, "config.json": b'{"model_type": "other"}'}


@both_hubs
def test_what_is_to_be_private_never_goes_into_a_public_repository(hub, tokens, folder, source):
    hub.add("models/me/model", {}, private=False)
    with pytest.raises(HubError, match="is public"):
        upload.push_folder(folder, "me/model", source, private=True)
    assert not hub.repositories["models/me/model"].files and not hub.blobs


def write(folder, name, content=b"x"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [(".env", b"A=1", "hidden"), (".git/config", b"", "hidden"), ("sub/.netrc", b"", "hidden"),
     ("weights.pth", b"", "no part of a model"), ("optimizer.pt", b"", "no part of a model"),
     ("key.pem", b"", "no part of a model"), ("data.parquet", b"", "no part of a model"),
     ("id_rsa", b"", "no part of a model"), ("nice name.json", b"", "rename"), ("bildchen\u00e4.png", b"", "rename"),
     ("train.json", json.dumps({"token": HF_TOKEN}).encode(), "line 1 holds a Hugging Face token"),
     ("sub/a.py", f"\n\nx = '{SCOPE_TOKEN}'".encode(), "line 3 holds a ModelScope token"),
     ("notes.md", b"ghp_" + b"a1" * 18, "a GitHub token"), ("b.txt", b"AKIA" + b"ABCD" * 4, "an API key"),
     ("c.txt", b"sk-" + b"ab12" * 10, "an API key"), ("LICENSE", b"-----BEGIN RSA PRIVATE KEY-----", "a private key")],
)  # fmt: skip
def test_what_must_not_leave_stops_everything(hub, tokens, folder, name, content, reason):
    write(folder, name, content)
    with pytest.raises(SystemExit) as caught:
        upload.main([str(folder), "--repo_id", "me/model"])
    said = caught.value.code
    assert said.startswith("upload: nothing was sent") and name.split("/")[0] in said and reason in said
    assert HF_TOKEN not in said and SCOPE_TOKEN not in said and not hub.requests


def test_links_out_of_the_folder_are_refused_and_links_inside_are_followed(hub, tokens, folder, tmp_path):
    (folder / "again.json").symlink_to(folder / "config.json")
    upload.push_folder(folder, "me/model")
    assert hub.repositories["models/me/model"].files["again.json"] == FILES["config.json"]
    hub.requests.clear()
    (tmp_path / "outside.json").write_text("{}")
    for target in (tmp_path / "outside.json", tmp_path / "gone.json", folder / "code"):
        link = folder / "link.json"
        link.symlink_to(target)
        with pytest.raises(LocalError, match="link.json is a link to"):
            upload.push_folder(folder, "me/model")
        link.unlink()
    assert not hub.requests


def test_a_pipe_is_no_file(hub, tokens, folder):
    os.mkfifo(folder / "pipe.json")
    with pytest.raises(LocalError, match="pipe.json is no ordinary file"):
        upload.push_folder(folder, "me/model")


def test_all_problems_are_told_at_once(folder):
    for number in range(10):
        write(folder, f"{number}.pth")
    with pytest.raises(LocalError, match="7.pth is no part of a model: remove it and 2 more"):
        upload.files_to_send(folder)


@pytest.mark.parametrize("what", ["nothing", "no weights"])
def test_a_folder_without_a_model_is_refused(hub, tokens, folder, tmp_path, what):
    if what == "no weights":
        (folder / "model.safetensors").unlink()
    with pytest.raises(LocalError, match="is no folder|holds no weights"):
        upload.push_folder(folder if what == "no weights" else tmp_path / "missing", "me/model")
    assert not hub.requests


@pytest.mark.parametrize("repo_id", ["model", "a/b/c", "../x", "me/", "http://x/y", "me/mo del"])
def test_a_name_without_an_owner_is_refused(hub, tokens, folder, repo_id):
    with pytest.raises(LocalError, match="owner/name"):
        upload.push_folder(folder, repo_id)
    assert not hub.requests


@both_hubs
def test_without_a_token_it_says_how_to_get_one(hub, folder, source):
    with pytest.raises(HubError, match="no .* token: run `.*login`"):
        upload.push_folder(folder, "me/model", source)
    assert not hub.requests


@both_hubs
@pytest.mark.parametrize(("status", "what"), [(401, "does not accept the token"), (403, "forbids"), (500, "error 500")])
def test_a_refusal_is_a_sentence(hub, tokens, folder, source, status, what):
    hub.refuse = (status, {})
    with pytest.raises(SystemExit) as caught:
        upload.main([str(folder), "--repo_id", "me/model", "--source", source])
    said = caught.value.code
    assert what in said and "me/model" in said and "\n" not in said and HF_TOKEN not in said


@both_hubs
def test_a_hub_that_cannot_be_reached_is_a_sentence(hub, tokens, folder, source):
    hub.close()
    with pytest.raises(SystemExit) as caught:
        upload.main([str(folder), "--repo_id", "me/model", "--source", source])
    assert "cannot be reached" in caught.value.code and "check the network" in caught.value.code


@both_hubs
def test_weights_that_the_hub_does_not_take_are_no_success(hub, tokens, folder, source):
    hub.refuse_content = 403
    with pytest.raises(SystemExit) as caught:
        upload.main([str(folder), "--repo_id", "me/model", "--source", source])
    assert caught.value.code.startswith("upload: ") and "me/model" in caught.value.code
    assert "\n" not in caught.value.code and SCOPE_TOKEN not in caught.value.code
    assert "model.safetensors" not in hub.repositories["models/me/model"].files
