"""A bilingual data set from the stamps of Tux Paint, in the ordinary format: JSONL beside a folder of pictures.

    apt-get install tuxpaint-stamps-default
    python scripts/build_stamps.py --output dataset/data/stamps

train.jsonl      up to nine lines a picture, in English and Chinese: what is this, what kind of thing, is this a ...
held_out.jsonl   stamps that training never shows, nor their twins (frog, frog-1): one line of each kind of question
redrawn.jsonl    stamps that training shows, on another ground, in another size and place, with the same questions

The stamps are under the GPL-2: what this writes is made of them, so pass it on under their license or not at all.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

from dataset.emoji_talks import conversation
from dataset.emoji_world import LANGUAGES
from model.command_line import CommandLine
from model.files import ROOT
from model.messages import UserError, counted
from scripts.data.stamps import INSTALL, Stamp, draw, read_stamps, split

STAMPS = Path("/usr/share/tuxpaint/stamps")
QUESTIONS = {
    "en": {
        "name": ("What is this?", "What does the picture show?"),
        "kind": ("What kind of thing is this?", "To which kind of things does this belong?"),
        "is": ("Is this {}?", "Does the picture show {}?"),
        "caption": ("Describe the picture.", "Say what the picture shows."),
    },
    "zh": {
        "name": ("这是什么？", "图中是什么？"),
        "kind": ("这是哪一类东西？", "这属于哪一类？"),
        "is": ("这是{}吗？", "图中是{}吗？"),
        "caption": ("描述这张图片。", "说说图中的内容。"),
    },
}
YES_NO = {"en": ("Yes.", "No."), "zh": ("是。", "不是。")}
Pair = tuple[str, str]  # question and answer


class Interview:
    """Asks about stamps. Wrong names come from the stamps of the same file, so that no name gives its answer away."""

    def __init__(self, stamps: list[Stamp], rng: Random):
        self.stamps, self.rng = stamps, rng
        self.kinds = [dict(kind) for kind in sorted({tuple(stamp.kind.items()) for stamp in stamps if stamp.kind})]

    def ask(self, about: str, answers: dict[str, str], language: str) -> list[Pair]:
        """A question and its answer, where there is one in that language. about: of QUESTIONS."""
        return [(self.rng.choice(QUESTIONS[language][about]), answers[language])] if language in answers else []

    def ask_yes_no(self, answers: dict[str, str], others: list[dict[str, str]], language: str, yes: bool) -> list[Pair]:
        """Whether this is what `answers` says, or, for a no, what one of the others says."""
        wrong = sorted({other[language] for other in others if language in other} - {answers.get(language, "")})
        if language not in answers or not (yes or wrong):
            return []
        thing = (answers[language] if yes else self.rng.choice(wrong)).rstrip(".。")
        if thing.startswith(("A ", "An ", "The ", "Some ")) or others is self.kinds:
            thing = thing[0].lower() + thing[1:]
        return [(self.rng.choice(QUESTIONS[language]["is"]).format(thing), YES_NO[language][not yes])]

    def is_this(self, stamp: Stamp, language: str, yes: bool) -> list[Pair]:
        """By name; half of the wrong names are of the same kind."""
        alike = [other.name for other in self.stamps if other.kind == stamp.kind and other.name != stamp.name]
        close = alike and self.rng.random() < 0.5
        return self.ask_yes_no(stamp.name, alike if close else [other.name for other in self.stamps], language, yes)

    def is_of_kind(self, stamp: Stamp, language: str, yes: bool) -> list[Pair]:
        return self.ask_yes_no(stamp.kind, self.kinds, language, yes)

    def lines_to_learn(self, stamp: Stamp, image: str) -> Iterator[dict]:
        """Each question is a line of its own; all about one picture, and so neighbours."""
        pairs = self.ask("caption", stamp.captions, self.rng.choice(LANGUAGES))
        for about, answers in (("name", stamp.name), ("kind", stamp.kind)):
            pairs += [pair for language in LANGUAGES for pair in self.ask(about, answers, language)]
        for asked in (self.is_this, self.is_of_kind):
            pairs += [pair for yes in (True, False) for pair in asked(stamp, self.rng.choice(LANGUAGES), yes)]
        for pair in pairs:
            yield {"image": image, "conversations": conversation([pair], "<image>")}

    def lines_to_score(self, stamp: Stamp, image: str) -> Iterator[dict]:
        """One line of each kind of question, every other in Chinese; one of the two yes or no questions is a no."""
        first, second = self.rng.sample(LANGUAGES, 2)
        yes = self.rng.random() < 0.5
        asked = (
            ("name", first, self.ask("name", stamp.name, first)),
            ("kind of thing", second, self.ask("kind", stamp.kind, second)),
            ("is it this", first, self.is_this(stamp, first, yes)),
            ("is it of a kind", second, self.is_of_kind(stamp, second, not yes)),
        )
        for kind, language, pairs in asked:
            for pair in pairs:
                messages = conversation([pair], "<image>")
                yield {"image": image, "kind": kind, "language": language, "conversations": messages}


def records(name: str, stamps: list[Stamp], drawings: int, options: argparse.Namespace) -> Iterator[dict]:
    """A file's lines; its pictures are drawn as they come."""
    rng = Random(f"{name}:{options.seed}")
    interview = Interview(stamps, rng)
    lines = interview.lines_to_learn if name == "train" else interview.lines_to_score
    for number, stamp in enumerate(stamps):
        for drawing in range(drawings):
            image = f"{name}_{number:04d}_{drawing}.png"
            draw(stamp, rng).save(options.output / "images" / image)
            yield from lines(stamp, image)


def write(path: Path, records: Iterable[dict]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {counted(len(lines), 'lines')}")


def main(arguments: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--stamps", type=Path, default=STAMPS, help=f"folder of the stamps; `{INSTALL}` fills this one")
    parser.add_argument("--output", type=Path, default=ROOT / "dataset/data/stamps")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--held_out", type=float, default=0.2, help="share of the stamps that training never shows")
    parser.add_argument("--drawings", type=int, default=3, help="pictures of each stamp to learn from")
    options = parser.parse_args(arguments)
    if not 0 < options.held_out < 1 or options.drawings < 1:
        parser.error("--held_out must lie between 0 and 1, and --drawings be at least 1")
    stamps, others = read_stamps(options.stamps)
    train, held_out = split(stamps, options.held_out, options.seed)
    if not train or not held_out:
        raise UserError(f"{counted(len(stamps), 'stamps')} leave nothing on one side of --held_out {options.held_out}")
    shares = f"{counted(len(stamps), 'stamps')}, of which {len(held_out):,} are held out"
    print(f"{options.stamps}: {shares}; left out: " + ", ".join(f"{n:,} {reason}" for reason, n in others.items()))
    (options.output / "images").mkdir(parents=True, exist_ok=True)
    again = Random(f"redrawn:{options.seed}").sample(train, min(len(train), len(held_out)))
    for name, chosen, drawings in (
        ("train", train, options.drawings),
        ("held_out", held_out, 1),
        ("redrawn", again, 1),
    ):
        write(options.output / f"{name}.jsonl", records(name, chosen, drawings, options))
    credit = "Pictures and captions: Tux Paint Stamps (https://tuxpaint.org/stamps), Bill Kendrick and others, GPL-2."
    (options.output / "LICENSE.txt").write_text(credit + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"build_stamps: {error}") from error
