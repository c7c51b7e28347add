"""A hub on this machine, for what downloads and uploads; samples, and a folder of shards that is made of them."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import modelscope_hub
import pytest

from helpers.hub import CLIP_FILES, NO_TOKENS, HubStandIn, environment
from helpers.prepared import write_source
from scripts import prepare_data
from scripts.data.prepare import first_look
from scripts.hub.clients import SOURCES
from scripts.hub.words import CLIP


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """A hub of its own for one test, and both packages pointed at it, in a hurry and without tokens."""
    stand_in, home = HubStandIn(), tmp_path / "home"
    for name, value in environment(stand_in.address, home).items():
        monkeypatch.setenv(name, value)
    for name in NO_TOKENS:
        monkeypatch.delenv(name, raising=False)
    # what the packages read when they were imported
    constants, downloading, listing = huggingface_hub.constants, modelscope_hub._download, modelscope_hub._legacy_api
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # small files, small pieces
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "hf" / "token"))
    monkeypatch.setattr(downloading, "DOWNLOAD_RETRY_TIMES", 0, raising=False)
    monkeypatch.setattr(downloading, "DOWNLOAD_INTEGRITY_RETRY_BACKOFF", 0, raising=False)
    monkeypatch.setattr(listing, "REPO_TREE_PAGE_MAX_ATTEMPTS", 1, raising=False)
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    yield stand_in
    stand_in.close()


@pytest.fixture
def clip(hub: HubStandIn) -> HubStandIn:
    """The hub with the repository of CLIP, in small."""
    for source in SOURCES:
        hub.add(f"models/{CLIP.repo_ids[source]}", dict(CLIP_FILES))
    return hub


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


@pytest.fixture
def prepare(source: Path, tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """prepare("--shuffle", ...): the folder that scripts/prepare_data.py made; path and output may be given."""
    monkeypatch.setattr(first_look, "load_tokenizer", lambda: tokenizer)

    def run(*flags: object, path: Path = source, output: Path = tmp_path / "prepared") -> Path:
        prepare_data.main([str(path), "--output", str(output), *map(str, flags)])
        return output

    return run
