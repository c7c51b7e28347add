"""Words of messages. Imports nothing that takes long, so that whoever needs only this starts at once."""

import difflib
from pathlib import Path


def counted(number: int, things: str) -> str:
    """`1 picture`, `2,000 pictures`: of words that take an s."""
    return f"{number:,} {things.removesuffix('s') if number == 1 else things}"


def plain(text: str) -> str:
    """Without control characters: a name or a line in a message must not steer the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def did_you_mean(path: str | Path) -> str:
    """What exists and has nearly this name, as the end of a message: `: did you mean X?`, or nothing.

    The first part of the path that does not exist is taken for the mistyped one.
    """
    path = Path(path)
    for part in (path, *path.parents):
        try:
            names = {found.name for found in part.parent.iterdir()} if not part.exists() else ()
        except OSError:
            continue  # the folder above is mistyped too, or not ours to read
        for close in difflib.get_close_matches(part.name, sorted(names), n=3):
            candidate = part.parent / close / path.relative_to(part)
            if candidate.exists():
                return f": did you mean {candidate}?"
    return ""
