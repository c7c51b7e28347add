"""A user's own pictures with captions, for tests: drawings in all formats and sizes, one of them broken; and stamps."""

from pathlib import Path
from random import Random

from PIL import Image, ImageDraw

from dataset.emoji_world import GROUND_RGB, _font

THINGS = {
    "tea": ("☕", "A cup of tea."),
    "dog": ("🐶", "Our dog Rex."),
    "apple": ("🍎", "An apple from the garden."),
    "bicycle": ("🚲", "The red bicycle."),
    "key": ("🔑", "The key of the shed."),
    "tree": ("🌳", "The old oak tree."),
}
ENDINGS = ("jpg", "png", "webp", "bmp", "gif")
BROKEN = "dog_01.png"


def draw_own_pictures(folder: Path, each: int = 15) -> None:
    """`each` pictures of every thing, named after it, a caption beside each; BROKEN ends after 200 bytes."""
    folder.mkdir(parents=True)
    rng = Random(1)
    for name, (character, caption) in THINGS.items():
        for number in range(each):
            picture = folder / f"{name}_{number:02d}.{ENDINGS[number % len(ENDINGS)]}"
            _draw(character, rng).save(picture)
            picture.with_suffix(".txt").write_text(f"{caption}\n", encoding="utf-8")
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


STAMPS = {  # by folder: names of the files, the captions in English and Chinese
    "animals/birds": (("owl", "An owl.", "猫头鹰。"), ("duck", "A duck.", "鸭子。"), ("pengwin", "Penguins win!", "")),
    "animals/mammals/cats": (("lion", "A lion.", "一个洋葱。"), ("lion-2", "A lion.", "一个洋葱。")),
    "animals/mammals": (
        ("pig", "A pig.", "一只猪。"),
        ("pig_golden", "A Tamworth pig.", ""),
        ("fox", "A fox.", "狐狸。"),
    ),
    "food/fruit": (("pear", "A yellow pear.", "一只梨。"), ("kiwi", "A kiwifruit (peeled).", "猕猴桃。")),
    "food/fruit/cartoon": (("banana", "A banana.", "香蕉。"), ("grapes", "Some grapes!", "葡萄。")),
    "vehicles": (("truck", "A truck.", "卡车。"), ("tractor", "A tractor.", ""), ("bus", "A bus.", "公交车。")),
    "vehicles/ship": (("tugboat", "A tugboat.", "拖船。"), ("tugboat_mirror", "", "")),
    "naturalforces": (("fire", "Fire! Fire! Fire!", "开火！"),),
}


def draw_stamps(folder: Path) -> int:
    """Stamps as Tux Paint's package lays them out, one of them an SVG alone; how many have a caption."""
    shapes = ("RGBA", "LA", "P")
    count = 0
    for place, stamps in STAMPS.items():
        (folder / place).mkdir(parents=True, exist_ok=True)
        for name, english, chinese in stamps:
            stamp = Image.new("RGBA", (40 + 9 * count, 60))
            ImageDraw.Draw(stamp).ellipse((4, 4, 30 + 8 * count, 50), (13 * count, 90, 200 - 9 * count, 255))
            stamp.convert(shapes[count % 3]).save(folder / place / f"{name}.png")
            lines = [english, "af.utf8='n Ding.", *([f"zh_CN.utf8={chinese}"] * bool(chinese)), "zh_TW.utf8=東西"]
            (folder / place / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            count += bool(english)
    (folder / "vehicles/sled.svg").write_text("<svg/>", encoding="utf-8")
    (folder / "vehicles/sled.txt").write_text("A sled.\n", encoding="utf-8")
    return count
