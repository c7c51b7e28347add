"""Files and folders: where the project is, what identifies a file, what outlives a power cut."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What ships, from ROOT (docs/what_ships.md).
SHIPPED_TOWER = "model/vision_model/emoji-clip"
SHIPPED_BASE = "model/language_model/emoji-llm.safetensors"
SHIPPED_MODEL = "model/emoji-vlm.safetensors"


def portable_path(folder: str | Path) -> str:
    """The path that weight files name: relative to the project where it lies inside, so that a clone can move."""
    path = find_folder(folder).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def find_folder(folder: str | Path) -> Path:
    """A relative path is looked up in the working directory, then in the project."""
    return Path(folder) if Path(folder).exists() else ROOT / folder


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def written_aside(path: Path, durable: bool = True) -> Iterator[Path]:
    """A path beside `path` to write to; at the end of the `with` the file takes its name, complete or not at all.

    durable: it would outlive a power cut by then. Raises OSError, with nothing left behind.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        if durable:
            sync_to_disk(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    if durable:
        sync_to_disk(path.parent)


def sync_to_disk(path: str | Path) -> None:
    """Wait until a file's content, or a folder's list of names, would outlive a power cut."""
    is_folder = os.path.isdir(path)
    if is_folder and not hasattr(os, "O_DIRECTORY"):
        return  # Windows opens no folders, and writes their names down by itself
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)  # it syncs only what may be written
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
