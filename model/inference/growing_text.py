"""The text that tokens make: shown while it grows, ended by stop strings, and token by token."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

UNFINISHED = "\ufffd"  # what a tokenizer shows for bytes that are no whole character yet
UNDERLINE = "\u2581"  # how tokenizers that are not byte-level write a space


@dataclass(frozen=True)
class TokenLogprob:
    token_id: int
    bytes: bytes  # of the text; a character may be spread over several tokens
    logprob: float  # natural logarithm
    top: tuple["TokenLogprob", ...] = ()  # the likeliest in its place, falling; they have none of their own

    @property
    def text(self) -> str:
        return self.bytes.decode("utf-8", "replace")


class Piece(str):
    """Shown text that knows how likely the tokens were that it was made of."""

    logprobs: tuple[TokenLogprob, ...] = ()


class GrowingText:
    """Shows the text of tokens as they come: whole characters, and nothing that a stop string may begin with.

    Each piece is a Piece, a str like any other; its logprobs are those of the tokens read since the piece before.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None], stop: Sequence[str] = ()):
        self.tokenizer, self.show, self.stop = tokenizer, show, stop
        self.before: list[int] = []  # tokens of the text before: many tokenizers drop a space that begins a text
        self.waiting: list[int] = []  # tokens that are no whole character yet
        self.held = ""  # text that a stop string may begin with
        self.logprobs: list[TokenLogprob] = []  # of what is not shown yet
        self.stopped = False  # a stop string was said

    def add(self, token: int, logprob: TokenLogprob | None = None) -> None:
        self.waiting.append(token)
        if logprob:
            self.logprobs.append(logprob)
        text = self._new_text()
        if text and not text.endswith(UNFINISHED):
            self._take(text)
            kept = 0 if self.stopped else _length_of_beginning(self.held, self.stop)
            self._show(len(self.held) - kept)

    def flush(self) -> None:
        """The answer has ended: show also what never became a character, or a stop string."""
        self._take(self._new_text())
        self._show(len(self.held))

    def _new_text(self) -> str:
        both = decode(self.tokenizer, self.before + self.waiting)
        return both[len(decode(self.tokenizer, self.before)) :]

    def _take(self, text: str) -> None:
        """The next text, up to a stop string; nothing comes after one."""
        self.before, self.waiting = self.waiting, []
        if not self.stopped:
            self.held += text
            end = end_of_text(self.held, self.stop)
            if end is not None:
                self.held, self.stopped = self.held[:end], True

    def _show(self, length: int) -> None:
        if not length:
            return
        piece, self.held = Piece(self.held[:length]), self.held[length:]
        piece.logprobs, self.logprobs = tuple(self.logprobs), []
        self.show(piece)


def decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def end_of_text(text: str, stop: Sequence[str]) -> int | None:
    """Where the first of these strings begins; None where there is none."""
    return min((place for place in map(text.find, stop) if place >= 0), default=None)


def _length_of_beginning(text: str, stop: Sequence[str]) -> int:
    """How many of the last letters may be the beginning of one of these strings, which may be said next."""
    lengths: Iterator[int] = (
        length for one in stop for length in range(min(len(one) - 1, len(text)), 0, -1) if text.endswith(one[:length])
    )
    return max(lengths, default=0)


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """What a token stands for; a control token for its name, one beyond the tokenizer's for nothing."""
    name, decoder = tokenizer.convert_ids_to_tokens(token), str(tokenizer.backend_tokenizer.decoder)
    if name is None:
        return b""
    if token in tokenizer.added_tokens_decoder:
        return name.encode()
    if "ByteLevel" in decoder:
        return bytes(_byte_of_letter()[letter] for letter in name)
    if "ByteFallback" in decoder and re.fullmatch("<0x[0-9A-F]{2}>", name):
        return bytes.fromhex(name[3:5])
    return name.replace(UNDERLINE, " ").encode()


@lru_cache
def _byte_of_letter() -> dict[str, int]:
    """How byte-level tokenizers write bytes as letters, GPT-2's way."""
    return {letter: byte for byte, letter in bytes_to_unicode().items()}
