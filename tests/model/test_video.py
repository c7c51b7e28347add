"""Videos, written here: the frames shown at given times, whatever the file, and what cannot be used is refused."""

import io
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from helpers.videos import frame_number, make_video, numbered
from model import video
from model.messages import UserError
from model.pictures import MAX_PIXELS, SampleError
from model.video import frame_times, read_frames, time_labels

av = pytest.importorskip("av", reason="videos are read with the package av: pip install -r requirements/video.txt")

# Frames that are read


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.webm", "a.avi", "a.ts"])
def test_each_time_has_the_frame_that_a_player_shows(tmp_path, name):
    """120 numbered frames, 10 a second, in groups of 12: from a file and from bytes, near and far apart."""
    path = make_video(tmp_path / name, numbered(120), rate=10, group=12)
    assert frame_times(path, 4) == pytest.approx((1.5, 4.5, 7.5, 10.5), abs=0.11)
    for times in ((0.05, 0.15, 0.25, 3.05, 3.15, 11.95), (1.55, 4.55, 7.55, 10.55), (11.05,), (0.0, 11.9)):
        wanted = [int(at * 10 + 1e-6) for at in times]
        for source in (path, path.read_bytes()):
            assert [frame_number(picture) for picture in read_frames(source, times)] == wanted, name


def test_a_frame_is_shown_until_the_next_one_begins(tmp_path):
    """Of a screen that was recorded where it changed: frames at 0, 4, 4.5 and 9 seconds."""
    path = make_video(tmp_path / "a.mp4", numbered(4), rate=2, at=(0, 8, 9, 18), group=1)
    shown = read_frames(path, (0, 3.9, 4.0, 4.4, 4.6, 8.9, 9.0, 9.4))
    assert [frame_number(picture) for picture in shown] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_video_that_does_not_begin_at_zero(tmp_path):
    path = make_video(tmp_path / "a.mkv", numbered(20), rate=10, at=range(50, 70))
    assert [frame_number(picture) for picture in read_frames(path, (0.05, 1.05))] in ([0, 10], [0, 0])
    path = make_video(tmp_path / "a.ts", numbered(20), rate=10, at=range(50, 70))
    assert [frame_number(picture) for picture in read_frames(path, (0.05, 1.05))] == [0, 10]


def test_times_lie_in_the_middles_of_equal_parts(tmp_path):
    path = make_video(tmp_path / "a.mp4", numbered(8), rate=1)
    assert frame_times(path, 8) == (0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5)
    assert frame_times(path, 2) == (2.0, 6.0) and frame_times(path, 1) == (4.0,)
    assert [frame_number(picture) for picture in read_frames(path, frame_times(path, 8))] == list(range(8))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_no_more_frames_than_there_are(tmp_path, name):
    path = make_video(tmp_path / name, numbered(3), rate=5)
    times = frame_times(path, 100)
    assert len(times) == 3
    assert [frame_number(picture) for picture in read_frames(path, times)] == [0, 1, 2]
    assert len(frame_times(make_video(tmp_path / f"one_{name}", numbered(1), rate=5), 8)) == 1


@pytest.mark.parametrize("turned", [0, 90, 180, -90])
def test_frames_are_turned_as_the_video_says(tmp_path, turned):
    """A telephone held upright writes frames that lie on their side, and how to turn them."""
    upright = Image.new("RGB", (64, 32), "black")
    upright.paste("red", (0, 0, 16, 16))  # at the top left
    stored = upright.rotate(-turned, expand=True)
    path = make_video(tmp_path / "a.mp4", [stored] * 3, rotation=turned)
    (shown,) = read_frames(path, (0.0,))
    assert shown.size == (64, 32) and shown.mode == "RGB"
    assert shown.getpixel((6, 6))[0] > 150 and max(shown.getpixel((58, 26))) < 60


def test_far_times_are_sought(tmp_path, monkeypatch):
    """Of 600 frames in groups of 10, four far times decode a group each."""
    decoded = []
    original = video._Cursor._decoded
    monkeypatch.setattr(video._Cursor, "_decoded", lambda self: decoded.append(1) or original(self))
    for name, most in (("a.mp4", 60), ("a.mkv", 60), ("a.ts", 600)):
        path = make_video(tmp_path / name, numbered(600), rate=10, group=10)
        decoded.clear()
        times = (5.05, 20.05, 40.05, 59.05)
        assert [frame_number(picture) for picture in read_frames(path, times)] == [50, 200, 400, 590]
        assert len(decoded) <= most, name


def test_what_cannot_be_sought_in_is_not_decoded_for_ever(tmp_path, monkeypatch):
    path = make_video(tmp_path / "a.mp4", numbered(120), rate=10, group=1000)
    monkeypatch.setattr(video, "MAX_DECODED", 60)
    assert [frame_number(picture) for picture in read_frames(path, (0.05, 5.05))] == [0, 50]
    with pytest.raises(SampleError, match="cannot be sought in: 60 frames were not enough to get there: convert it"):
        list(read_frames(path, (0.05, 10.05)))


def test_frames_come_one_by_one(tmp_path):
    frames = read_frames(make_video(tmp_path / "a.mp4", numbered(50)), (0.0, 1.0))
    assert frame_number(next(frames)) == 0
    frames.close()  # and nobody is left with an open file


@pytest.mark.parametrize(
    ("times", "labels"),
    [
        ((0.5, 1.5, 61.5), ["0:00", "0:01", "1:01"]),
        ((0.25, 0.75, 1.25), ["0:00.2", "0:00.7", "0:01.2"]),
        ((0.01, 0.02), ["0:00.01", "0:00.02"]),
        ((59.9, 3600.0, 7325.0), ["0:59", "1:00:00", "2:02:05"]),
        ((2.999999999,), ["0:03"]), ((), []),
    ],
)  # fmt: skip
def test_labels_differ_in_few_letters(times, labels):
    assert time_labels(times) == labels


# Videos that are refused


def refused(source: object, reason: str, reads: bool = False) -> None:
    """By the header, or where `reads` only once frames are read."""
    if reads:
        assert frame_times(source, 4)
    else:
        with pytest.raises(SampleError, match=reason):
            frame_times(source, 4)
    with pytest.raises(SampleError, match=reason):
        list(read_frames(source, (0.0, 0.5, 1.9)))


@pytest.mark.parametrize(
    "content", [b"", b"<!DOCTYPE html><html>404 Not Found</html>", bytes(5000), b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom"]
)
def test_what_is_no_video(tmp_path, content):
    refused(content, "cannot be read as a video .*: convert it")
    (tmp_path / "a.mp4").write_bytes(content)
    refused(tmp_path / "a.mp4", "cannot be read as a video")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
def test_a_picture_with_the_name_of_a_video(tmp_path, kind):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.mp4", kind)
    refused(tmp_path / "a.mp4", "it is a picture and no video: name it in `image`")


def test_files_that_are_not_there_or_not_given(tmp_path, monkeypatch):
    refused(tmp_path / "absent.mp4", "the file does not exist")
    refused(tmp_path, "cannot be read")

    class Failing(io.BytesIO):
        def read(self, *_: object) -> bytes:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(video, "open", lambda *_: Failing(b"x"), raising=False)
    refused(tmp_path / "a.mp4", "no fault of the")


def test_sound_alone(tmp_path):
    refused(make_sound(tmp_path / "a.mp4"), "no pictures, only sound")


def make_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        frame.rate = 8000
        container.mux([*stream.encode(frame), *stream.encode()])
    return path


def test_a_video_with_sound(tmp_path):
    path = make_video(tmp_path / "a.mp4", numbered(20), rate=10, sound=True)
    assert frame_times(path, 2) == pytest.approx((0.5, 1.5))
    assert [frame_number(picture) for picture in read_frames(path, (0.55, 1.55))] == [5, 15]


def test_no_end(tmp_path):
    """A stream that goes on has no duration in its header."""
    buffer = io.BytesIO()
    buffer.seekable = lambda: False  # a live stream's writer cannot go back to the header
    make_video(buffer, numbered(20), container="matroska", options={"live": "1"})
    refused(buffer.getvalue(), "does not say how long it is.*convert it")


def test_an_absurd_duration(tmp_path):
    path = make_video(tmp_path / "a.mp4", numbered(2), rate=1, at=(0, 90_000))
    refused(path, "claims to last 25 hours, more than 24")


def test_no_frames(tmp_path):
    """A header whose every frame has been cut away, or was never written."""
    path = make_video(tmp_path / "a.mp4", numbered(20), options={"movflags": "faststart"})
    content = path.read_bytes()
    refused(content[: content.index(b"mdat") + 4], "no frame|cut short|cannot be read", reads=True)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
@pytest.mark.parametrize("share", [0.4, 0.7])
def test_half_a_video_fails_when_it_is_read(tmp_path, name, share):
    options = {"movflags": "faststart"} if name == "a.mp4" else {}
    content = make_video(tmp_path / name, numbered(200, noise=True), 10, 10, options=options).read_bytes()
    cut = content[: int(len(content) * share)]
    if name == "a.ts":  # which has no header: what is left is a shorter video
        times = frame_times(cut, 4)
        assert 20 * share - 2 < times[-1] + times[0] < 20 * share + 2
        assert all(abs(frame_number(p) - t * 10) < 2 for p, t in zip(read_frames(cut, times), times, strict=True))
        return
    frames = read_frames(cut, frame_times(cut, 8))
    assert frame_number(next(frames)) == 12  # the beginning is there
    with pytest.raises(SampleError, match="cut short|cannot be read"):
        list(frames)


def test_half_a_video_whose_header_stands_at_its_end(tmp_path):
    content = make_video(tmp_path / "a.mp4", numbered(50)).read_bytes()
    refused(content[: len(content) // 2], "cannot be read as a video")


def test_frames_that_are_too_large(tmp_path):
    """By the header, at once; and where the header lies, by the frames."""
    path = make_video(tmp_path / "a.mp4", [Image.new("RGB", (8192, 4096))])
    started = time.perf_counter()
    refused(path, f"8192 x 4096 pixels, more than {MAX_PIXELS:,}")
    assert time.perf_counter() - started < 1
    content = path.read_bytes()
    place = content.index(b"avc1", content.index(b"stsd")) + 28  # of width and height
    assert content[place : place + 4] == (8192).to_bytes(2, "big") + (4096).to_bytes(2, "big")
    content = content[:place] + (64).to_bytes(2, "big") * 2 + content[place + 4 :]
    with pytest.raises(SampleError, match="pixels|cannot be read"):
        list(read_frames(content, (0.0,)))


def test_a_codec_that_is_not_read(tmp_path):
    path = make_video(tmp_path / "a.avi", numbered(5), codec="ffv1")
    refused(path, "packed with ffv1, which is not read here: convert it, `ffmpeg")


PLAYLISTS = {
    "concat": "ffconcat version 1.0\nfile {path}\nduration 2\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{path}\n#EXT-X-ENDLIST\n",
    "hls_file": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile://{path}\n#EXT-X-ENDLIST\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><BaseURL>{path}</BaseURL>'
    "</MPD>",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_lists_of_other_files_are_not_followed(tmp_path, kind, monkeypatch):
    """FFmpeg would open what they name; the first of these plays where nothing forbids it."""
    inner = make_video(tmp_path / "inner.ts", numbered(20), rate=10)
    content = PLAYLISTS[kind].format(path=inner.name if kind == "concat" else inner).encode()
    for name in ("a.mp4", "a.m3u8", "a.ffconcat", "a.sdp", "a.mpd"):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "cannot be read as a video")
    monkeypatch.chdir(tmp_path)
    refused(content, "cannot be read as a video")
    if kind == "concat":
        with av.open(io.BytesIO(content)) as followed:  # so that this test would see a hole
            assert next(followed.decode(video=0)).width


def test_damaged_videos_never_raise_anything_else(tmp_path):
    """Bytes changed at random: frames or a SampleError, never an error of the decoder's own, and soon."""
    rng = random.Random(0)
    sound = [
        make_video(tmp_path / name, numbered(12), rate=4, group=4).read_bytes()
        for name in ("a.mp4", "a.mkv", "a.avi", "a.ts")
    ]
    outcomes = {"frames": 0, "refused": 0}
    for _ in range(300):
        damaged = bytearray(rng.choice(sound))
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(min(len(damaged), rng.choice((200, 10**6))))
            if rng.random() < 0.7:
                damaged[place] = rng.randrange(256)
            else:
                del damaged[place : place + rng.randint(1, 200)]
        try:
            pictures = list(read_frames(bytes(damaged), frame_times(bytes(damaged), 3)))
            outcomes["frames"] += all(picture.mode == "RGB" for picture in pictures)
        except SampleError:
            outcomes["refused"] += 1
    assert sum(outcomes.values()) == 300
    assert min(outcomes.values()) > 30


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"pip install -r requirements/video.txt$") as raised:
        frame_times(tmp_path / "a.mp4", 8)
    assert "\n" not in str(raised.value)


def test_the_package_is_imported_only_where_a_video_is_read():
    code = "import sys, model.video; sys.exit('av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
