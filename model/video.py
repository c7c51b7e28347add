"""Videos as they come, from files and uploads: when to look, the frames shown then, and what each look is called.

Read with PyAV (package `av`, which brings FFmpeg), in place and piece by piece. Nothing but the video's own bytes is
opened: a list of other files or addresses (HLS, concat, DASH) is refused, and so is what few videos are made of.
"""

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from PIL import Image

from model.messages import UserError
from model.pictures import (
    DECODE_ERRORS,
    MAX_PIXELS,
    NO_FILE,
    SampleError,
    UnreadableFile,
    check_size,
    open_picture,
)
from model.views import Frames, Times

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

MAX_SECONDS = 24 * 3600  # what claims to last longer is a broken header or a camera that never stops
CONTAINERS = ("mov", "matroska", "avi", "mpegts", "ogg")  # as FFmpeg names them; mov is mp4, matroska is webm
VIDEO_ENDINGS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".ogv")
FIRST_BYTES = (b"\x1a\x45\xdf\xa3", b"OggS", b"G@")  # of Matroska, Ogg and MPEG-TS; mp4 and avi say it further on
CODECS = ("h264", "hevc", "av1", "libdav1d", "vp8", "vp9", "mpeg4", "mpeg2video", "mpeg1video", "mjpeg", "theora")
PIXELS = {"max_pixels": str(MAX_PIXELS)}  # of a frame, whatever the header says
LIMITS = {
    "format_whitelist": ",".join(CONTAINERS), "codec_whitelist": ",".join(CODECS), "protocol_whitelist": "", **PIXELS,
}  # fmt: skip
SEEK = 2.0  # seconds: what lies nearer ahead is decoded on the way, where no index tells better
LEADS = (0.0, 10.0, float("inf"))  # seconds before a time, tried in turn until decoding starts no later than that time
MAX_DECODED = 20_000  # frames for one look at a video: more are on the way only where it cannot be sought in
TOLERANCE = 0.0005  # seconds; half of what Matroska rounds times to
MISSING = 0.1  # of a video may fail to come at its end (and a second): headers round
UPRIGHT = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)  # by quarter turns
CONVERT = "convert it, `ffmpeg -i VIDEO -c:v libx264 -pix_fmt yuv420p NEW.mp4`, or delete the line"
REPLACE = "replace it or delete the line"


def frame_times(source: Path | bytes, frames: int) -> tuple[float, ...]:
    """When to look, in seconds from the start: the middles of so many equal parts, or of as many as it has frames.

    Only the header is read. Raises SampleError where it is no video, or too large, too long or without an end.
    """
    with _opened(source) as (container, stream):
        duration = _duration(container, stream)
        has = stream.frames or round(duration * float(stream.average_rate or stream.guessed_rate or 0))
    parts = max(1, min(frames, has))
    return tuple(duration * (part + 0.5) / parts for part in range(parts))


def read_frames(source: Path | bytes, times: Sequence[float]) -> Iterator[Image.Image]:
    """What a player shows at each of these times, rising, in seconds from the start: RGB, upright.

    They come one by one, so that whoever makes them small keeps no large ones; far times are sought by the video's
    index. Raises SampleError, also on the way: a video that is cut short has frames before it has none.
    """
    with _opened(source) as (container, stream):
        duration, cursor = _duration(container, stream), _Cursor(container, stream)
        for time in times:
            frame = cursor.shown_at(time)
            if frame is None:
                raise SampleError("it holds no frame that can be decoded", REPLACE)
            if cursor.ended and cursor.seconds(frame) < min(time, _last_promised(container, stream, duration)):
                raise SampleError(
                    f"it ends after {cursor.seconds(frame):.1f} of {duration:.1f} seconds, it was cut short",
                    "copy it again or delete the line",
                )
            yield _picture(frame)


def write_video(path: Path, frames: Iterable[Image.Image], rate: int, crf: int = 18) -> None:
    """Frames of one size, both sides even, as an H.264 mp4. rate: frames a second; crf: H.264's, 0 loses the least."""
    av = _av()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf), "threads": "1"})
        stream.pix_fmt = "yuv420p"  # all that browsers and telephones play
        for number, picture in enumerate(frames):
            if number == 0:
                stream.width, stream.height = picture.size
            frame = av.VideoFrame.from_image(picture)
            frame.pts, frame.time_base = number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def open_video(source: Path | bytes, frames: int, reduce: Callable[[Image.Image], Image.Image] | None = None) -> Frames:
    """So many of its frames, evenly chosen, or as many as it has.

    reduce: makes each small as soon as it is read. Raises SampleError, see frame_times and read_frames.
    """
    times = frame_times(source, frames)
    pictures = [reduce(picture) if reduce else picture for picture in read_frames(source, times)]
    return Frames(pictures, Times(tuple(time_labels(times))))


def headings_of_video(source: Path | bytes, frames: int) -> tuple[str, ...]:
    """What stands before each of its frames, by the header alone. Raises SampleError."""
    return tuple(time_labels(frame_times(source, frames)))


def is_video(source: Path | bytes) -> bool:
    """Whether it is one by its name, or its first bytes: whether it can be read is another matter."""
    if isinstance(source, Path):
        return source.suffix.lower() in VIDEO_ENDINGS
    return source[4:8] == b"ftyp" or source.startswith(FIRST_BYTES) or source[8:12] == b"AVI " or source[4:8] == b"moov"


def time_labels(times: Sequence[float]) -> list[str]:
    """A name of each time as a player shows it, `0:03` or `1:02:03`, with the fewest decimals that tell them apart."""
    for decimals in range(4):
        labels = [_label(int(time * 10**decimals + 1e-6), decimals) for time in times]
        if len(set(labels)) == len(labels):
            break
    return labels


def _label(units: int, decimals: int) -> str:
    seconds, fraction = divmod(units, 10**decimals)
    minutes, hours = seconds // 60, seconds // 3600
    clock = f"{hours}:{minutes % 60:02d}" if hours else str(minutes)
    return f"{clock}:{seconds % 60:02d}" + (f".{fraction:0{decimals}d}" if decimals else "")


def _av() -> ModuleType:
    try:
        import av
    except ImportError:
        raise UserError(
            "videos are read and written with the package av, which is not installed: "
            "pip install -r requirements/video.txt"
        ) from None
    return av


@contextlib.contextmanager
def _opened(source: Path | bytes) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """The container and its video. What goes wrong over it, also in the block, becomes a SampleError."""
    av = _av()
    try:
        with (
            io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file,
            av.open(file, options=LIMITS, metadata_errors="replace") as container,
        ):
            yield container, _video_of(container)
    except SampleError:
        raise
    except FileNotFoundError:
        raise SampleError("the file does not exist", "check --images_path") from None
    except (av.FFmpegError, *DECODE_ERRORS) as error:
        of_the_disk = isinstance(error, OSError) and not isinstance(error, av.FFmpegError)
        if of_the_disk and error.errno is not None and error.errno not in NO_FILE:
            raise UnreadableFile(error) from error
        if _is_picture(source):
            raise SampleError("it is a picture and no video", "name it in `image`") from error
        said = getattr(error, "strerror", None) or error
        raise SampleError(f"it cannot be read as a video ({said})", CONVERT) from error


def _video_of(container: "InputContainer") -> "VideoStream":
    """The stream that a player shows, which the cover of a song is not."""
    streams = [stream for stream in container.streams.video if "attached_pic" not in str(stream.disposition)]
    if not streams:
        raise SampleError("it has no pictures" + ", only sound" * bool(container.streams.audio), REPLACE)
    stream = streams[0]
    name = stream.codec_context.name if stream.codec_context else "an unknown codec"
    if name not in CODECS:
        raise SampleError(f"its pictures are packed with {name}, which is not read here", CONVERT)
    if not stream.width or not stream.height:
        raise SampleError("its header does not say how large it is", CONVERT)
    check_size(stream.width, stream.height)
    stream.codec_context.options = PIXELS
    return stream


def _duration(container: "InputContainer", stream: "VideoStream") -> float:
    """In seconds, above 0."""
    units = stream.duration and stream.duration * stream.time_base
    duration = float(units or (container.duration or 0) / 1_000_000)
    if duration <= 0:
        raise SampleError(
            "its header does not say how long it is, as of a live stream or a recording that was not ended", CONVERT
        )
    if duration > MAX_SECONDS:
        raise SampleError(f"it claims to last {duration / 3600:,.0f} hours, more than {MAX_SECONDS // 3600}", CONVERT)
    return duration


def _last_promised(container: "InputContainer", stream: "VideoStream", duration: float) -> float:
    """The time that the last frame has at the least, in seconds: by mp4's index, which is whole, or by the duration."""
    index = stream.index_entries
    if container.format.name.startswith("mov") and len(index):
        first = min(index[0].timestamp, stream.start_time or 0)
        return float((index[len(index) - 1].timestamp - first) * stream.time_base) - 1 / float(stream.average_rate or 1)
    return duration - max(1.0, MISSING * duration)


def _is_picture(source: Path | bytes) -> bool:
    try:
        open_picture(io.BytesIO(source) if isinstance(source, bytes) else source, decode=False)
    except SampleError:
        return False
    return True


def _picture(frame: "VideoFrame") -> Image.Image:
    """RGB, turned as a player turns it. Its size is its own: it may change on the way."""
    check_size(frame.width, frame.height)
    turn = UPRIGHT[round(frame.rotation / 90) % 4]
    picture = frame.to_image()
    return picture if turn is None else picture.transpose(turn)


class _Cursor:
    """A place in a video that moves forward: the frame that is shown there, and the one after it."""

    def __init__(self, container: "InputContainer", stream: "VideoStream"):
        self.container, self.stream = container, stream
        self.start = stream.start_time or 0  # in units of the stream's time base
        self.ended, self._count = False, 0
        self._step = 1 / float(stream.average_rate or 25)
        self._frames = container.decode(stream)
        self._shown: VideoFrame | None = None
        self._next = self._decoded()

    def seconds(self, frame: "VideoFrame") -> float:
        """From the start of the video."""
        return float((frame.pts - self.start) * self.stream.time_base)

    def shown_at(self, time: float) -> "VideoFrame | None":
        """The last frame that begins no later; the first one where none does; None where there are none."""
        if self._next is not None and self._is_far(time):
            self._seek(time)
        while self._next is not None and (self._shown is None or self.seconds(self._next) <= time + TOLERANCE):
            self._shown, self._next = self._next, self._decoded()
        return self._shown

    def _decoded(self) -> "VideoFrame | None":
        frame = next(self._frames, None)
        self.ended, self._count = frame is None, self._count + 1
        if self._count > MAX_DECODED:
            raise SampleError(f"it cannot be sought in: {MAX_DECODED:,} frames were not enough to get there", CONVERT)
        if frame is not None and frame.pts is None:  # some of AVI's
            before = self.start if self._shown is None else self._shown.pts
            frame.pts = before + round(self._step / self.stream.time_base)
        return frame

    def _is_far(self, time: float) -> bool:
        """Whether seeking is worth it: a frame to start from lies between here and there."""
        here, index = self.seconds(self._next), self.stream.index_entries
        found = index.search_timestamp(self._units(time)) if len(index) > 1 else -1  # Matroska's comes with seeking
        if found < 0:
            return time > here + SEEK
        return float((index[found].timestamp - self.start) * self.stream.time_base) > here

    def _units(self, time: float) -> int:
        """Of the stream's time base, as its frames have them."""
        return self.start + int(time / self.stream.time_base)

    def _seek(self, time: float) -> None:
        for lead in LEADS:
            self.container.seek(self._units(max(0.0, time - lead)), stream=self.stream)
            self._frames, self._shown = self.container.decode(self.stream), None
            self._next = self._decoded()
            if self._next is not None and self.seconds(self._next) <= time + TOLERANCE:
                return
