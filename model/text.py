"""Text that others wrote, made fit for a message. Imports nothing, so that whoever needs only this starts at once."""


def counted(number: int, things: str) -> str:
    """`1 picture`, `2,000 pictures`: of words that take an s."""
    return f"{number:,} {things.removesuffix('s') if number == 1 else things}"


def plain(text: str) -> str:
    """Without control characters: a name or a line in a message must not steer the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
