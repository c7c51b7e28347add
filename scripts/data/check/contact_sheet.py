"""A sheet of samples to look at: what was found first, where it can be shown, then samples from all over the file."""

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont, ImageOps

from dataset.fonts import font_for
from dataset.samples import BadSample, Sample
from model.processing import IMAGE_TAG
from scripts.assets.sheet import BLACK, GREEN, GREY, RED
from scripts.data.check.findings import TITLES, Finding
from scripts.data.check.findings import TOLD as LEARNT_FROM

COLUMNS, MARGIN, LINE, FONT_SIZE = 4, 16, 18, 13  # pixels
WIDTH, HEIGHT, TEXT_LINES = 280, 200, 6  # of a card: its pictures, and the lines below them
FOUND, OF_A_KIND, SAMPLES = 16, 2, 12  # cards
NEAR = 32  # samples among which one with other pictures is looked for
PICTURES, TURNS = 4, 4  # of a sample
PALE, ORANGE = (238, 238, 238), (190, 100, 0)
FOLDERS = re.compile(r"(?:[^\s/:]*/)+(?=[^\s/])")  # in a reason; a card has no room for them


@dataclass
class Card:
    title: str
    colour: tuple[int, int, int]
    pictures: list[Image.Image] = field(default_factory=list)
    texts: list[tuple[str, tuple[int, int, int]]] = field(default_factory=list)  # and the colour of each


def draw_contact_sheet(
    findings: Sequence[Finding], samples: Sequence[Sample], held_out: Sequence[Sample]
) -> Image.Image:
    """findings: of `samples`; those about repeated pictures show both."""
    found = [_card_of(finding, samples, held_out) for finding in _chosen(findings)]
    groups = [("What was found", found), ("Samples from all over the file", _spread(samples))]
    rows = [  # of a group, or of its cards
        row
        for title, cards in groups
        if cards
        for row in (title, *(cards[start : start + COLUMNS] for start in range(0, len(cards), COLUMNS)))
    ]
    heights = [2 * LINE if isinstance(row, str) else HEIGHT + max(map(_lines, row)) * LINE + MARGIN for row in rows]
    sheet = Image.new("RGB", (COLUMNS * (WIDTH + MARGIN) + MARGIN, MARGIN + sum(heights)), "white")
    y = MARGIN
    for row, height in zip(rows, heights, strict=True):
        if isinstance(row, str):
            ImageDraw.Draw(sheet).text((MARGIN, y), row, BLACK, ImageFont.load_default(FONT_SIZE + 3))
        else:
            for column, card in enumerate(row):
                _draw(card, sheet, (MARGIN + column * (WIDTH + MARGIN), y))
        y += height
    return sheet


def _chosen(findings: Sequence[Finding]) -> list[Finding]:
    """The first of each kind, then the second, until the sheet is full; kinds in the order of TITLES."""
    order, met, ranked = list(TITLES), Counter(), []
    for finding in findings:
        met[finding.kind] += 1
        if met[finding.kind] <= OF_A_KIND:
            ranked.append((met[finding.kind], -order.index(finding.kind), finding))
    chosen = sorted(ranked, key=lambda entry: entry[:2])[:FOUND]
    return [finding for _, _, finding in sorted(chosen, key=lambda entry: (-entry[1], entry[0]))]


def _card_of(finding: Finding, samples: Sequence[Sample], held_out: Sequence[Sample]) -> Card:
    card = Card(TITLES[finding.kind], ORANGE if finding.kind in LEARNT_FROM else RED)
    card.pictures += _picture(samples, finding.number, finding.picture)
    if finding.like:
        source = held_out if finding.kind.startswith("held-out") else samples
        card.pictures += _picture(source, finding.like.number, finding.like.picture)
    line = finding.where.rpartition("/")[2]
    card.texts.append((FOLDERS.sub("", f"{line}: {finding.reason}"), BLACK))
    return card


def _picture(samples: Sequence[Sample], number: int, place: int) -> list[Image.Image]:
    """One picture, or none where it cannot be shown."""
    try:
        return [samples[number].open_picture(place)]
    except (BadSample, IndexError):
        return []


def _spread(samples: Sequence[Sample]) -> list[Card]:
    """Samples at even distances, each with the first of its turns; not two about the same pictures, if others are near.

    What cannot be read is not among them: it is shown among what was found.
    """
    cards, shown, count = [], set(), min(SAMPLES, len(samples))
    starts = [len(samples) * place // count for place in range(count + 1)]
    for start, end in itertools.pairwise(starts):
        for number in range(start, min(end, start + NEAR)):
            try:
                sample = samples[number]
                if sample.pictures and sample.pictures in shown:
                    continue
                cards.append(_card_of_sample(sample))
            except BadSample:
                continue
            shown.add(sample.pictures)
            break
    return cards


def _card_of_sample(sample: Sample) -> Card:
    """Raises BadSample where a picture cannot be shown."""
    shown = min(len(sample.pictures), PICTURES)
    card = Card(sample.where.rpartition("/")[2], GREY, [sample.open_picture(place) for place in range(shown)])
    if shown < len(sample.pictures):
        card.title += f" ({shown} of its {len(sample.pictures):,} pictures)"
    if sample.text:
        card.texts.append((sample.text, BLACK))
    for message in sample.messages[:TURNS]:
        colour = GREEN if message.get("role") == "assistant" else BLACK
        card.texts.append((message["content"].replace(IMAGE_TAG, "").strip(), colour))
    return card


def _draw(card: Card, sheet: Image.Image, place: tuple[int, int]) -> None:
    draw, (x, y) = ImageDraw.Draw(sheet), place
    draw.rectangle((x, y, x + WIDTH - 1, y + HEIGHT - 1), PALE)
    if not card.pictures:
        draw.text((x + WIDTH // 2, y + HEIGHT // 2), "no picture", GREY, _font(""), anchor="mm")
    each = WIDTH // max(1, len(card.pictures))
    for number, picture in enumerate(card.pictures):
        fitted = ImageOps.contain(picture, (each - 4, HEIGHT - 4))
        corner = x + number * each + (each - fitted.width) // 2, y + (HEIGHT - fitted.height) // 2
        sheet.paste(fitted, corner)
    for line, colour in _text_of(card):
        y += LINE
        draw.text((x, y + HEIGHT), line, colour, _font(line), anchor="ls")  # fonts agree on where the letters stand


def _lines(card: Card) -> int:
    return len(_text_of(card))


def _text_of(card: Card) -> list[tuple[str, tuple[int, int, int]]]:
    lines = [(line, card.colour) for line in _wrapped(card.title, 1)]
    for text, colour in card.texts:
        lines += [(line, colour) for line in _wrapped(text, TEXT_LINES - len(lines))]
    return lines


def _font(text: str) -> ImageFont.FreeTypeFont:
    """Pillow's own has little more than English letters."""
    return font_for(text, FONT_SIZE) or ImageFont.load_default(FONT_SIZE)


def _wrapped(text: str, most: int) -> list[str]:
    """Lines of a card, at most so many; a last one that ends in … where there would be more."""
    font, lines, rest = _font(text), [], " ".join(text.split())
    while rest and len(lines) < most:
        end = len(rest)
        while font.getlength(rest[:end]) > WIDTH:
            end -= max(1, (end - 20) // 8)
        if end < len(rest) and " " in rest[:end]:
            end = max(end // 2, rest[: end + 1].rfind(" "))
        line, rest = rest[:end].strip(), rest[end:].strip()
        lines.append(line)
    if rest and lines:
        lines[-1] = lines[-1][:-1] + "…"
    return lines
