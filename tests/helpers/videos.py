"""Small videos whose frames carry their number, and how to read it."""

import io
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

SIDE, BITS = 64, 10
CODECS = {".webm": "libvpx-vp9", ".mpg": "mpeg2video", ".avi": "mpeg4"}  # else H.264


def numbered(count: int, noise: bool = False) -> list[Image.Image]:
    """Frames whose number stands in them as columns, white for a 1. noise: below it, so that a frame takes bytes."""
    rng, frames = np.random.default_rng(0), []
    for number in range(count):
        pixels = np.zeros((SIDE, SIDE * 2, 3), np.uint8)
        for bit in range(BITS):
            pixels[: SIDE // 2, bit * 12 : bit * 12 + 12] = 255 * (number >> bit & 1)
        if noise:
            pixels[SIDE // 2 :] = rng.integers(0, 256, (SIDE // 2, SIDE * 2, 3), dtype=np.uint8)
        frames.append(Image.fromarray(pixels))
    return frames


def frame_number(picture: Image.Image) -> int:
    columns = np.asarray(picture.convert("L"))[8 : SIDE // 2 - 8]
    return sum((columns[:, bit * 12 + 3 : bit * 12 + 9].mean() > 127) << bit for bit in range(BITS))


def make_video(
    path: Path | io.BytesIO, frames: Iterable[Image.Image], rate: int = 25, group: int = 12, codec: str = "",
    at: Sequence[int] | None = None, rotation: int = 0, sound: bool = False, options: dict | None = None,
    container: str | None = None,
) -> Path | io.BytesIO:  # fmt: skip
    """Write a video and return where it is.

    rate: frames a second; group: frames from one whole one to the next; at: when each begins, in frames; rotation: in
    degrees, counter-clockwise, that a player shall turn it; options, container: of the file's format.
    """
    import av

    codec = codec or CODECS.get(Path(str(path)).suffix, "libx264")
    target = path if isinstance(path, io.BytesIO) else str(path)
    with av.open(target, "w", format=container, options=options or {}) as output:
        stream = output.add_stream(codec, rate=rate, options={"threads": "1"})
        stream.pix_fmt, stream.codec_context.gop_size = "yuv420p", group
        if sound:
            voice = output.add_stream("aac", rate=8000, layout="mono")
        for number, picture in enumerate(frames):
            if number == 0:
                stream.width, stream.height = picture.size
                if rotation:
                    stream.set_display_rotation(rotation)
            frame = av.VideoFrame.from_image(picture)
            frame.pts, frame.time_base = at[number] if at else number, Fraction(1, rate)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
        if sound:
            heard = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
            heard.rate = 8000
            output.mux([*voice.encode(heard), *voice.encode()])
    return path
