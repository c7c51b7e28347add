"""What the demo lets in: the limits that docs/demo.md lists, and the checks of pictures and settings."""

from dataclasses import dataclass
from io import BytesIO

from PIL import Image

from model.inference.answerer import Options
from model.messages import UserError
from model.pictures import SampleError
from model.video import is_video, open_video
from model.views import Frames, Sight
from scripts.server.limits import DECODING, Limits, decode_picture

SERVED = Limits()  # what the server lets in, too
MAX_BYTES = SERVED.picture_bytes  # as maxUploadSize in .streamlit/config.toml
MAX_PICTURES, MAX_PICTURES_IN_ALL = SERVED.pictures, SERVED.pictures_in_all  # a message, a conversation
MAX_CHARACTERS = 4000  # a message
MAX_PROMPT_TOKENS, MAX_NEW_TOKENS = SERVED.prompt_tokens, SERVED.new_tokens
MAX_SECONDS = SERVED.seconds  # of the machine for an answer
MAX_SECONDS_UNSEEN = 10.0  # until an answer whose page is gone is given up
MAX_WAITING = 8  # behind the one that is answered
SHOWN_SIDE = 1024  # pixels that a picture keeps for being looked at
STRIP_SIDE = 256  # and each frame of a video


class Refused(UserError):
    """What a person is told and can mend: a key of scripts.demo.text, and which of the files it is about."""

    def __init__(self, key: str, file_number: int | None = None):
        super().__init__(key)
        self.key, self.file_number = key, file_number


@dataclass(frozen=True)
class Picture:
    shown: bytes  # JPEG, at most SHOWN_SIDE a side, with nothing in it but pixels
    seen: Image.Image | Frames  # as much of it as the model sees, scaled exactly as eval_vlm.py would

    @property
    def is_video(self) -> bool:
        return isinstance(self.seen, Frames)


def read_upload(content: bytes, sight: Sight) -> Picture:
    """An uploaded file as a picture, or a video. Its name is never looked at: what it is says its content alone.

    Raises:
        Refused: too many bytes or pixels, no picture or video of the known formats, or damaged.
    """
    if len(content) > MAX_BYTES:
        raise Refused("too_large")
    if is_video(content):
        return read_video(content, sight)
    try:
        return prepare_picture(decode_picture(content), sight)
    except SampleError as error:
        too_many = error.__cause__ is None or isinstance(error.__cause__, Image.DecompressionBombError)
        raise Refused("too_many_pixels" if too_many else "no_picture") from error


def read_video(content: bytes, sight: Sight) -> Picture:
    """What is shown is a strip of the frames that are seen. Raises Refused."""
    if not sight.frames:
        raise Refused("no_videos")
    small: list[Image.Image] = []

    def reduce(frame: Image.Image) -> Image.Image:
        small.append(frame.copy())
        small[-1].thumbnail((STRIP_SIDE, STRIP_SIDE))
        return sight.square(frame)

    try:
        with DECODING:
            seen = open_video(content, sight.frames, reduce)
    except SampleError as error:
        raise Refused("no_video") from error
    except UserError as error:  # the package is not installed
        raise Refused("no_video_package") from error
    file = BytesIO()
    seen._replace(pictures=small).strip(STRIP_SIDE).save(file, "JPEG", quality=90)
    return Picture(file.getvalue(), seen)


def prepare_picture(picture: Image.Image, sight: Sight) -> Picture:
    """picture: RGB. Only pixels are kept: no EXIF, no place where it was taken, no comment."""
    bare = Image.new("RGB", picture.size)
    bare.paste(picture)
    seen = sight.reduced(bare).copy()
    bare.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    file = BytesIO()
    bare.save(file, "JPEG", quality=90)
    return Picture(file.getvalue(), seen)


def options_within(
    max_new_tokens: int, temperature: float, top_p: float, top_k: int, seed: int | None = None
) -> Options:
    """Options brought within limits: sliders have their own, but a page's messages can be written by hand."""
    return Options(
        max_new_tokens=min(max(int(max_new_tokens), 1), MAX_NEW_TOKENS),
        temperature=min(max(0.0, float(temperature)), 2.0),  # in this order not-a-number becomes 0
        top_p=min(max(0.01, float(top_p)), 1.0),
        top_k=min(max(int(top_k), 0), 1000),
        seed=None if seed is None else int(seed) % 2**32,
    )
