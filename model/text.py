"""Text that others wrote, made fit for a message. Imports nothing, so that whoever needs only this starts at once."""


def plain(text: str) -> str:
    """Without control characters: a name or a line in a message must not steer the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
