"""A user's own pictures, for tests: drawings on plain grounds in all formats and sizes, and one that is broken."""

from pathlib import Path
from random import Random

from PIL import Image, ImageDraw

from dataset.emoji_world import GROUND_RGB, _font

THINGS = {"tea": "☕", "dog": "🐶", "apple": "🍎", "bicycle": "🚲", "key": "🔑", "tree": "🌳"}
ENDINGS = ("jpg", "png", "webp", "bmp", "gif")
BROKEN = "dog_01.png"


def draw_own_pictures(folder: Path, each: int = 15) -> None:
    """`each` pictures of every thing, named after it; BROKEN ends after 200 bytes."""
    folder.mkdir(parents=True)
    rng = Random(1)
    for name, character in THINGS.items():
        for number in range(each):
            _draw(character, rng).save(folder / f"{name}_{number:02d}.{ENDINGS[number % len(ENDINGS)]}")
    (folder / BROKEN).write_bytes((folder / BROKEN).read_bytes()[:200])


def _draw(character: str, rng: Random) -> Image.Image:
    """One thing, somewhere, turned, on a coloured ground; square, wide or tall."""
    side = rng.randint(80, 150)
    glyph = Image.new("RGBA", (2 * side, 2 * side))
    ImageDraw.Draw(glyph).text((side // 2, side // 2), character, font=_font(side), embedded_color=True)
    glyph = glyph.crop(glyph.getbbox()).rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC, expand=True)
    size = rng.choice(((224, 224), (320, 240), (240, 300)))
    picture = Image.new("RGB", size, rng.choice(GROUND_RGB))
    room = [max(0, whole - part) for whole, part in zip(size, glyph.size, strict=True)]
    picture.paste(glyph, tuple(rng.randint(0, free) for free in room), glyph)
    return picture
