"""All that can be known of a data file before it is trained on: what training leaves out, and what it would not notice.

python scripts/check_data.py dataset/data/sft.jsonl
python scripts/check_data.py my.jsonl --images_path photos --max_seq_len 1024 --held_out held_out.jsonl

Writes report.md, report.json and sheet.png into out/check/NAME. Exit status 0: training would start; 1: it would
refuse, and the last line says why; 2: the check itself could not be made.
"""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from dataset.options import ReadOptions, add_read_flags
from dataset.quarantine import MAX_BAD_SHARE
from dataset.readers.opening import open_data
from dataset.samples import Sample
from dataset.sources import parse_sources
from model.command_line import CommandLine
from model.files import ROOT, written_aside
from model.messages import UserError, counted
from model.processing import VLMProcessor
from model.progress import Progress
from scripts.data.check.contact_sheet import draw_contact_sheet
from scripts.data.check.findings import TITLES, Seen, Tally
from scripts.data.check.report import as_markdown, figures_of
from scripts.data.check.survey import Facts, Look, Surveyor, survey
from scripts.data.like_training import add_model_flags, processor_like
from trainer.train_sft_vlm import SFT_VLM

REFUSED, UNCHECKED = 1, 2  # exit statuses
FLAGS = ("max_seq_len", "max_bad_share", "strict_data")  # that decide what training does, and stand in the report


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(__doc__)
    parser.add_argument("path", help="data as training's --data_path takes them: a file, a folder, or several")
    add_read_flags(parser)
    parser.add_argument("--max_seq_len", type=int, default=SFT_VLM.max_seq_len, help="tokens a row, as in training")
    parser.add_argument("--max_bad_share", type=float, default=MAX_BAD_SHARE, help="of the samples, as in training")
    parser.add_argument("--strict_data", type=int, choices=(0, 1), default=0, help="1: one bad sample is too many")
    add_model_flags(parser)
    parser.add_argument("--held_out", help="data file to be scored on, which must share no picture with this one")
    parser.add_argument("--report", type=Path, help="folder for the report; by default out/check/NAME")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; by default one a core")
    options = parser.parse_args(arguments)
    if options.max_seq_len < 1 or options.workers < 1 or not 0 <= options.max_bad_share <= 1:
        parser.error("--max_seq_len and --workers must be at least 1, --max_bad_share must lie within 0 and 1")
    names = [Path(source.path).stem for source in parse_sources(options.path)]
    options.report = options.report or ROOT / "out" / "check" / "+".join(names)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    try:
        samples = open_file(options.path, options)
    except UserError as error:
        end(REFUSED, f"training would refuse: {error}")
    try:
        options.report.mkdir(parents=True, exist_ok=True)
        held_out = open_file(options.held_out, options) if options.held_out else []
        refusal = check(samples, held_out, processor_like(options), options)
    except (UserError, OSError) as error:
        end(UNCHECKED, str(error))
    if refusal:
        end(REFUSED, f"training would refuse: {refusal}")


def end(status: int, sentence: str) -> None:
    print(f"check_data: {sentence}", flush=True)
    raise SystemExit(status)


def open_file(path: str, options: argparse.Namespace) -> Sequence[Sample]:
    """Raises UserError where training could not open it."""
    return open_data(path, ReadOptions.from_flags(options))


def check(
    samples: Sequence[Sample], held_out: Sequence[Sample], processor: VLMProcessor, options: argparse.Namespace
) -> str | None:
    """Look at everything, write the report, print what it says; returns why training would refuse."""
    seen = Seen(held_out.where) if held_out else None
    for look, facts in looks(Surveyor(held_out, processor, options.max_seq_len), "held-out file", options):
        if not look.rejected:
            seen.add_all(look, facts)
    tally = Tally(samples.where, seen, options.max_seq_len)
    for look, facts in looks(Surveyor(samples, processor, options.max_seq_len), "checking", options):
        tally.add(look, facts)
    refusal = tally.refusal(options.max_bad_share, bool(options.strict_data))
    sentence = f"Training would refuse: {refusal}." if refusal else "Training would start."
    figures = {
        "path": options.path,
        "read_as": samples.describe(),
        "verdict": {"refuses": bool(refusal), "sentence": sentence},
        "flags": {name: getattr(options, name) for name in FLAGS},
        "image_tokens": processor.image_tokens,
        "tiles": processor.sight.tiles,
        **figures_of(tally),
    }
    if seen:
        figures["held_out"] = {"path": options.held_out, "samples": len(held_out), "used": seen.samples}
    write_report(figures, tally, samples, held_out, options.report)
    print(summary(figures, options.report), flush=True)
    return refusal


def looks(surveyor: Surveyor, what: str, options: argparse.Namespace) -> Iterator[tuple[Look, dict[str, Facts]]]:
    """Sample by sample, with a bar."""
    with Progress(len(surveyor.samples), what, "sample") as progress:
        for some, facts in survey(surveyor, options.workers):
            for look in some:
                yield look, facts
            progress.update(len(some))


def write_report(
    figures: dict, tally: Tally, samples: Sequence[Sample], held_out: Sequence[Sample], folder: Path
) -> None:
    texts = {"report.json": json.dumps(figures, indent=1, ensure_ascii=False) + "\n", "report.md": as_markdown(figures)}
    for name, text in texts.items():
        with written_aside(folder / name, durable=False) as aside:
            aside.write_text(text, encoding="utf-8")
    with written_aside(folder / "sheet.png", durable=False) as aside:
        draw_contact_sheet(tally.findings, samples, held_out).save(aside, "PNG")


def summary(figures: dict, folder: Path) -> str:
    """What the terminal shows: the rest is in the report."""
    counts, pictures = figures["samples"], figures["pictures"]
    lines = [
        figures["read_as"],
        f"{figures['path']}: {counted(counts['all'], 'samples')}, of which {counts['used']:,} are learnt from, with "
        f"{counted(pictures['different'], 'different pictures')}; {counted(counts['cut'], 'samples')} cut at "
        f"--max_seq_len {figures['flags']['max_seq_len']}",
    ]
    lines += [f"  {count:>7,}  {TITLES[kind]}" for kind, count in figures["found"].items()]
    lines.append(f"report: {folder / 'report.md'}, report.json, sheet.png")
    if not figures["verdict"]["refuses"]:
        lines.append("check_data: training would start")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
