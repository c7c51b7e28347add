"""Draw scenes with questions, answers and truths on one picture, right and wrong ones alike."""

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dataset.box_drawing import draw_boxes
from dataset.boxes import boxes_in
from dataset.exam.box_scores import FOUND, is_found
from dataset.fonts import chinese_font
from model.pictures import open_picture
from model.video import is_video, open_video
from model.views import FRAMES

CELL, MARGIN, LINE, GAP, FONT_SIZE = 264, 16, 17, 4, 13  # pixels
FRAME_GAP = 3  # pixels between a video's frames
COLUMNS, ROWS, QUESTIONS = 4, 3, 3  # of the sheet; and of each picture, at most
GREEN, RED, BLACK, GREY = (0, 110, 50), (190, 20, 20), (30, 30, 30), (120, 120, 120)
TYPOGRAPHY = str.maketrans("—–‘’“”", "--''\"\"")  # Pillow's own font draws boxes for some of these


def draw_sheet(records: Sequence[dict], path: Path, credit: str = "") -> None:
    """Pictures of the records, each with up to three of its questions: see choose; and with the boxes of an answer.

    records: as scripts/score.py writes them (pictures, paths or bytes; kind, language, question, right, truth).
    credit: whose pictures they are, a line at the bottom.
    """
    chinese = chinese_font(FONT_SIZE)
    shown = choose([record for record in records if record["pictures"] and (chinese or not _is_chinese(record))])
    height = CELL + max((len(questions) for _, questions in shown), default=0) * (3 * LINE + GAP) + 6 + MARGIN
    width = COLUMNS * (CELL + MARGIN) + MARGIN
    rows = -(-len(shown) // COLUMNS)
    sheet = Image.new("RGB", (width, MARGIN + rows * height + 3 * LINE), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, questions) in enumerate(shown):
        x = MARGIN + number % COLUMNS * (CELL + MARGIN)
        y = MARGIN + number // COLUMNS * height
        cell = _cell(picture)
        most = max((record["right"] for record in questions if "iou" in record), key=_count_boxes, default="")
        sheet.paste(draw_boxes(cell, most, CELL) or cell, (x, y))
        y += CELL + 6
        for record in questions:
            y = _draw_question(draw, (x, y), record)
    font = ImageFont.load_default(FONT_SIZE)
    right = f"IoU of {FOUND} and more" if any("iou" in record for record in records) else "exactly right"
    note = f"green: {right}, red: wrong. Taken in order, each time of the kind and language that stand here least."
    if not chinese:
        note += " Chinese questions need a Chinese font; see score.py --answers."
    draw.text((MARGIN, sheet.height - 2 * LINE - 6), note, GREY, font)
    draw.text((MARGIN, sheet.height - LINE - 6), credit, GREY, font)
    sheet.save(path)


def _cell(picture: str | Path | bytes) -> Image.Image:
    """A picture that fills the cell, or a video's frames, COLUMNS in a row, apart and at the bottom of it."""
    source = Path(picture) if isinstance(picture, str) else picture
    if not is_video(source):
        return open_picture(io.BytesIO(source) if isinstance(source, bytes) else source).resize((CELL, CELL))
    side, cell = CELL // COLUMNS, Image.new("RGB", (CELL, CELL), "white")
    frames = open_video(source, FRAMES).pictures
    top = CELL - -(-len(frames) // COLUMNS) * side
    for place, frame in enumerate(frames):
        corner = (place % COLUMNS * side, top + place // COLUMNS * side)
        cell.paste(frame.resize((side - FRAME_GAP, side - FRAME_GAP)), corner)
    return cell


def choose(records: Sequence[dict]) -> list[tuple[str | Path | bytes, list[dict]]]:
    """As many pictures as the sheet has cells, in the order of the records, each with up to QUESTIONS of its questions.

    Every next question is one of the category that stands there least so far, then of the kind and language that do,
    the first such of the records: so all of them appear, and whether an answer is right decides nothing.
    """
    scenes: dict[str | Path | bytes, list[dict]] = {}
    for record in records:
        scenes.setdefault(record["pictures"][0], []).append(record)
    times = Counter()  # how often each group stands on the sheet

    def seen(record: dict) -> list[int]:
        return [times[group] for group in _groups(record)]

    chosen: dict[str | Path | bytes, list[dict]] = {}
    while len(chosen) < min(COLUMNS * ROWS, len(scenes)):
        picture = min((record for record in records if record["pictures"][0] not in chosen), key=seen)["pictures"][0]
        left, chosen[picture] = list(scenes[picture]), []
        while left and len(chosen[picture]) < QUESTIONS:
            record = min(left, key=seen)
            left.remove(record)
            times.update(_groups(record))
            chosen[picture].append(record)
    return [(picture, chosen[picture]) for picture in scenes if picture in chosen]


def _groups(record: dict) -> tuple[tuple[str, ...], ...]:
    return (record.get("category", ""),), (record["kind"], record["language"])


def _draw_question(draw: ImageDraw.ImageDraw, corner: tuple[int, int], record: dict) -> int:
    """Kind, question, answer, and the truth where it differs; returns where the next one begins."""
    (x, y), font = corner, ImageFont.load_default(FONT_SIZE)
    face = chinese_font(FONT_SIZE) if _is_chinese(record) else font
    kind = "" if record["kind"] == "all" else f"{record['kind']}  "  # of data that has none
    beside = int(draw.textlength(kind, font))
    right = is_found(record) if "iou" in record else record["right"] == record["truth"]
    baseline = y + FONT_SIZE
    draw.text((x, baseline), kind, GREY, font, "ls")
    draw.text((x + beside, baseline), _fit(record["question"], face, CELL - beside), BLACK, face, "ls")
    draw.text((x, baseline + LINE), _fit(record["right"] or "(nothing)", face), GREEN if right else RED, face, "ls")
    if not right:
        draw.text((x, baseline + 2 * LINE), _fit(f"truth: {record['truth']}", face), GREY, face, "ls")
    return y + LINE * (2 if right else 3) + GAP


def _count_boxes(answer: str) -> int:
    return len(boxes_in(answer))


def _is_chinese(record: dict) -> bool:
    return any(letter >= "\u2e80" for name in ("question", "right", "truth") for letter in record[name] or "")


def _fit(text: str, font: ImageFont.FreeTypeFont, width: int = CELL) -> str:
    text = text.translate(TYPOGRAPHY)
    while font.getlength(text) > width and len(text) > 1:
        text = text[:-2].rstrip("…") + "…"
    return text
