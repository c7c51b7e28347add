"""Four photographs that scikit-image brings, for the sheet: nothing like them is in the training data."""

import json
from collections.abc import Sequence
from pathlib import Path

from dataset.emoji_talks import conversation
from dataset.photographs import photographs

PHOTOGRAPHS = {  # by scikit-image's name: what is seen, and of what kind
    "chelsea": ("A cat.", "A mammal."),
    "coffee": ("A cup of coffee.", "A drink."),
    "astronaut": ("An astronaut.", "A person."),
    "rocket": ("A rocket.", "A thing in space."),
}


def write_photographs(folder: Path, questions: Sequence[str]) -> bool:
    """photographs.jsonl, both questions about each; False, and a line that says so, where scikit-image is missing."""
    try:
        pictures = photographs()
    except ImportError:
        print("scikit-image is not installed: no photographs on the sheet; `make real` brings it")
        return False
    lines = []
    for name, truths in PHOTOGRAPHS.items():
        pictures[name].save(folder / f"images/{name}.png")
        for question, truth in zip(questions, truths, strict=True):
            lines.append({"image": f"{name}.png", "conversations": conversation([(question, truth)], "<image>")})
    (folder / "photographs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return True
