"""One sample as the model sees it: its pictures after preprocessing, and each token with id, position, branch, label.

    python scripts/inspect_sample.py dataset/data/sft.jsonl 3

prints the row that a step of training takes, with the neighbours that share it, and writes the same as a page for the
browser. The sample's number counts from 1, as `file:line` in every message does. Where training would leave the sample
out, the reason is what it would say, and the exit code is 1.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from dataset.options import ReadOptions, add_read_flags
from dataset.readers.opening import open_data
from model.command_line import CommandLine
from model.files import ROOT, written_aside
from model.messages import UserError
from scripts.data.inspect.sample_row import find_sample, read_row
from scripts.data.inspect.token_page import as_html
from scripts.data.inspect.token_text import as_text, wants_colour
from scripts.data.like_training import add_model_flags, processor_like
from trainer.train_sft_vlm import SFT_VLM

PAGES = ROOT / "out" / "inspect"


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 where training would leave the sample out."""
    options = parse_options(arguments)
    try:
        samples = open_data(options.path, ReadOptions.from_flags(options))
        processor = processor_like(options)
        index = find_sample(samples, options.path, options.sample)
        row = read_row(samples, index, processor, options.max_seq_len, partial(print, file=sys.stderr))
        page = options.html or PAGES / f"{options.path.stem}-{Path(options.sample).name}.html"
        if not options.html:
            PAGES.mkdir(parents=True, exist_ok=True)
        elif not page.parent.is_dir():
            raise UserError(f"--html {page} cannot be written: there is no folder {page.parent}")
        with written_aside(page) as aside:
            aside.write_bytes(as_html(row, processor.tokenizer))
    except (UserError, OSError) as error:
        raise SystemExit(f"inspect_sample: {error}") from error
    print(as_text(row, processor.tokenizer, wants_colour(sys.stdout)))
    print(f"\nas a page: {page}")
    return 1 if row.refusal else 0


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(__doc__)
    parser.add_argument("path", type=Path, help="data as training's --data_path takes them")
    parser.add_argument(
        "sample", help="its number, as messages name it (a file's line, else counted from 1), or its file's name or key"
    )
    add_read_flags(parser)
    parser.add_argument("--max_seq_len", type=int, default=SFT_VLM.max_seq_len,
                        help=f"tokens a row, as in training; {SFT_VLM.max_seq_len}")  # fmt: skip
    add_model_flags(parser)
    parser.add_argument("--html", type=Path, help="the page; by default out/inspect/<name of the data>-<number>.html")
    options = parser.parse_args(arguments)
    if options.max_seq_len < 1:
        parser.error(f"--max_seq_len {options.max_seq_len} must be at least 1")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
