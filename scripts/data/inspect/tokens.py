"""A row's tokens one by one, as they are shown: a picture's placeholders are one entry."""

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from model.messages import plain
from scripts.data.inspect.sample_row import SampleRow

CONTROL, TEXT = "control", "text"
MARKS = {"\n": "↵", "\t": "⇥"}


@dataclass(frozen=True)
class Entry:
    """A token, or all of one picture's. Places and positions are counted from 0, as in the tensors."""

    place: int  # in the row; a picture's first
    id: int
    position: int  # in its own conversation; a picture's first
    branch: int
    trained: bool
    is_control: bool
    content: bytes  # what the token stands for
    picture: int = 0  # its number, counted from 1
    size: int = 1  # tokens
    beyond: bool = False  # some of it has no room within max_seq_len

    @property
    def text(self) -> str:
        """Safe to print; line breaks and tabs as signs, a piece of a character as its bytes."""
        text = decoded([self])
        if text is None:
            return f"‹{self.content.hex(' ')}›"
        return readable(text) if text.strip(" ") else "␣" * len(text)

    @property
    def is_piece(self) -> bool:
        """Whether it holds a part of a character only."""
        return decoded([self]) is None


def readable(text: str) -> str:
    """Without letters that steer a terminal or a page; line breaks and tabs as signs."""
    return "".join(MARKS.get(letter) or plain(letter) for letter in text)


def entries(row: SampleRow, tokenizer: PreTrainedTokenizerFast) -> list[Entry]:
    """All of a row's."""
    rendered, positions = row.rendered, row.rendered.positions
    starts = {picture.first: (number, picture) for number, picture in enumerate(row.pictures, 1)}
    control, found = set(tokenizer.all_special_ids), []
    for place in range(len(rendered)):
        number, picture = starts.get(place, (0, None))
        if rendered.image_mask[place] and picture is None:
            continue
        token, size = int(rendered.input_ids[place]), picture.last - picture.first + 1 if picture else 1
        found.append(Entry(
            place, token, int(positions[place]), int(rendered.branch[place]), bool(rendered.trained[place]),
            token in control, content_of(token, tokenizer, token in control), number, size,
            beyond=place + size > row.max_seq_len,
        ))  # fmt: skip
    return found


def content_of(token: int, tokenizer: PreTrainedTokenizerFast, is_control: bool) -> bytes:
    """The bytes that a token stands for; a control token's name."""
    name = tokenizer.convert_ids_to_tokens(token)
    if is_control or not all(letter in BYTES for letter in name):
        return name.encode()
    return bytes(BYTES[letter] for letter in name)


def byte_letters() -> dict[str, int]:
    """Letters that a byte-level vocabulary writes bytes with: a visible one is itself, the others count from 256."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


BYTES = byte_letters()


def whole_characters(shown: list[Entry]) -> Iterator[list[Entry]]:
    """Entries one by one, but those together that only together are characters."""
    waiting: list[Entry] = []
    for entry in shown:
        goes_on = waiting and (entry.branch, entry.trained) == (waiting[0].branch, waiting[0].trained)
        if not (entry.is_piece and goes_on):
            yield from ([piece] for piece in waiting)  # they never became one
            waiting = []
        waiting.append(entry)
        if decoded(waiting) is not None:
            yield waiting
            waiting = []
    yield from ([piece] for piece in waiting)


def decoded(shown: list[Entry]) -> str | None:
    """What entries stand for together; None where that is no whole number of characters."""
    try:
        return b"".join(entry.content for entry in shown).decode()
    except UnicodeDecodeError:
        return None
