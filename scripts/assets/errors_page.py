"""Where a model errs, on one page that can be mailed: everything is in the file, and no script is needed to read it."""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path

from PIL import Image

from dataset.emoji_words import PLACES
from dataset.exam.confusions import NOTHING, confusions, right_by_place
from dataset.exam.figures import SHOWN
from dataset.exam.mistakes import Mistake
from model.files import written_aside
from model.inference.attention_map import heat_picture
from model.messages import counted

WORST = 40  # mistakes that are shown
PAIRS = 15  # of names, of each language
PICTURES = 2  # of a question; with their maps all of them stay well below 3 MB
PICTURE_SIDE = 160  # pixels, the longer one
TEXT = 400  # letters of a question or an answer
HOTTEST = 0.75  # opacity of a place where nothing is right
STYLE = Path(__file__).with_name("errors_page.css")
LANGUAGES = {"en": "English", "zh": "Chinese", "all": "All languages"}
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Where it errs: {title}</title>
<style>
{style}</style>
<body>
{body}
</body>
</html>
"""


@dataclass(frozen=True)
class Findings:
    """What scripts/score.py found out."""

    weight: str  # whose answers these are, of which data: names for the reader
    data: str
    report: dict
    table: str  # the report as it is printed
    records: Sequence[dict]
    worst: Sequence[Mistake]
    mistakes: int  # of which `worst` are the first
    credit: str = ""  # whose pictures these are


def write_page(findings: Findings, path: Path) -> None:
    """Raises OSError with nothing left behind."""
    worded = [] if any("iou" in record for record in findings.records) else findings.records  # no names and no places
    sections = [_head(findings), _figures(findings), _names(worded), _places(worded)]
    body = "\n".join(filter(None, [*sections, _worst(findings), _foot(findings)]))
    page = PAGE.format(title=escape(findings.weight), style=STYLE.read_text(encoding="utf-8"), body=body)
    with written_aside(path, durable=False) as aside:
        aside.write_text(page, encoding="utf-8", errors="replace")  # half a surrogate pair, which a model may say


def _head(findings: Findings) -> str:
    facts = {
        "weights": findings.weight, "questions": f"{len(findings.records):,} of {findings.data}",
        "wrong": f"{findings.mistakes:,} of them", "asked": f"{datetime.now():%Y-%m-%d %H:%M}",
    }  # fmt: skip
    listed = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f"<h1>Where it errs</h1>\n<dl>{listed}</dl>"


def _figures(findings: Findings) -> str:
    report = findings.report
    if "exact_match" not in report:  # boxes, choices, yes or no: they have measures of their own
        return f"<h2>Figures</h2>\n<pre>{escape(findings.table)}</pre>"
    overall = {mode: {"exact_match": match} for mode, match in report["exact_match"].items()}
    rows = [_row("all, kinds alike", overall, "first")]
    families = {
        name: {mode: {**figure, "exact_match": family["exact_match"][mode]} for mode, figure in family["all"].items()}
        for name, family in report.get("by_category", {}).items()
    }  # kinds alike in each of them, too
    for group in (families, report["by_kind"], report["by_language"]):
        named = [(name, figures) for name, figures in group.items() if name != "all"]
        rows += [_row(name, figures, "" if place else "begins") for place, (name, figures) in enumerate(named)]
    heads = "".join(f"<th>{SHOWN[mode]}</th>" for mode in overall)
    return (
        "<h2>Figures</h2>\n<p class=soft>Exact match with the question's own picture, with that of another question, "
        "and with none: what is right there too was guessed. Intervals are Wilson's at 95 %.</p>\n"
        f"<table class=figures><thead><tr><th></th>{heads}</tr></thead>\n<tbody>{''.join(rows)}</tbody></table>"
    )


def _row(name: str, figures: dict, style: str) -> str:
    cells = []
    for mode, figure in figures.items():
        match = figure["exact_match"]
        if match is None:
            cells.append("<td>-</td>")
            continue
        bar = f"<div class=track><i{'' if mode == 'right' else ' class=blind'} style='width:{match:.1%}'></i></div>"
        low_high = "{:.2f} to {:.2f}".format(*figure["interval"]) if "interval" in figure else ""
        cells.append(f"<td>{match:.3f} <span class=n>{low_high}</span>{bar}</td>")
    count = figures["right"].get("count")
    of = f" <span class=n>{count:,}</span>" if count else ""
    return f"<tr class='{style}'><th>{escape(name)}{of}</th>{''.join(cells)}</tr>\n"


def _names(records: Sequence[dict]) -> str:
    if any("choices" in record for record in records):
        return ""
    tables = [_confused(language, counts) for language, counts in sorted(confusions(records).items())]
    if not tables:
        return ""
    return (
        "<h2>Which name was said for which</h2>\n<p class=soft>The most frequent first, of all questions that are "
        "answered with names. Of lists only the names that differ are compared, in the order in which they stand.</p>\n"
        f"<div class='columns names'>{''.join(tables)}</div>"
    )


def _confused(language: str, counts: Counter[tuple[str, str]]) -> str:
    pairs = counts.most_common(PAIRS)
    rows = []
    for (truth, said), count in pairs:
        left = _in_its_language(truth) if truth != NOTHING else "<span class=soft>(not there)</span>"
        right = _in_its_language(said) if said != NOTHING else "<span class=soft>(left out)</span>"
        share = f"{(count - 1) / pairs[0][1]:.0%}"  # what happened once stands out by nothing
        rows.append(f"<tr><td>{left}</td><td class=bad>{right}</td><td style='--share:{share}'>{count:,}</td></tr>\n")
    rest = sum(counts.values()) - sum(count for _, count in pairs)
    more = f"<p class=soft>and {counted(rest, 'others')} in {counted(len(counts) - len(pairs), 'pairs')}</p>"
    return (
        f"<div><h3>{escape(LANGUAGES.get(language, language))}</h3>\n<table class=confused><thead><tr><th>it was</th>"
        f"<th>it said</th><th>times</th></tr></thead>\n<tbody>{''.join(rows)}</tbody></table>{more if rest else ''}"
        "</div>\n"
    )


def _places(records: Sequence[dict]) -> str:
    grids = []
    for kind, places in right_by_place(records).items():
        cells = []
        for name, (right, asked) in zip(PLACES["en"], places, strict=True):
            share, heat = (f"{right / asked:.2f}", HOTTEST * (1 - right / asked)) if asked else ("-", 0)
            cells.append(
                f"<div style='--heat:{heat:.2f}'><span>{name}</span><b>{share}</b><span>{right} of {asked}</span></div>"
            )
        grids.append(f"<div><h3>{escape(kind)}</h3><div class=places>{''.join(cells)}</div></div>\n")
    if not grids:
        return ""
    return (
        "<h2>Where in the picture</h2>\n<p class=soft>The share that is right of the questions about each of the nine "
        "places, by kind. The redder, the more is wrong.</p>\n"
        f"<div class=columns>{''.join(grids)}</div>"
    )


def _worst(findings: Findings) -> str:
    worst = findings.worst
    if not worst:
        return "<h2>The worst</h2>\n<p>Nothing is wrong.</p>"
    which = (
        f"The {len(worst)} worst of {findings.mistakes:,}" if len(worst) < findings.mistakes else "All that is wrong"
    )
    hint = ""
    if any(mistake.maps is not None for mistake in worst):
        hint = (
            " Beside each picture where the answer's tokens looked, light where they attended most, as a mean over all "
            "layers: a hint at where information was read from, not why the answer is what it is."
        )
    cards = "\n".join(map(_card, worst))
    return (
        f"<h2>{which}</h2>\n<p class=soft>Those first that the model was surest of: the probability that it gives just "
        f"this answer.{hint}</p>\n<div class=cards>{cards}</div>"
    )


def _card(mistake: Mistake) -> str:
    question = mistake.question
    tags = [name for name in (question.category, question.kind, question.language) if name != "all"]
    tags += [f"{mistake.sureness:.0%} sure", Path(question.sample.where).name]
    return (
        f"<article>{_seen(mistake)}<p class=n>{escape(' · '.join(tags))}</p>"
        f"<p class=question>{_in_its_language(question.text)}</p>"
        f"<p class=bad><span class=n>said</span> {_in_its_language(mistake.said) or '(nothing)'}</p>"
        f"<p class=good><span class=n>truth</span> {_in_its_language(mistake.truth)}</p></article>"
    )


def _seen(mistake: Mistake) -> str:
    """The question's first pictures, each with its map."""
    sample, maps, shown = mistake.question.sample, mistake.maps, []
    for number in range(min(PICTURES, len(sample.pictures))):
        small = sample.open_picture(number)
        small.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
        shown.append(_image(small, "the picture"))
        if maps is not None:
            most = max(float(heat.max()) for heat in maps)
            shown.append(_image(heat_picture(small, maps[number], most), "where it looked"))
    more = len(sample.pictures) - PICTURES
    rest = f"<p class=n>and {counted(more, 'pictures')} more</p>" if more > 0 else ""
    return f"<div class=seen>{''.join(shown)}</div>{rest}" if shown else ""


def _image(picture: Image.Image, what: str) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=82)
    return f"<img alt='{what}' src='data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}'>"


def _in_its_language(text: str) -> str:
    """Escaped, cut where it is endless, and marked where it is Chinese, so that the right letters are drawn."""
    cut = escape(text if len(text) <= TEXT else text[:TEXT] + "…")
    return f"<span lang=zh-Hans>{cut}</span>" if any(letter >= "\u2e80" for letter in text) else cut


def _foot(findings: Findings) -> str:
    return f"<footer>{escape(findings.credit)}</footer>" if findings.credit else ""
