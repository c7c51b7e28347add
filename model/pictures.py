"""Pictures as they come, from files, bytes and uploads: opened and turned upright, or refused with the reason."""

import errno
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from model.messages import UserError

MAX_PIXELS = 25_000_000  # a picture of more is refused by its header, before it is decoded
DRAFT_SIDE = 1024  # pixels; a JPEG of more than MAX_PIXELS is decoded at a half to an eighth of its size, not smaller
MAX_SIDE, MAX_RATIO = 16384, 200  # pixels; the longer side to the shorter
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
# Not there, no file, or a decoder sent to a place before its start; other numbers are the disk's or the system's fault.
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)
# What Pillow's decoders raise over bytes that they did not expect.
DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError, struct.error,
                 LookupError, ArithmeticError, TypeError)  # fmt: skip


class SampleError(UserError):
    """A sample that cannot be used; the message says why, without saying where: the reader knows that.

    cure: for whoever reads data files; other tools say the reason alone, and a cure of their own.
    """

    def __init__(self, reason: str, cure: str = ""):
        self.reason = reason
        super().__init__(*filter(None, (reason, cure)))

    def __str__(self) -> str:
        return ": ".join(self.args)


class UnreadableFile(SampleError):
    """A picture's file that the disk or the system does not give, which says nothing of the picture."""

    def __init__(self, error: OSError):
        super().__init__(
            f"the file could not be read ({error.strerror or error}), which is no fault of the picture",
            "see to the rights of the file and its folder, or to the disk, and start again",
        )


class TooManyPixels(SampleError):
    """A picture beyond a limit that may be raised."""


def open_picture(
    source: str | Path | BinaryIO | Image.Image, decode: bool = True, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """A picture as RGB, turned as its EXIF says, transparency on white.

    decode: False only looks at the header, which is fast, and finds what is no picture but not what is cut short.

    Raises:
        SampleError: it is missing, no picture, too large, or damaged, or the disk or the system does not give it.
    """
    try:
        picture = source if isinstance(source, Image.Image) else Image.open(source, formats=PICTURE_FORMATS)
        check_size(*picture.size, max_pixels)
        if not decode:
            return picture
        if picture.width * picture.height > MAX_PIXELS:
            picture.draft(None, (DRAFT_SIDE, DRAFT_SIDE))
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I;16"):  # Pillow's own conversion clips 16 bits to white
            picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")
    except SampleError:
        raise
    except FileNotFoundError:
        raise SampleError("the file does not exist", "check --images_path") from None
    except DECODE_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None and error.errno not in NO_FILE:
            raise UnreadableFile(error) from error
        raise SampleError(f"it cannot be read as a picture ({error})", "replace it or delete the line") from error


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height once it is turned as its EXIF says; of one whose header alone was read, too."""
    on_its_side = picture.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return picture.size[::-1] if on_its_side else picture.size


def check_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raises SampleError where a picture, or the frames of a video, are too large or too long and thin."""
    longer, shorter = max(width, height), min(width, height)
    if width * height > max_pixels:
        raise TooManyPixels(f"it has {width} x {height} pixels, more than {max_pixels:,}: scale it down")
    if longer > MAX_SIDE:
        raise SampleError(f"it has {width} x {height} pixels, a side of more than {MAX_SIDE:,}: scale it down")
    if longer > MAX_RATIO * shorter:
        raise SampleError(f"it has {width} x {height} pixels, too long and thin ({MAX_RATIO}:1 at most): cut it")
