"""The files of this project: where they are, and which of them git knows."""

import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@cache
def tracked_files() -> list[Path]:
    """What git tracks, or would if everything were added."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"no git checkout: {found.stderr.strip()}")
    return [ROOT / name for name in sorted(set(found.stdout.split("\0"))) if name and (ROOT / name).is_file()]


def python_files(*tops: str) -> list[Path]:
    """Tracked Python files of these packages and top-level modules."""
    return [path for path in tracked_files() if path.suffix == ".py" and top_of(path) in tops]


def top_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")
