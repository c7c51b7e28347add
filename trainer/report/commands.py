"""Commands to copy: as they work here, from the folder that the user stands in."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from trainer.config import ROOT


def command(script: str, *flags: object) -> str:
    """`python SCRIPT FLAGS`, the script named from the project's root, paths as short as they can be."""
    return python(ROOT / script, *flags)


def python(*parts: object) -> str:
    return shlex.join([shown(_python()), *map(shown, parts)])


def stage_command(name: str, *flags: object) -> str:
    return command(f"trainer/train_{name}.py", *flags)


def shown(part: object) -> str:
    """A path inside the working directory from there on, everything else as it is."""
    text = os.fspath(part) if isinstance(part, Path) else str(part)
    if os.path.isabs(text) and Path(text).is_relative_to(Path.cwd()):
        return os.path.relpath(text)
    return text


def _python() -> str:
    found = shutil.which("python")
    return "python" if found and Path(found).absolute() == Path(sys.executable).absolute() else sys.executable
