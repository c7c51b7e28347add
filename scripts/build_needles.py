"""Write long texts with facts hidden in them, and long rows of pictures, as files in the ordinary format.

    python scripts/build_needles.py --output dataset/needles --lengths 512 1024 --train 4000
    python scripts/build_needles.py --output dataset/needles --train 0 --pictures 400 --held_out_pictures 40

needles.jsonl            a text a line with questions about its facts, as one talk; one in eight is text alone; and
                         a share of --series: words that are said again
held_out.jsonl           ten lines a text and length: one question about a fact at each tenth of the depth
pictures.jsonl           rows of up to --most_pictures pictures with questions, as one talk
held_out_pictures.jsonl  a question a line about rows of --most_pictures

What training files say and ask no held-out file does: see dataset/needles.py.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from random import Random

from dataset import emoji_world as world
from dataset.needles import MOST_PICTURES, PictureRow, haystack, picture_row, repetition, word_counter
from model.command_line import CommandLine
from model.files import ROOT
from model.messages import UserError
from model.processing import VLMProcessor
from model.tokenizer_files import load_tokenizer
from scripts.build_emoji_world import save_picture, write

TENTHS = tuple((number + 0.5) / 10 for number in range(10))  # of the depth, their middles
TOKENS_A_FACT = 24  # of a text, at least
PLAIN = 8  # one text in so many is read, not asked about


def training(arguments: argparse.Namespace) -> Iterator[dict]:
    count_tokens = word_counter(VLMProcessor(load_tokenizer()).encode)
    for index in range(arguments.train):
        rng = Random(f"needle talks:{arguments.seed}:{index}")
        if rng.random() < arguments.series:
            yield {"conversations": repetition((arguments.seed, "train", index))}
            continue
        length = rng.choice(arguments.lengths)
        facts = max(3, min(arguments.facts, length // TOKENS_A_FACT))
        found = haystack((arguments.seed, "train", index), length, [rng.random() for _ in range(facts)], count_tokens)
        if index % PLAIN == PLAIN - 1:
            yield {"text": found.text}
        else:
            yield {"conversations": found.talk(rng.sample(found.facts, min(facts, arguments.questions)))}


def held_out(arguments: argparse.Namespace) -> Iterator[dict]:
    count_tokens = word_counter(VLMProcessor(load_tokenizer()).encode)
    for length in arguments.lengths:
        for index in range(arguments.held_out):
            found = haystack((arguments.seed, "held_out", index), length, TENTHS, count_tokens)
            for fact, depth in zip(found.facts, found.depths, strict=True):
                yield {"conversations": found.talk([fact]), "length": length, "depth": round(depth, 4)}


def pictures(arguments: argparse.Namespace) -> Iterator[dict]:
    for index in range(arguments.pictures):
        rng = Random(f"needle pictures:{arguments.seed}:{index}")
        row = picture_row((arguments.seed, "train", index), rng.randint(2, arguments.most_pictures), arguments.concepts)
        numbers = rng.sample(range(1, len(row.scenes) + 1), min(len(row.scenes), arguments.questions))
        yield {"image": _saved(row, f"pictures_{index:06d}", arguments), "conversations": row.talk(numbers, rng)}


def held_out_pictures(arguments: argparse.Namespace) -> Iterator[dict]:
    for index in range(arguments.held_out_pictures):
        rng = Random(f"needle pictures:{arguments.seed}:held_out:{index}")
        row = picture_row((arguments.seed, "held_out", index), arguments.most_pictures, arguments.concepts)
        names = _saved(row, f"held_out_pictures_{index:06d}", arguments)
        for depth in TENTHS:
            number = 1 + int(depth * len(row.scenes))
            yield {"image": names, "conversations": row.talk([number], rng), "depth": depth}


def _saved(row: PictureRow, stem: str, arguments: argparse.Namespace) -> str:
    """The names of a row's pictures as the format has them, now written."""
    (arguments.output / "images").mkdir(exist_ok=True)
    names = [f"{stem}_{number:02d}.jpg" for number in range(1, len(row.scenes) + 1)]
    for scene, file in zip(row.scenes, names, strict=True):
        save_picture(scene, arguments.output, file)
    return ",".join(names)


def parse() -> argparse.Namespace:
    parser = CommandLine(__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "dataset/needles")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512], help="tokens of a text; several: by chance")
    parser.add_argument("--train", type=int, default=4000, help="texts to train on")
    parser.add_argument("--held_out", type=int, default=0, help="held-out texts of each length, ten questions each")
    parser.add_argument("--facts", type=int, default=16, help="in a text to train on, at most")
    parser.add_argument("--questions", type=int, default=16, help="about a text or a row to train on, at most")
    parser.add_argument("--series", type=float, default=0.5, help="share of the texts that are words to say again")
    parser.add_argument("--pictures", type=int, default=0, help="rows of pictures to train on")
    parser.add_argument("--held_out_pictures", type=int, default=0, help="held-out rows, ten questions each")
    parser.add_argument("--most_pictures", type=int, default=10, help="in a row to train on; in each held-out one")
    parser.add_argument("--concepts", type=int, default=128, help="things in the pictures: Emoji World's first so many")
    arguments = parser.parse_args()
    if min(arguments.lengths) < 10 * TOKENS_A_FACT and arguments.held_out:
        parser.error(f"--lengths: a held-out text hides ten facts and needs {10 * TOKENS_A_FACT} tokens")
    if min(arguments.lengths) < 3 * TOKENS_A_FACT:
        parser.error(f"--lengths: a text hides three facts at least and needs {3 * TOKENS_A_FACT} tokens")
    if not 0 <= arguments.series <= 1:
        parser.error(f"--series {arguments.series} is a share and must lie within 0 and 1")
    if not 2 <= arguments.most_pictures <= MOST_PICTURES:
        parser.error(f"--most_pictures {arguments.most_pictures} must lie within 2 and {MOST_PICTURES}")
    return arguments


def main() -> None:
    arguments = parse()
    arguments.output.mkdir(parents=True, exist_ok=True)
    files = {"train": ("needles", training), "held_out": ("held_out", held_out), "pictures": ("pictures", pictures),
             "held_out_pictures": ("held_out_pictures", held_out_pictures)}  # fmt: skip
    for flag, (stem, records) in files.items():
        if getattr(arguments, flag):
            write(arguments.output / f"{stem}.jsonl", records(arguments))
    if arguments.pictures or arguments.held_out_pictures:
        (arguments.output / "LICENSE.txt").write_text(world.attribution() + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"build_needles: {error}") from error
