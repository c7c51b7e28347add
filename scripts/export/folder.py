"""Folders that change as a whole: written aside, then renamed into place; a kill leaves old or new, never a mixture.

No system call that Python offers replaces one folder by another. So for the instant between two renames the old one is
called `.NAME.old`; `recover`, which every conversion calls first, puts it back if the process died in that instant.
"""

import json
import os
import re
import shutil
from pathlib import Path

from model.files import file_sha256, sync_to_disk
from model.messages import UserError

MANIFEST = "conversion.json"  # marks a folder that a conversion wrote; the only kind that may be replaced
WINDOWS = os.name == "nt"


def claim(target: Path) -> Path:
    """An empty folder beside the target to write into, after clearing up what killed conversions left.

    Raises:
        UserError: the target holds something that no conversion wrote.
    """
    recover(target)
    occupied = target.is_file() or (target.is_dir() and any(target.iterdir()))
    if occupied and not (target / MANIFEST).is_file():
        raise UserError(
            f"--output {target} exists and is no converted model ({MANIFEST} is missing): nothing was written. "
            "Name another folder, or remove this one yourself"
        )
    temporary = _beside(target, f"{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    return temporary


def recover(target: Path) -> None:
    """Remove the old folder, or put it back where a kill fell between the two renames, and remove unfinished ones."""
    aside = _beside(target, "old")
    if aside.exists():
        if target.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(target)
    unfinished = re.compile(rf"\.{re.escape(target.name)}\.(\d+)\.tmp")
    for leftover in target.parent.iterdir() if target.parent.is_dir() else ():
        match = unfinished.fullmatch(leftover.name)
        if match and not _alive(int(match[1])):
            shutil.rmtree(leftover)


def seal(folder: Path, facts: dict) -> None:
    """Manifest, modes, and everything on the disk: afterwards the folder may be published."""
    inside = sorted(folder.rglob("*"))
    files = {path.relative_to(folder).as_posix(): file_sha256(path) for path in inside if path.is_file()}
    text = json.dumps({**facts, "files": files}, indent=1, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    for path in (folder / MANIFEST, *inside, folder):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors leaves 0600, which a server's user could not read
        sync_to_disk(path)


def publish(temporary: Path, target: Path) -> None:
    """Put the finished folder in the target's place; what stood there steps aside, and is deleted afterwards."""
    if target.exists():
        target.rename(_beside(target, "old"))
    try:
        temporary.rename(target)
        sync_to_disk(target.parent)
    finally:
        recover(target)  # deletes the old folder, or puts it back where the new one could not come


def _beside(target: Path, ending: str) -> Path:
    return target.parent / f".{target.name}.{ending}"


def _alive(process: int) -> bool:
    if WINDOWS:
        return True  # not known: there os.kill would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()  # a leftover of ours would be from a process that had our number before
