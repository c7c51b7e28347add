"""The report of a check: one dictionary of figures, which is report.json, and the same for a person to read.

path, held_out      the data files; of held_out also how many samples it has, and how many of them can be used
read_as             the format that was recognised, and how its records are stored
verdict             refuses: whether training would; sentence: why
flags, image_tokens what it was checked with; tokens of a picture; tiles: into which one is cut at most
samples             all, used, and what is not used as dataset.quarantine tells it apart: bad, dropped, damaged; cut:
                    of those that are used, how many lose their end
pictures            shown: how often; different: how many; formats; width and height in pixels
tokens              of all samples that can be rendered, before they are cut: least, median, mean, most, all of them;
                    histogram: [first, last, samples] a line
trained_tokens      the same of the samples that are used, after they were cut; lost: by cutting
languages           by their letters: in how many of the samples that are used
found               places by kind, see scripts.data.check.findings
findings            each place: kind, where (file:line), reason; like: which picture a repeated one repeats
"""

import os
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from dataset.samples import BAD, DAMAGED, DROPPED
from model.messages import counted
from scripts.data.check.findings import REJECTED, TITLES, Finding, Tally

EXAMPLES = 3  # places that report.md names of each kind; report.json names all
BARS, WIDTH = 10, 30  # of a histogram: lines, letters of the longest
LONG = 1000  # letters of a reason in a list
MARKS = re.compile(r"[\\`*\[\]<>|~$]|(?<![^\W_])_|_(?![^\W_])")


def figures_of(tally: Tally) -> dict:
    """All that was found, as JSON takes it; the keys are explained above."""
    kinds = Counter(finding.kind for finding in tally.findings)
    left_out = {kind: len(tally.rejected[kind]) for kind in (BAD, DROPPED, DAMAGED)}
    tokens, trained = np.array(tally.tokens, np.int64), np.array(tally.trained, np.int64)
    sides = np.array(tally.sizes, np.int64).reshape(-1, 2)
    return {
        "samples": {"all": tally.samples, "used": tally.used, **left_out, "cut": kinds["cut"]},
        "pictures": {
            "shown": tally.shown, "different": len(tally.sizes), "formats": dict(sorted(tally.formats.items())),
            "width": _spread(sides[:, 0]), "height": _spread(sides[:, 1]),
        },
        "tokens": {**_spread(tokens), "histogram": histogram(tokens)},
        "trained_tokens": {**_spread(trained), "lost": tally.lost, "histogram": histogram(trained)},
        "languages": dict(tally.writing.most_common()),
        "found": {kind: kinds[kind] for kind in TITLES if kinds[kind]},
        "findings": list(map(_as_json, sorted(tally.findings, key=lambda finding: finding.number))),
    }  # fmt: skip


def _as_json(finding: Finding) -> dict:
    entry = {"kind": finding.kind, "where": finding.where, "reason": finding.reason}
    return entry | ({"like": {"where": finding.like.where, "picture": finding.like.name}} if finding.like else {})


def _spread(values: np.ndarray) -> dict:
    if not len(values):
        return {"least": 0, "median": 0, "mean": 0.0, "most": 0, "all": 0}
    least, median, most = int(values.min()), int(np.quantile(values, 0.5, method="lower")), int(values.max())
    mean = round(float(values.mean()), 1)
    return {"least": least, "median": median, "mean": mean, "most": most, "all": int(values.sum())}


def histogram(values: np.ndarray) -> list[list[int]]:
    """[first, last, how many] of at most BARS ranges, whose width is 1, 2 or 5 times a power of ten."""
    if not len(values):
        return []
    width = next(
        width for power in range(19) for width in (10**power, 2 * 10**power, 5 * 10**power)
        if values.max() // width - values.min() // width < BARS
    )  # fmt: skip
    counts = np.bincount(values // width - values.min() // width)
    first = int(values.min() // width * width)
    return [[first + n * width, first + (n + 1) * width - 1, int(count)] for n, count in enumerate(counts)]


def as_markdown(figures: dict) -> str:
    """figures: of figures_of, with `path`, `flags`, `verdict` and, where there is one, `held_out` beside them."""
    parts = [_head(figures), _table_of_found(figures), _examples(figures["findings"]), _lengths(figures)]
    parts += [_languages(figures), _pictures(figures)]
    text = "\n\n".join(part for part in parts if part) + "\n"
    folder = os.path.dirname(figures["path"]) if os.path.isdir(os.path.dirname(figures["path"])) else ""
    names = {re.escape(spelt) for name in (os.path.abspath(folder), folder) for spelt in (name, _plain(name)) if name}
    return re.sub(rf"(?<![^\s`'(])(?:{'|'.join(sorted(names))})/", "", text)


def _head(figures: dict) -> str:
    samples, flags = figures["samples"], figures["flags"]
    lines = [f"# {_plain(figures['path'])}", f"**{_plain(figures['verdict']['sentence'])}**"]
    share = f"{100 * samples['used'] / max(1, samples['all']):.1f} %"
    lines.append(
        f"{samples['used']:,} of {counted(samples['all'], 'samples')} ({share}) are learnt from, with "
        f"{counted(figures['pictures']['different'], 'different pictures')} and "
        f"{counted(figures['trained_tokens']['all'], 'trained tokens')}. Checked with "
        + ", ".join(f"`--{name} {value}`" for name, value in flags.items())
        + f"; a picture is {counted(figures['image_tokens'], 'tokens')}"
        + (f", and so is each of its tiles, {figures['tiles']} at most." if figures["tiles"] else ".")
    )
    folder = os.path.dirname(figures["path"])
    if os.path.isdir(folder):
        lines[-1] += f" Names of files are those in the folder {_plain(folder)}."
    lines.append(f"Read as {_plain(figures['read_as'])}.")
    if samples[DAMAGED]:
        lines.append(
            f"Training would find out only on its way that {counted(samples[DAMAGED], 'samples')} cannot be learnt "
            "from: at its start it looks at the headers of most pictures, and no further."
        )
    if held_out := figures.get("held_out"):
        lines.append(
            f"Compared with the held-out file {_plain(held_out['path'])}: {held_out['used']:,} of "
            f"{counted(held_out['samples'], 'samples')} can be used there."
        )
    return "\n\n".join(lines)


def _what_training_does(kind: str, figures: dict) -> str:
    if kind in ("too-long", "nothing-to-learn"):
        return "leaves it out, and does not mind"
    if kind in REJECTED:
        return "leaves it out, as a bad sample"
    if kind.startswith("held-out"):
        return "learns from it, and is scored on it"
    return "learns from what is left" if kind == "cut" else "learns from it"


def _table_of_found(figures: dict) -> str:
    if not figures["found"]:
        return "## What was found\n\nNothing to mend."
    lines = [
        "## What was found",
        "",
        "| what | kind in report.json | places | what training does |",
        "|---|---|---|---|",
    ]
    for kind, count in figures["found"].items():
        lines.append(f"| {_plain(TITLES[kind])} | `{kind}` | {count:,} | {_what_training_does(kind, figures)} |")
    return "\n".join(lines)


def _examples(findings: Sequence[dict]) -> str:
    by_kind: dict[str, list[dict]] = {}
    for finding in findings:
        by_kind.setdefault(finding["kind"], []).append(finding)
    lines = ["## Where, and what to do"] if by_kind else []
    for kind in (kind for kind in TITLES if kind in by_kind):
        found = by_kind[kind]
        lines += ["", f"**{_plain(TITLES[kind])}**", ""]
        lines += [
            f"- `{entry['where'].replace('`', '?')}`: {_plain(entry['reason'][:LONG])}" for entry in found[:EXAMPLES]
        ]
        if len(found) > EXAMPLES:
            lines.append(f"- and {counted(len(found) - EXAMPLES, 'more places')}: see report.json")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is; a _ within a word needs no help."""
    return MARKS.sub(r"\\\g<0>", text)


def _lengths(figures: dict) -> str:
    tokens, samples, trained = figures["tokens"], figures["samples"], figures["trained_tokens"]
    most, lost = figures["flags"]["max_seq_len"], trained["lost"]
    lines = [f"## Lengths, in tokens\n\n{_words_of(tokens)}. `--max_seq_len {tokens['most']}` would hold every sample."]
    told = []
    if samples["cut"]:
        share = f"{100 * lost / max(1, lost + trained['all']):.1f} %"
        told.append(f"cuts {counted(samples['cut'], 'samples')}, which loses {lost:,} trained tokens ({share})")
    if samples[DROPPED]:
        told.append(f"leaves out {counted(samples[DROPPED], 'samples')}, for want of room or of an answer")
    lines.append(f"`--max_seq_len {most}` {', and '.join(told) or 'cuts nothing, and leaves nothing out'}.")
    lines.append(_table(tokens["histogram"], "tokens"))
    lines.append(f"## Trained tokens of a sample\n\n{_words_of(trained)}, {trained['all']:,} in all.")
    lines.append(_table(trained["histogram"], "trained tokens"))
    return "\n\n".join(lines)


def _words_of(spread: dict) -> str:
    if spread["least"] == spread["most"]:
        return f"{spread['most']:,} each"
    return f"{spread['least']:,} to {spread['most']:,}, median {spread['median']:,}, mean {spread['mean']:,}"


def _table(rows: Sequence[Sequence[int]], of: str) -> str:
    most = max((count for *_, count in rows), default=1)
    lines = [f"| {of} | samples | |", "|---:|---:|:---|"]
    for first, last, count in rows:
        bar = "█" * max(1, round(WIDTH * count / most)) if count else ""
        lines.append(f"| {first:,}{f' to {last:,}' if last > first else ''} | {count:,} | {bar} |")
    return "\n".join(lines)


def _languages(figures: dict) -> str:
    used = max(1, figures["samples"]["used"])
    lines = ["## Languages, by their letters", "", "| letters | samples that have some | |", "|---|---:|---:|"]
    lines += [f"| {name} | {count:,} | {100 * count / used:.1f} % |" for name, count in figures["languages"].items()]
    return "\n".join(lines)


def _pictures(figures: dict) -> str:
    pictures = figures["pictures"]
    if not pictures["different"]:
        return "## Pictures\n\nNone."
    formats = ", ".join(f"{name} {count:,}" for name, count in pictures["formats"].items())
    different, shown = counted(pictures["different"], "different ones"), counted(pictures["shown"], "times")
    return (
        f"## Pictures\n\n{different}, shown {shown}: "
        f"{formats}. Width in pixels: {_words_of(pictures['width'])}; height: {_words_of(pictures['height'])}.\n\n"
        "![A sheet of samples, the odd ones first](sheet.png)"
    )
