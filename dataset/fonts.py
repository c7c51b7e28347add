"""Fonts for words that are drawn on pictures and beside them."""

import contextlib
import functools

from PIL import ImageFont

# Pillow's own font has no Chinese; where the machine has one of these, it is drawn too.
CHINESE_FONTS = (
    "NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "msyh.ttc", "simhei.ttf",
)  # fmt: skip


@functools.cache
def chinese_font(size: int) -> ImageFont.FreeTypeFont | None:
    """None where the machine has none. size: pixels."""
    for name in CHINESE_FONTS:
        with contextlib.suppress(OSError):  # not on this machine: the next
            return ImageFont.truetype(name, size)
    return None


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont | None:
    """One that has the letters of this text; None where the machine has none. size: pixels."""
    return ImageFont.load_default(size) if text.isascii() else chinese_font(size)
