"""What a person reads when something is wrong: UserError, and the words that messages are made of.

Imports nothing that takes long, so that whoever needs only this starts at once.
"""

import difflib
import errno
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)  # how a full disk, and whoever limits it, says so


class UserError(ValueError):
    """Wrong flags, data, files or machines; the message says what is wrong, where, and what to do.

    Programs catch it and print the sentence alone. Every other exception goes through with its traceback, ValueError
    too: torch and Python raise those over mistakes that no flag will cure.
    """


def counted(number: int, things: str) -> str:
    """`1 picture`, `2,000 pictures`: for words whose plural has an s."""
    return f"{number:,} {things.removesuffix('s') if number == 1 else things}"


def plain(text: str) -> str:
    """Without control characters: a name or a line in a message must not steer the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def did_you_mean(path: str | Path) -> str:
    """An existing path with nearly this name, as the end of a message: `: did you mean X?`, or nothing.

    The first part of the path that does not exist counts as the mistyped one.
    """
    path = Path(path)
    for part in (path, *path.parents):
        try:
            names = {entry.name for entry in part.parent.iterdir()} if not part.exists() else ()
        except OSError:
            continue  # the folder above is mistyped too, or not ours to read
        for close in difflib.get_close_matches(part.name, sorted(names), n=3):
            candidate = part.parent / close / path.relative_to(part)
            if candidate.exists():
                return f": did you mean {candidate}?"
    return ""
