"""What is let in from outside, by the server and by the demo: limits, and pictures as strangers send them."""

import threading
from dataclasses import dataclass
from io import BytesIO

from PIL import Image, UnidentifiedImageError

from model.pictures import PICTURE_FORMATS, SampleError, open_picture

CHARACTERS_A_TOKEN = 16  # more of them than this are no prompt that fits: refused before anything counts tokens
MEGABYTE = 1024**2
DECODING = threading.BoundedSemaphore(2)  # pictures at a time: one may take 300 MB


@dataclass(frozen=True)
class Limits:
    """Of a request, of its answer, and of all of them at once. A picture's pixels: model.pictures.MAX_PIXELS."""

    body_bytes: int = 64 * MEGABYTE
    picture_bytes: int = 10 * MEGABYTE
    pictures: int = 4  # a message
    pictures_in_all: int = 8  # a conversation
    prompt_tokens: int = 4096
    new_tokens: int = 1024
    seconds: float = 120.0  # of the machine for an answer
    rows: int = 16  # answers that grow together
    waiting: int = 64  # requests behind them
    bodies_bytes: int = 256 * MEGABYTE  # of all bodies that are being read
    body_seconds: float = 30.0  # that sending a body may take
    fetch_seconds: float = 10.0  # that fetching a picture may take

    @property
    def characters(self) -> int:
        return CHARACTERS_A_TOKEN * self.prompt_tokens


def decode_picture(content: bytes) -> Image.Image:
    """RGB. What it is says its content alone, never a name or a media type.

    Raises:
        SampleError: too many pixels, no picture of the known formats, or damaged.
    """
    try:
        picture = open_picture(BytesIO(content), decode=False)  # the header alone: a bomb waits for nobody's decoding
        with DECODING:
            return open_picture(picture)
    except SampleError as error:
        if isinstance(error.__cause__, UnidentifiedImageError):  # whose words are about an object of Python's
            raise SampleError(f"it is none of {', '.join(PICTURE_FORMATS)}") from error.__cause__
        raise
