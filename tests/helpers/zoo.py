"""Bad input of many kinds: lines of a JSON-lines file and pictures, each with a piece of the reason for refusing it."""

import functools
import json
import os
import struct
import zlib
from pathlib import Path

from PIL import Image, PngImagePlugin

from dataset.quarantine import Quarantine
from helpers.data import TURNS, encoded, make_picture

LONGEST = 900_000  # bytes of a line, in place of dataset.readers.json_lines.MAX_LINE


def turns(question: object = "What?", answer: object = "a cat", role: object = "user") -> dict:
    return {"conversations": [{"role": role, "content": question}, {"role": "assistant", "content": answer}]}


def with_picture(name: object) -> dict:
    return {"image": name, "conversations": TURNS}


NO_JSON, NO_OBJECT, NO_LIST, NO_TEXT = "is no JSON", "must be an object", "must be a list", "'content' must be text"
SOUND_LINE = json.dumps(turns())

LINES: dict[str, tuple[object, str]] = {
    "words": ("nonsense", NO_JSON),
    "cut": ('{"conversations": [{"role": "user", "con', NO_JSON),
    "cut in an escape": ('{"text": "\\u00', NO_JSON),
    "a list": ("[1, 2]", NO_OBJECT),
    "a text": ('"text"', NO_OBJECT),
    "null": ("null", NO_OBJECT),
    "a number": ("3", NO_OBJECT),
    "100,000 deep": ("[" * 100_000, NO_JSON),
    "900 deep": ('{"conversations": ' + "[" * 900 + "]" * 900 + "}", "conversations"),
    "5,000 digits": ('{"text": ' + "9" * 5000 + "}", NO_JSON),
    "NaN": ('{"text": "a cat", "score": NaN}', "NaN is no JSON number"),
    "minus infinity": ('{"text": "a cat", "score": -Infinity}', "-Infinity is no JSON number"),
    "a name twice": ('{"text": "a cat", "text": "a dog"}', "'text' stands twice"),
    "a name twice in a message": ('{"conversations": [{"role": "user", "role": "system", "content": "x"}]}', "twice"),
    "latin-1": ('{"text": "é"}'.encode("latin-1"), NO_JSON),
    "utf-16": (SOUND_LINE.encode("utf-16-le"), NO_JSON),
    "a surrogate in utf-8": (b'{"text": "\xed\xa0\x80"}', NO_JSON),
    "a byte order mark": (b"\xef\xbb\xbf" + SOUND_LINE.encode(), NO_JSON),
    "single quotes": ("{'text': 'a cat'}", NO_JSON),
    "a trailing comma": ('{"text": "a cat",}', NO_JSON),
    "two objects": (SOUND_LINE + SOUND_LINE, NO_JSON),
    "a raw tab": ('{"text": "a\tcat"}', NO_JSON),
    "zeros": (bytes(300), NO_JSON),
    "a terminal's escapes": ("\x1b[2J\x1b]0;owned\x07", NO_JSON),
    "too long a line": ('{"text": "' + "a" * LONGEST + '"}', f"more than {LONGEST:,}"),
    "50,000 names, one of them twice": ("{" + ", ".join(f'"{n % 49_999}": 0' for n in range(50_000)) + "}", "twice"),
    "nothing": ({}, NO_LIST),
    "other names": ({"messages": TURNS}, NO_LIST),
    "no turns": ({"conversations": []}, NO_LIST),
    "turns as text": ({"conversations": json.dumps(TURNS)}, NO_LIST),
    "turns as an object": ({"conversations": TURNS[0]}, NO_LIST),
    "turns of text": ({"conversations": ["What?", "a cat"]}, NO_LIST),
    "no content": ({"conversations": [{"role": "user"}]}, NO_TEXT),
    "content null": (turns(None), NO_TEXT),
    "content a number": (turns(3), NO_TEXT),
    "content parts": (turns([{"type": "text", "text": "x"}]), NO_TEXT),
    "unknown role": (turns(role="robot"), "needs a role"),
    "no role": ({"conversations": [{"content": "x"}]}, "needs a role"),
    "role a list": (turns(role=["user"]), "needs a role"),
    "empty text": ({"text": ""}, "'text' must be text"),
    "text null": ({"text": None}, "'text' must be text"),
    "text a number": ({"text": 3}, "'text' must be text"),
    "a text with a picture": ({"text": "a cat", "image": "a.png"}, "'image' names 1: delete 'image', or give"),
    "half a pair in a question": (turns("\ud83d"), "surrogate"),
    "half a pair in an answer": (turns(answer="\udc00 cat"), "surrogate"),
    "half a pair in a text": ({"text": "\udfff"}, "surrogate"),
    "no tag": ({"image": "a.png", **turns()}, "0 <image>"),
    "no picture": (turns("<image>"), "0 pictures"),
    "more tags": ({"image": "a.png", **turns("<image><image>")}, "2 <image>"),
    "fewer tags": ({"image": ["a.png", "b.png"], **turns("<image>")}, "2 pictures"),
    "a tag in the answer": ({"image": "a.png", **turns("<image>", "<image>")}, "2 <image>"),
    "1,001 pictures": ({"image": ["a.png"] * 1001, **turns("<image>" * 1001)}, "1,001 pictures, more than 1,000"),
    "an empty name": (with_picture("a.png,"), "must be a file name"),
    "name a number": (with_picture(7), "must be a file name"),
    "name true": (with_picture(True), "must be a file name"),
    "names numbers": (with_picture([7]), "must be a file name"),
    "name an object": (with_picture({"path": "a.png"}), "must be a file name"),
    "parent": (with_picture("../outside.png"), "lies outside"),
    "parent by a detour": (with_picture("deep/../../outside.png"), "lies outside"),
    "a sibling that begins alike": (with_picture("../images_too/a.png"), "lies outside"),
    "absolute": (with_picture("/etc/passwd"), "lies outside"),
    "a device": (with_picture("/dev/zero"), "lies outside"),
    "a link outwards": (with_picture("out.png"), "lies outside"),
    "a folder's link outwards": (with_picture("outdoors/outside.png"), "lies outside"),
    "a link to a device": (with_picture("zero.png"), "lies outside"),
    "home": (with_picture("~/a.png"), "does not exist"),
    "https": (with_picture("https://example.com/a.png"), "is an address"),
    "file address": (with_picture("file:///etc/passwd"), "is an address"),
    "zero byte": (with_picture(["a\0.png"]), "no file can be called"),
    "too long a name": (with_picture("x" * 300 + ".png"), "no file can be called"),
    "surrogate name": (with_picture(["\ud800.png"]), "no file can be called"),
    "links in a circle": (with_picture("loop.png"), ""),
    "a pipe": (with_picture("pipe.png"), "no regular file"),
    "a link to a pipe": (with_picture("to_pipe.png"), "no regular file"),
    "a folder": (with_picture("deep"), "no regular file"),
    "a file as a folder": (with_picture("a.png/b.png"), "cannot be read"),
    "absent": (with_picture("absent.png"), "does not exist"),
    "a name with escapes": (with_picture("\x1b[2J.png"), "does not exist"),
}  # fmt: skip


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, before: bytes = b"", pixels: bool = False) -> bytes:
    """A black PNG of any size; without `pixels` only its header is whole."""
    packer, row = zlib.compressobj(), bytes(1 + width)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush() if pixels else b""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@functools.cache
def bad_pictures() -> dict[str, tuple[bytes, str]]:
    """Content by name. All are called .png or .jpg, whatever they are."""
    noise = make_picture(1, 64)
    jpeg, small = encoded(noise, "JPEG"), encoded(noise, "PNG")
    no_picture = "cannot be read as a picture"
    text_bomb = chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(20_000_000)))
    broken = {
        "empty.png": b"", "page.jpg": b"<!DOCTYPE html><html>404</html>", "words.png": b"a cat",
        "zeros.png": bytes(999), "start.jpg": jpeg[:10],
        "half.jpg": jpeg[: len(jpeg) // 2], "half.png": small[: len(small) // 2],
        "half_webp.png": encoded(noise, "WEBP")[:200], "half_gif.png": encoded(noise, "GIF")[:400],
        "half_bmp.png": encoded(noise, "BMP")[:500], "no_pixels.png": png(8, 8), "bad_sum.png": flipped(small, 20),
        "drawing.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        "vector.png": b'<svg xmlns="http://www.w3.org/2000/svg"/>', "tiff.png": encoded(noise, "TIFF"),
        "pdf.jpg": encoded(noise, "PDF"), "icon.png": encoded(noise, "ICO"), "zip.png": b"PK\x03\x04" + bytes(99),
        "text_bomb.png": png(8, 8, before=text_bomb, pixels=True), "huge.png": png(100_000, 100_000),
    }  # fmt: skip
    by_size = {
        "bomb.png": (png(9400, 9400, pixels=True), "more than 25,000,000"),
        "square.png": (png(65535, 65535), ""),  # refused by Pillow itself
        "strip.png": (png(60_000, 1), "a side of more than"),
        "pole.png": (png(1, 16_384), "too long and thin"),
        "ribbon.jpg": (encoded(Image.new("RGB", (4020, 20)), "JPEG"), "too long and thin"),
    }
    return {**{name: (content, no_picture) for name, content in broken.items()}, **by_size}


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def odd_pictures() -> dict[str, tuple[bytes, tuple[int, int, int]]]:
    """What is unusual and sound: content and the colour of its left upper corner."""
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    corner = Image.new("RGB", (16, 16), (0, 0, 255))
    corner.paste((255, 0, 0), (8, 8, 16, 16))
    frames = [Image.new("P", (8, 8), number % 2) for number in range(200)]
    for frame in frames:
        frame.putpalette([0, 255, 0, 9, 9, 9])
    note = PngImagePlugin.PngInfo()
    note.add_text("note", "a cat")
    return {
        "one.png": (encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"), (1, 2, 3)),
        "thin.png": (encoded(Image.new("RGB", (1, 200), (1, 2, 3)), "PNG"), (1, 2, 3)),
        "png.jpg": (encoded(Image.new("RGB", (4, 4), (9, 8, 7)), "PNG"), (9, 8, 7)),
        "bits.png": (encoded(Image.new("1", (4, 4), 1), "PNG"), (255, 255, 255)),
        "grey.png": (encoded(Image.new("L", (4, 4), 77), "PNG"), (77, 77, 77)),
        "clear_grey.png": (encoded(Image.new("LA", (4, 4), (77, 0)), "PNG"), (255, 255, 255)),
        "clear.png": (encoded(Image.new("RGBA", (4, 4), (9, 9, 9, 0)), "PNG"), (255, 255, 255)),
        "clear.webp": (encoded(Image.new("RGBA", (4, 4), (9, 9, 9, 0)), "WEBP", lossless=True), (255, 255, 255)),
        "sixteen.png": (encoded(Image.new("I;16", (4, 4), 257 * 77), "PNG"), (77, 77, 77)),
        "cmyk.jpg": (encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100), (254, 0, 0)),
        "turned.png": (encoded(corner, "PNG", exif=turned), (255, 0, 0)),
        "frames.gif": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), (0, 255, 0)),
        "note.png": (encoded(Image.new("RGB", (4, 4), (9, 8, 7)), "PNG", pnginfo=note), (9, 8, 7)),
    }


def make_zoo(folder: Path) -> list[tuple[str, bytes, str]]:
    """Put the pictures into folder/images and what lies around it; (kind, line, reason) of every bad sample."""
    images = folder / "images"
    (images / "deep").mkdir(parents=True)
    (folder / "images_too").mkdir()
    for number, path in enumerate((images / "a.png", images / "b.png", folder / "outside.png")):
        make_picture(number).save(path)
    make_picture(3).save(folder / "images_too" / "a.png")
    links = {"out.png": folder / "outside.png", "outdoors": folder, "zero.png": "/dev/zero", "loop.png": "loop.png"}
    for name, target in {**links, "to_pipe.png": "pipe.png"}.items():
        (images / name).symlink_to(target)
    os.mkfifo(images / "pipe.png")
    pictures = bad_pictures()
    for name, (content, _) in pictures.items():
        (images / name).write_bytes(content)
    kinds = {**LINES, **{name: (with_picture(name), reason) for name, (_, reason) in pictures.items()}}
    return [(kind, as_bytes(line), reason) for kind, (line, reason) in kinds.items()]


def as_bytes(line: object) -> bytes:
    if isinstance(line, dict):
        line = json.dumps(line)
    return line if isinstance(line, bytes) else line.encode()


def lenient(path: Path | None = None, max_share: float = 1.0) -> Quarantine:
    return Quarantine(path, strict=False, max_share=max_share)


def write_lines(path: Path, lines: list[bytes]) -> Path:
    path.write_bytes(b"\n".join(lines))  # the last has no end
    return path
