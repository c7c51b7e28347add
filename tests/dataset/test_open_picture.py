"""Pictures as people have them: every mode becomes RGB as it should, and what cannot be used is refused."""

import io
import random
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from helpers.data import make_picture
from model.pictures import MAX_PIXELS, SampleError, open_picture

# Pictures that are opened


def opened(picture: Image.Image, path, **options) -> np.ndarray:
    """Through a file, as users' pictures come."""
    picture.save(path, **options)
    result = open_picture(path)
    assert result.mode == "RGB"
    return np.asarray(result)


def test_rgb_and_grey_are_as_they_were(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(opened(Image.fromarray(pixels), tmp_path / "a.png"), pixels)
    assert np.array_equal(opened(Image.fromarray(pixels), tmp_path / "a.bmp"), pixels)
    assert np.array_equal(opened(Image.fromarray(pixels), tmp_path / "a.webp", lossless=True), pixels)
    grey = pixels[..., 0]
    assert np.array_equal(opened(Image.fromarray(grey), tmp_path / "grey.png"), np.stack([grey] * 3, -1))
    assert np.array_equal(opened(Image.fromarray(grey), tmp_path / "grey.gif"), np.stack([grey] * 3, -1))
    bits = opened(Image.fromarray(grey > 127), tmp_path / "bits.png")
    assert np.array_equal(bits, np.stack([(grey > 127) * np.uint8(255)] * 3, -1))


@pytest.mark.parametrize("alpha", [0, 1, 100, 128, 254, 255])
def test_transparency_lies_on_white(tmp_path, alpha):
    for mode, colour in (("LA", (40,)), ("RGBA", (200, 40, 0))):
        picture = Image.new(mode, (2, 2), (*colour, alpha))
        wanted = [round((channel * alpha + 255 * (255 - alpha)) / 255) for channel in colour]
        found = opened(picture, tmp_path / f"{mode}.png")
        assert np.abs(found.astype(int) - wanted).max() <= 1
        if alpha in (0, 255):
            assert (found == wanted).all()


def palette_picture() -> Image.Image:
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 255, 0])
    picture.putdata([0, 1])
    return picture


def test_palette_transparency_lies_on_white(tmp_path):
    assert opened(palette_picture(), tmp_path / "a.png").tolist() == [[[255, 0, 0], [0, 255, 0]]]
    assert opened(palette_picture(), tmp_path / "b.png", transparency=0).tolist() == [[[255, 255, 255], [0, 255, 0]]]
    assert opened(palette_picture(), tmp_path / "c.gif", transparency=1).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    mixed = opened(palette_picture(), tmp_path / "d.png", transparency=bytes([255, 127])).tolist()
    assert mixed == [[[255, 0, 0], [128, 255, 128]]]


def test_one_transparent_colour_lies_on_white(tmp_path):
    picture = Image.new("RGB", (2, 1), (9, 8, 7))
    picture.putpixel((1, 0), (1, 2, 3))
    assert opened(picture, tmp_path / "a.png", transparency=(9, 8, 7)).tolist() == [[[255, 255, 255], [1, 2, 3]]]


def test_cmyk_becomes_rgb(tmp_path):
    picture = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    found = opened(picture, tmp_path / "a.jpg", quality=100)
    assert np.abs(found.astype(int) - [255, 0, 0]).max() <= 2


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 256, 257, 32768, 40000, 65535]], dtype=np.uint16)
    picture = Image.fromarray(values)
    assert picture.mode == "I;16"
    found = opened(picture, tmp_path / "a.png")
    assert found[..., 0].tolist() == [[0, 0, 1, 127, 155, 255]]
    assert (found == found[..., :1]).all()


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, lambda pixels: pixels),
        (2, np.fliplr),
        (3, lambda pixels: np.rot90(pixels, 2)),
        (4, np.flipud),
        (5, lambda pixels: pixels.swapaxes(0, 1)),
        (6, lambda pixels: np.rot90(pixels, -1)),
        (7, lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1)),
        (8, np.rot90),
    ],
)
def test_pictures_are_turned_as_their_exif_says(tmp_path, orientation, turned):
    pixels = np.random.default_rng(1).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(opened(Image.fromarray(pixels), tmp_path / "a.png", exif=exif), turned(pixels))
    transparent = np.dstack([pixels, np.full((2, 3), 255, dtype=np.uint8)])
    found = opened(Image.fromarray(transparent), tmp_path / "b.webp", exif=exif, lossless=True)
    assert np.array_equal(found, turned(pixels))


def test_one_pixel(tmp_path):
    assert opened(Image.new("RGB", (1, 1), (1, 2, 3)), tmp_path / "a.png").tolist() == [[[1, 2, 3]]]


def test_pictures_in_memory_are_treated_like_files():
    assert np.asarray(open_picture(Image.new("RGBA", (1, 1), (9, 9, 9, 0)))).tolist() == [[[255, 255, 255]]]
    sixteen = Image.fromarray(np.array([[257]], dtype=np.uint16))
    assert np.asarray(open_picture(sixteen)).tolist() == [[[1, 1, 1]]]


# Pictures that are refused


def png_header(width: int, height: int) -> bytes:
    """A PNG of any size in 57 bytes: its header is whole, its pixels are missing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def jpeg() -> bytes:
    buffer = io.BytesIO()
    make_picture(3, 64).save(buffer, "JPEG")
    return buffer.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n0 0 10 10 rectfill\nshowpage\n%%EOF\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.png", b""), ("page.jpg", b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
        ("drawing.png", EPS), ("drawing.jpg", b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
        ("start.jpg", jpeg()[:10]), ("zeros.png", bytes(1000)),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_refused_by_its_header(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    for decode in (True, False):
        with pytest.raises(SampleError, match="cannot be read as a picture .*replace it or delete the line"):
            open_picture(path, decode=decode)


def test_formats_that_run_other_programs_are_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "tiff.png", "TIFF")
    with pytest.raises(SampleError):
        open_picture(tmp_path / "tiff.png")


def test_a_missing_picture(tmp_path):
    with pytest.raises(SampleError, match="does not exist: check --images_path"):
        open_picture(tmp_path / "absent.png")
    with pytest.raises(SampleError, match="cannot be read"):
        open_picture(tmp_path)
    with pytest.raises(SampleError, match="cannot be read"):
        open_picture("a\0b.png")


def test_half_a_picture(tmp_path):
    for name, content in (("half.jpg", jpeg()), ("half.png", png_header(8, 8))):
        path = tmp_path / name
        path.write_bytes(content[: len(content) // 2] if name.endswith("jpg") else content)
        assert open_picture(path, decode=False).size  # its header is sound
        with pytest.raises(SampleError, match="cannot be read as a picture"):
            open_picture(path)


@pytest.mark.parametrize("size", [(5001, 5000), (1, 25_000_001), (10_000, 10_000), (100_000, 100_000)])
def test_too_many_pixels_are_refused_by_the_header(tmp_path, size):
    path = tmp_path / "large.png"
    path.write_bytes(png_header(*size))
    started = time.perf_counter()
    for decode in (True, False):
        with warnings.catch_warnings(), pytest.raises(SampleError, match=f"more than {MAX_PIXELS:,}|pixels. exceeds"):
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            open_picture(path, decode=decode)
    assert time.perf_counter() - started < 1


def test_as_many_pixels_as_allowed(tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(png_header(5000, 5000))
    assert open_picture(path, decode=False).size == (5000, 5000)


def test_damaged_pictures_never_raise_anything_else():
    """Bytes changed at random: a picture or a SampleError, never an error of the decoder's own."""
    rng = random.Random(0)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a cat"
    sound = []
    for picture_format in ("JPEG", "PNG", "WEBP", "BMP", "GIF"):
        buffer = io.BytesIO()
        options = {"exif": exif} if picture_format in ("JPEG", "PNG", "WEBP") else {}
        make_picture(4, 24).save(buffer, picture_format, **options)
        sound.append(buffer.getvalue())
    outcomes = {"picture": 0, "refused": 0}
    for _ in range(1500):
        damaged = bytearray(rng.choice(sound))
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(min(len(damaged), rng.choice((100, 300, 10**6))))
            if rng.random() < 0.8:
                damaged[place] = rng.randrange(256)
            else:
                del damaged[place : place + rng.randint(1, 20)]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcomes["picture"] += open_picture(io.BytesIO(bytes(damaged))).mode == "RGB"
        except SampleError:
            outcomes["refused"] += 1
    assert sum(outcomes.values()) == 1500
    assert min(outcomes.values()) > 100
