"""English data about pictures of real things: OpenMoji's drawings and, where Debian has them, the stamps of Tux Paint.

    apt-get install tuxpaint-stamps-default        # drawings and cut-out photographs; without it OpenMoji stands alone
    python scripts/build_real_pictures.py --output dataset/data/real_pictures

pretrain.jsonl   one line a picture: what it shows
sft.jsonl        two or three lines a picture, of which two are "what is this" and "what kind of thing is this"
held_out.jsonl   pictures of things that training never shows, nor their twins (frog, frog-1): the same two questions
captions.jsonl   each thing of training once: its caption, its kind

A validation part, to choose flags by: --choose 0.2 holds that share of the training things out instead.
The stamps are under the GPL-2, OpenMoji under CC BY-SA 4.0: pass on what this writes under their licenses alone.
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

from PIL import Image

from dataset.emoji_talks import conversation
from model.command_line import CommandLine
from model.files import ROOT
from model.messages import UserError, counted
from model.progress import progress_over
from scripts.build_stamps import STAMPS, Interview, write
from scripts.data.openmoji import Glyph, draw_glyph, glyph_families, read_glyphs
from scripts.data.placing import place_plainly, place_variously
from scripts.data.stamps import INSTALL, Stamp, families, open_cut_out, read_stamps, split_families

LARGEST = 448  # pixels of a cut-out's side that are worth keeping
NEVER_MIRRORED = ("A letter.", "A number or a sign of arithmetic.", "A road sign.", "A hand sign.", "A sign of music.")
NAME, KIND = "What is this?", "What kind of thing is this?"  # asked of every picture, with these words
CREDIT = """Drawings: OpenMoji (https://openmoji.org), CC BY-SA 4.0.
Stamps and their captions: Tux Paint Stamps (https://tuxpaint.org/stamps), Bill Kendrick and others, GPL-2.
"""
Thing = Stamp | Glyph


def read_things(folder: Path, held_out: float, choose: float, seed: int) -> tuple[list[Thing], list[Thing]]:
    """What training shows, and what it never does: stamps, or drawings where there are no stamps."""
    glyphs = read_glyphs()
    if folder == STAMPS and not folder.is_dir():
        print(f"{folder} is not there: OpenMoji's drawings alone; `{INSTALL}` brings stamps, half of them photographs")
        stamps, find_families, others = glyphs, glyph_families, []
    else:
        stamps, find_families, others = read_stamps(folder)[0], families, glyphs
    train, held = split_families(find_families(stamps), held_out, f"stamps:{seed}")
    if choose:
        train, held = split_families(find_families(train), choose, f"choose:{seed}")
    if not train or not held:
        raise UserError(f"{counted(len(stamps), 'things')} leave nothing on one side of --held_out {held_out}")
    learnt = f"{counted(len(train) + len(others), 'things')} to learn from, {len(others):,} of them OpenMoji's"
    print(f"{learnt}; {len(held):,} held out")
    return [*train, *others], held


def cut_out(thing: Thing) -> Image.Image:
    picture = draw_glyph(thing) if isinstance(thing, Glyph) else open_cut_out(thing)
    picture.thumbnail((LARGEST, LARGEST))
    return picture


class Drawer:
    """Writes pictures, and the lines that ask about them."""

    def __init__(self, things: list[Thing], output: Path, options: argparse.Namespace):
        self.things, self.output, self.options = things, output, options
        self.rng = Random(f"real:{options.seed}")
        self.interview = Interview(things, self.rng)

    def draw(self, thing: Thing, number: int, part: str) -> Iterator[str]:
        """Names of the files of its pictures, the first of them plain."""
        count = self.options.glyph_drawings if isinstance(thing, Glyph) else self.options.stamp_drawings
        picture, mirrored = cut_out(thing), thing.kind.get("en") not in NEVER_MIRRORED
        for drawing in range(count if part == "train" else 1):
            placed = place_variously(picture, mirrored, self.rng) if drawing else place_plainly(picture, self.rng)
            name = f"{part}_{number:04d}_{drawing}.png"
            placed.save(self.output / "images" / name)
            yield name

    def questions(self, thing: Thing) -> list[tuple[str, str, str]]:
        """What it is and of what kind: (kind of question, question, answer)."""
        pairs = [("name", NAME, thing.name.get("en", thing.captions["en"]))]
        return pairs + ([("kind of thing", KIND, thing.kind["en"])] if thing.kind else [])

    def other_question(self, thing: Thing) -> list[tuple[str, str, str]]:
        """One of those that may be asked beside."""
        yes = self.rng.random() < 0.5
        asked = (
            self.interview.ask("caption", thing.captions, "en"),
            self.interview.is_this(thing, "en", yes),
            self.interview.is_of_kind(thing, "en", yes),
        )
        possible = [("other", *pair) for pairs in asked for pair in pairs]
        return [self.rng.choice(possible)] if possible else []


def line(image: str, kind: str, question: str, answer: str) -> dict:
    messages = conversation([(question, answer)], "<image>")
    return {"image": image, "kind": kind, "language": "en", "conversations": messages}


def training_lines(drawer: Drawer) -> tuple[list[dict], list[dict]]:
    """Of stage 1, of which each thing has one, and of stage 2, of which each picture has two or three: neighbours."""
    first, second = [], []
    for number, thing in enumerate(progress_over(drawer.things, "pictures", "thing")):
        for drawing, image in enumerate(drawer.draw(thing, number, "train")):
            questions = drawer.questions(thing)
            if not drawing:
                first.append(line(image, *questions[0]))
            others = drawer.other_question(thing) if drawing % 2 == 0 else []
            second += [line(image, *question) for question in questions + others]
    return first, second


def held_out_lines(drawer: Drawer, held_out: list[Thing]) -> Iterator[dict]:
    for number, thing in enumerate(held_out):
        for image in drawer.draw(thing, number, "held_out"):
            for question in drawer.questions(thing):
                yield line(image, *question) | {"folder": thing.folder}


def captions(things: Iterable[Thing]) -> Iterator[dict]:
    for thing in things:
        yield {"caption": thing.captions["en"], "kind": thing.kind.get("en")}


def main(arguments: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--stamps", type=Path, default=STAMPS, help=f"folder of the stamps; `{INSTALL}` fills this one")
    parser.add_argument("--output", type=Path, default=ROOT / "dataset/data/real_pictures")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--held_out", type=float, default=0.2, help="share of the things that training never shows")
    parser.add_argument("--choose", type=float, default=0.0, help="hold out this share of the training things instead")
    parser.add_argument("--stamp_drawings", type=int, default=3, help="pictures of each stamp to learn from")
    parser.add_argument("--glyph_drawings", type=int, default=1, help="pictures of each of OpenMoji's things")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the things, for a quick look")
    options = parser.parse_args(arguments)
    if not 0 < options.held_out < 1 or not 0 <= options.choose < 1 or not 0 < options.scale <= 1:
        parser.error("--held_out, --choose and --scale must lie between 0 and 1, and only --choose may be 0")
    if min(options.stamp_drawings, options.glyph_drawings) < 1:
        parser.error("--stamp_drawings and --glyph_drawings must be at least 1")
    train, held_out = read_things(options.stamps, options.held_out, options.choose, options.seed)
    some = Random(f"some:{options.seed}")
    train, held_out = (some.sample(part, max(4, round(len(part) * options.scale))) for part in (train, held_out))
    (options.output / "images").mkdir(parents=True, exist_ok=True)
    first, second = training_lines(drawer := Drawer(train, options.output, options))
    write(options.output / "pretrain.jsonl", first)
    write(options.output / "sft.jsonl", second)
    write(options.output / "held_out.jsonl", held_out_lines(drawer, held_out))
    write(options.output / "captions.jsonl", captions(train))
    (options.output / "LICENSE.txt").write_text(CREDIT, encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"build_real_pictures: {error}") from error
