"""Any data set as sharded parquet: checked, pages with checksums, an index; the original is only read.

    python scripts/prepare_data.py dataset/data/sft.jsonl --output dataset/prepared --shuffle --split 0.05

Every sample is looked at and every picture decoded; what training would call bad is left out and named in
left_out.jsonl. A stopped run goes on with the same command; index.json is written last, and says that all is there.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dataset.options import ReadOptions, add_read_flags
from dataset.quarantine import MAX_BAD_SHARE
from dataset.readers.opening import open_data
from model.command_line import CommandLine
from model.messages import UserError
from scripts.data.prepare.plan import Options
from scripts.data.prepare.preparation import Preparation


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandLine(__doc__)
    parser.add_argument("path", metavar="PATH", help="the data: anything that training reads")
    parser.add_argument("--output", type=Path, required=True, help="folder for the shards: new, empty, or to go on in")
    add_read_flags(parser)
    parser.add_argument("--shuffle", action="store_true", help="samples about the same pictures stay together")
    parser.add_argument("--seed", type=int, default=42, help="of --shuffle and --split; 42")
    parser.add_argument("--split", type=float, default=0.0, help="share of the samples for held_out-*.parquet, by "
                        "picture: none stands on both sides")  # fmt: skip
    parser.add_argument("--dedup", choices=("none", "exact"), default="none", help="exact: of samples with the same "
                        "text and the same pictures only the first is kept")  # fmt: skip
    parser.add_argument("--shard_mb", type=int, default=256, help="megabytes of a shard, about; 256")
    parser.add_argument("--max_bad_share", type=float, default=MAX_BAD_SHARE, help="refuse where more of the samples "
                        f"are bad; {MAX_BAD_SHARE}")  # fmt: skip
    parser.add_argument("--replace", action="store_true", help="delete what an earlier run made in the folder first")
    options = parser.parse_args(arguments)
    if not 0 <= options.split < 1:
        parser.error(f"--split {options.split:g} must be at least 0 and below 1")
    if not 0 <= options.max_bad_share <= 1:
        parser.error(f"--max_bad_share {options.max_bad_share:g} must lie within 0 and 1")
    if options.shard_mb < 1:
        parser.error(f"--shard_mb {options.shard_mb} must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    flags = parse(arguments)
    options = Options(flags.shuffle, flags.seed, flags.split, flags.dedup, flags.shard_mb)
    try:
        refuse_inside(flags.output, [flags.path, flags.images_path or Path(flags.path).parent / "images"])
        samples = open_data(flags.path, ReadOptions.from_flags(flags))
        with Preparation(flags.output, samples, options, flags.max_bad_share) as preparation:
            preparation.run(flags.replace)
    except (UserError, OSError) as error:
        raise SystemExit(f"prepare_data: {error}") from error


def refuse_inside(output: Path, inputs: Sequence[str | Path]) -> None:
    """Raises UserError where the output lies inside a folder that is read."""
    for folder in inputs:
        if Path(folder).is_dir() and output.resolve().is_relative_to(Path(folder).resolve()):
            raise UserError(f"--output {output} lies inside {folder}, which is never changed: name a folder elsewhere")


if __name__ == "__main__":
    main()
