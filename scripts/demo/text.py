"""What the browser demo says, in English and Chinese: the sentences of text.json."""

import json
from pathlib import Path

from model.pictures import MAX_PIXELS
from scripts.demo import limits

LANGUAGES = {"zh": "中文", "en": "English"}
TEXT = json.loads(Path(__file__).with_name("text.json").read_text(encoding="utf-8"))
LIMITS = {
    "pixels": MAX_PIXELS // 1_000_000,
    "megabytes": limits.MAX_BYTES // 1024**2,
    "pictures": limits.MAX_PICTURES,
    "pictures_in_all": limits.MAX_PICTURES_IN_ALL,
    "characters": limits.MAX_CHARACTERS,
    "seconds": round(limits.MAX_SECONDS),
    "waiting": limits.MAX_WAITING,
}


def translate(language: str, key: str, **values: object) -> str:
    """The text of a key. language: a key of LANGUAGES; values: what stands in its braces, beside the limits."""
    return TEXT[key][language].format(**{**LIMITS, **values})
