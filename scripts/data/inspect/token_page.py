"""A sample's row as one page for the browser, which needs no other file.

What stands in the data is escaped, and the page may fetch and run nothing, whatever that is.
"""

import base64
import html
import io
import math
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from string import Template

import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from model.config import IGNORE_INDEX
from scripts.data.inspect.sample_row import SampleRow, SeenPicture
from scripts.data.inspect.token_text import notes, title_of
from scripts.data.inspect.tokens import Entry, decoded, entries, readable, whole_characters

PAGE = Template(Path(__file__).with_name("token_page.html").read_text(encoding="utf-8"))
LEGEND = (
    ("t", "a token", "read, not learnt"),
    ("t trained", "a token", "trained: the model learns to predict it from what stands before it"),
    ("t control", "&lt;|im_start|&gt;", "control token, which nobody can type"),
    ("t picture", "picture", "a picture, one token a patch"),
)
BEYOND = (("t beyond", "<span>a token</span>", "has no room within --max_seq_len"),)
NUMBERS = '<label><input type="checkbox" id="numbers" checked> id and position below each token</label>'
SEES = "A token sees what stands before it in its own branch and in the beginning that all share, and nothing else."
COUNTED = "Tokens and positions are counted from 0, as in the tensors. Point at a token to read what it is."


def as_html(row: SampleRow, tokenizer: PreTrainedTokenizerFast) -> bytes:
    """UTF-8."""
    shown = entries(row, tokenizer)
    where = html.escape(row.where)
    alerts = [f'<p class="{"refusal" if row.refusal else "note"}">{html.escape(note)}</p>' for note in notes(row)]
    return PAGE.substitute(
        title=where, where=where, facts=facts(row), notes="\n".join(alerts), pictures=pictures(row),
        text=text(row, shown) if shown else "",
    ).encode()  # fmt: skip


def facts(row: SampleRow) -> str:
    """The figures at the top."""
    figures = {
        "tokens in the row": f"{len(row.rendered):,}",
        "of them trained": f"{int(row.rendered.trained.sum()):,}",
        "pictures": f"{len(row.pictures):,}",
        "conversations in the row": f"{len(row.conversations):,}",
        "--max_seq_len": f"{row.max_seq_len:,}",
    }
    return "".join(f"<div><dt>{name}</dt><dd>{figure}</dd></div>" for name, figure in figures.items())


def pictures(row: SampleRow) -> str:
    """Each with its patches, which tell their tokens."""
    if not row.pictures:
        return ""
    figures = "\n".join(figure(row, number, picture) for number, picture in enumerate(row.pictures, 1))
    sized = next((picture.pixels.shape[-1] for picture in row.pictures if picture.pixels is not None), None)
    size = f" squeezed to {sized} × {sized} pixels," if sized else ""
    return (
        f'<h2>Pictures</h2><p class="help">Exactly the pixels that the vision tower gets:{size} one token a patch. '
        f'Point at a patch to read which.</p>\n<div class="pictures">{figures}</div>'
    )


def figure(row: SampleRow, number: int, picture: SeenPicture) -> str:
    side = math.isqrt(picture.last - picture.first + 1)
    position = int(row.rendered.positions[picture.first])
    patches = "".join(
        f'<i data-tip="token {picture.first + patch} · position {position + patch} · picture {number}, patch in row '
        f'{patch // side + 1}, column {patch % side + 1}"></i>'
        for patch in range(side * side)
    )
    image = "it cannot be opened"
    if picture.pixels is not None:
        image = (
            f'<img alt="picture {number}" src="{png_address(picture.pixels)}">'
            f'<div class="patches" style="--side: {side}">{patches}</div>'
        )
    return (
        f'<figure><div class="seen">{image}</div><figcaption><b>picture {number}: tokens {picture.first} to '
        f"{picture.last}</b><br>{side} × {side} patches of {html.escape(Path(picture.name).name)}</figcaption></figure>"
    )


def png_address(pixels: torch.Tensor) -> str:
    """Pixels uint8 [3, height, width] as a data URI that holds every one of them."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def text(row: SampleRow, shown: list[Entry]) -> str:
    """Legend, branches and table."""
    kinds = LEGEND + (BEYOND if any(entry.beyond for entry in shown) else ())
    legend = "".join(f'<span><span class="{kind}">{name}</span> {means}</span>' for kind, name, means in kinds)
    several = f" {SEES}" if len(row.conversations) > 1 else ""
    branches = "\n".join(branch(row, list(group)) for _, group in groupby(shown, lambda entry: entry.branch))
    return (
        f'<h2>Text, token by token</h2><p class="help">{COUNTED}{several}</p>\n'
        f'<p class="legend">{legend}{NUMBERS}</p>\n'
        f"{branches}\n{table(shown)}"
    )


def branch(row: SampleRow, shown: list[Entry]) -> str:
    """One card: a conversation, the beginning that several share, or the rest of one of those."""
    number, several = shown[0].branch, len(row.conversations) > 1
    kind = "branch" + (" later" if number else "") + (" own" if several and number == row.branch else "")
    last = shown[-1].position + shown[-1].size - 1
    flow = "".join(map(characters, whole_characters(shown)))
    return (
        f'<section class="{kind}"><h3>{html.escape(title_of(row, number))} <small>· positions {shown[0].position} to '
        f'{last}</small></h3><p class="flow">{flow}</p></section>'
    )


def characters(together: list[Entry]) -> str:
    """A token, or those that only together are characters: these in a frame, behind what they are."""
    chips = "".join(map(chip, together))
    if len(together) == 1:
        return chips
    return f'<span class="group">{html.escape(readable(decoded(together) or ""))} = {chips}</span>'


def chip(entry: Entry) -> str:
    kinds = {"picture": entry.picture, "trained": entry.trained, "control": entry.is_control, "beyond": entry.beyond}
    kind = " ".join(["t", *(name for name, holds in kinds.items() if holds)])
    shown, label = (f"picture {entry.picture}", "not trained") if entry.picture else (entry.text, label_of(entry))
    tip = f"token {places(entry)} · position {positions(entry)} · branch {entry.branch} · id {entry.id} · {label}"
    numbers = f"<small>{entry.id}<br>{span(entry.position, entry.size, '–')}</small>"
    line_break = "<br>" if entry.content.endswith(b"\n") else ""
    inside = f"<span>{html.escape(shown)}</span>{numbers}"
    return f'<span class="{kind}" data-tip="{html.escape(tip)}">{inside}</span>{line_break}'


def label_of(entry: Entry) -> str:
    return "beyond --max_seq_len" if entry.beyond else "trained" if entry.trained else "not trained"


def places(entry: Entry) -> str:
    return span(entry.place, entry.size)


def positions(entry: Entry) -> str:
    return span(entry.position, entry.size)


def span(first: int, size: int, to: str = " to ") -> str:
    return str(first) if size == 1 else f"{first}{to}{first + size - 1}"


def table(shown: Iterable[Entry]) -> str:
    """Every entry in a line, for whoever wants to compare."""
    heads = ("token", "position", "branch", "id", "label", "text")
    lines = []
    for entry in shown:
        label = entry.id if entry.trained else IGNORE_INDEX
        cells = (places(entry), positions(entry), entry.branch, entry.id, label)
        lines.append(
            "<tr>"
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + f"<td>{characters([entry])}</td></tr>".replace("<br>", "")
        )
    return (
        f'<details><summary>All tokens as a table</summary><p class="help">The loss skips tokens with the label '
        f'{IGNORE_INDEX}.</p><div class="scroll"><table><thead><tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr>'
        f"</thead><tbody>{''.join(lines)}</tbody></table></div></details>"
    )
