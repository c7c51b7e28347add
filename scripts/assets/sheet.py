"""Draw scenes with questions, answers and truths on one picture, right and wrong ones alike."""

import contextlib
import functools
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from model.processing import open_picture

CELL, MARGIN, LINE, FONT_SIZE = 240, 16, 17, 13  # pixels
COLUMNS, ROWS = 4, 3
GREEN, RED, BLACK, GREY = (0, 110, 50), (190, 20, 20), (30, 30, 30), (120, 120, 120)
TYPOGRAPHY = str.maketrans("—–‘’“”", "--''\"\"")  # Pillow's own font draws boxes for some of these
# It has no Chinese either; where the machine has one of these, Chinese questions are drawn too.
CHINESE_FONTS = (
    "NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "msyh.ttc", "simhei.ttf",
)  # fmt: skip


def draw_sheet(records: Sequence[dict], path: Path, credit: str = "") -> None:
    """The first pictures of the records, each with up to three of its questions.

    records: as scripts/score.py writes them (pictures, paths or bytes; question, right, truth). Pictures are taken in
    order, not by whether the answers are right. credit: whose pictures they are, a line at the bottom.
    """
    font, chinese = ImageFont.load_default(FONT_SIZE), chinese_font()
    scenes: dict[str | Path | bytes, list[dict]] = {}
    for record in records:
        if record["pictures"] and (chinese or not _is_chinese(record)):
            scenes.setdefault(record["pictures"][0], []).append(record)
    shown = [(picture, questions[:3]) for picture, questions in list(scenes.items())[: COLUMNS * ROWS]]
    height = CELL + max((len(questions) for _, questions in shown), default=0) * 3 * LINE + MARGIN
    width = COLUMNS * (CELL + MARGIN) + MARGIN
    rows = -(-len(shown) // COLUMNS)
    sheet = Image.new("RGB", (width, MARGIN + rows * height + 3 * LINE), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, questions) in enumerate(shown):
        x = MARGIN + number % COLUMNS * (CELL + MARGIN)
        y = MARGIN + number // COLUMNS * height
        sheet.paste(
            open_picture(io.BytesIO(picture) if isinstance(picture, bytes) else picture).resize((CELL, CELL)), (x, y)
        )
        y += CELL + 6
        for record in questions:
            right = record["right"] == record["truth"]
            face = chinese if _is_chinese(record) else font
            draw.text((x, y), _fit(record["question"], face), BLACK, face)
            draw.text((x, y + LINE), _fit(record["right"] or "(nothing)", face), GREEN if right else RED, face)
            if not right:
                draw.text((x, y + 2 * LINE), _fit(f"truth: {record['truth']}", face), GREY, face)
            y += LINE * (2 if right else 3) + 4
    note = "green: exactly right, red: wrong. The first pictures in order, none left out."
    if not chinese:
        note += " Chinese questions need a Chinese font; see score.py --answers."
    draw.text((MARGIN, sheet.height - 2 * LINE - 6), note, GREY, font)
    draw.text((MARGIN, sheet.height - LINE - 6), credit, GREY, font)
    sheet.save(path)


def _is_chinese(record: dict) -> bool:
    return any(letter >= "\u2e80" for name in ("question", "right", "truth") for letter in record[name] or "")


@functools.cache
def chinese_font() -> ImageFont.FreeTypeFont | None:
    """Of FONT_SIZE; None where the machine has none."""
    for name in CHINESE_FONTS:
        with contextlib.suppress(OSError):  # not on this machine: the next
            return ImageFont.truetype(name, FONT_SIZE)
    return None


def _fit(text: str, font: ImageFont.FreeTypeFont) -> str:
    text = text.translate(TYPOGRAPHY)
    while font.getlength(text) > CELL and len(text) > 1:
        text = text[:-2].rstrip("…") + "…"
    return text
