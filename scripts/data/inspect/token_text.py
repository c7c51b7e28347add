"""A sample's row for the terminal: its pictures, its text with what is trained in colour, and a table of its tokens."""

import os
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TextIO

import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from model.messages import counted
from scripts.data.inspect.sample_row import SampleRow, SeenPicture
from scripts.data.inspect.tokens import Entry, decoded, entries, readable, whole_characters

# Readable on dark and on light: no colour of the text alone is told by brightness.
BOLD, FAINT, TRAINED, CONTROL, PICTURE, WRONG = "1", "2", "1;32", "35", "7", "1;31"
COLUMNS = 48  # of a picture; two of its rows make a line
HEAD = f"{'token':>9} {'position':>9} {'branch':>6} {'id':>6}  {'trained':<7}  text"


class Paint:
    """Escape codes around a text, or the text alone."""

    def __init__(self, colour: bool):
        self.colour = colour

    def __call__(self, style: str, text: str) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if self.colour and text and style else text


def wants_colour(stream: TextIO) -> bool:
    """Not in a file or a pipe, nor where the environment says so (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def as_text(row: SampleRow, tokenizer: PreTrainedTokenizerFast, colour: bool) -> str:
    """Everything about a row, in lines."""
    paint, shown = Paint(colour), entries(row, tokenizer)
    lines = [paint(BOLD, row.where), summary(row)]
    lines += [paint(WRONG if row.refusal else BOLD, note) for note in notes(row)]
    for number, picture in enumerate(row.pictures, 1):
        lines += ["", f"{paint(PICTURE, label(number, picture))} {picture.name}"]
        if picture.pixels is None:
            lines.append(paint(WRONG, "it cannot be opened"))
        elif colour:
            lines += drawn(picture.pixels)
    if shown:
        lines += ["", *flow(row, shown, paint), "", paint(BOLD, HEAD), *table(row, shown, paint)]
    return "\n".join(lines)


def summary(row: SampleRow) -> str:
    return (
        f"{counted(len(row.rendered), 'tokens')}, {int(row.rendered.trained.sum()):,} of them trained, "
        f"{counted(len(row.pictures), 'pictures')}, --max_seq_len {row.max_seq_len}"
    )


def notes(row: SampleRow) -> Iterator[str]:
    """What is to be said beside the tokens."""
    if row.refusal:
        yield f"training leaves this sample out: {row.refusal}"
    if row.cut:
        yield f"the last {counted(row.cut, 'tokens')} of this sample have no room within --max_seq_len and are cut off"
    if len(row.conversations) > 1:
        yield (
            f"{len(row.conversations)} conversations begin alike and share this row: what they share is computed once; "
            f"this sample is branch {row.branch}"
        )


def label(number: int, picture: SeenPicture) -> str:
    return f"[picture {number}: tokens {picture.first}..{picture.last}]"


def title_of(row: SampleRow, branch: int) -> str:
    """What a branch is."""
    if len(row.conversations) == 1:
        return "the conversation"
    if branch == 0:
        return "branch 0, the beginning that all share"
    own = ", this sample" if branch == row.branch else ""
    return f"branch {branch}, {Path(row.conversations[branch - 1]).name}{own}"


def flow(row: SampleRow, shown: list[Entry], paint: Paint) -> Iterator[str]:
    """The text as it is read, a paragraph a branch; «trained» where there is no colour."""
    for branch, of_branch in groupby(shown, lambda entry: entry.branch):
        yield paint(BOLD, f"-- {title_of(row, branch)}")
        runs = groupby(of_branch, lambda entry: (style_of(entry), entry.trained))
        yield "".join(run(row, list(group), style, trained, paint) for (style, trained), group in runs)


def run(row: SampleRow, group: list[Entry], style: str, trained: bool, paint: Paint) -> str:
    """Neighbours of one kind; a line of the text ends where its line break is."""
    if group[0].picture:
        return "".join(paint(style, label(e.picture, row.pictures[e.picture - 1])) for e in group)
    text = "".join(
        entry.text if (together := decoded(part)) is None else readable(together)
        for part in whole_characters(group)
        for entry in part[:1]
    )
    text = text if paint.colour or not trained else f"«{text}»"
    return "\n".join(paint(style, line) for line in text.replace("↵", "↵\n").split("\n"))


def style_of(entry: Entry) -> str:
    if entry.beyond:
        return WRONG
    return PICTURE if entry.picture else TRAINED if entry.trained else CONTROL if entry.is_control else ""


def table(row: SampleRow, shown: Iterable[Entry], paint: Paint) -> Iterator[str]:
    """A line a token, or a picture."""
    for entry in shown:
        last = entry.size - 1
        places, positions = (
            f"{first}..{first + last}" if last else f"{first}" for first in (entry.place, entry.position)
        )
        trained = "beyond" if entry.beyond else "yes" if entry.trained else "-"
        text = label(entry.picture, row.pictures[entry.picture - 1]) if entry.picture else entry.text
        facts = f"{places:>9} {positions:>9} {entry.branch:>6} {entry.id:>6}  {trained:<7}  "
        yield facts + paint(style_of(entry), text)


def drawn(pixels: torch.Tensor) -> Iterator[str]:
    """A picture in coloured half blocks of the 256 colours that every terminal has."""
    small = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((COLUMNS, COLUMNS))
    cube = (torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).long() + 25) // 51  # 6 steps a colour
    numbers = 16 + (cube.view(COLUMNS // 2, 2, COLUMNS, 3) * torch.tensor([36, 6, 1])).sum(-1)
    for upper, lower in numbers.tolist():
        blocks = (f"\x1b[38;5;{above};48;5;{below}m▀" for above, below in zip(upper, lower, strict=True))
        yield "".join(blocks) + "\x1b[0m"
