"""Write Emoji World's fine print as files in the ordinary format: JSONL beside a folder of pictures, 896 x 896 pixels.

python scripts/build_emoji_signs.py --output dataset/data/signs --concepts 128

pretrain.jsonl   a picture and its caption each (stage 1): things, signs, and what these say
sft.jsonl        the same pictures with several lines each: a question, or another caption (stage 2)
close_ups_pretrain.jsonl, close_ups_sft.jsonl
                 the same of pieces of other such scenes, 224 x 224 pixels: signs alone, in their own size, so that
                 they are read before they are searched for
held_out.jsonl   one question a line, six kinds equally often, on new scenes, whose signs have texts that training never
                 shows on boards of their colour
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from random import Random

from dataset import emoji_sign_words as words
from dataset import emoji_signs as signs
from dataset.emoji_talks import TAG, conversation
from dataset.emoji_world import LANGUAGES, QUALITY
from model.command_line import CommandLine
from model.files import ROOT
from model.messages import UserError
from scripts.build_emoji_world import write


def captions(arguments: argparse.Namespace) -> Iterator[dict]:
    """Writes the pictures that the questions are about, too."""
    for index in range(arguments.train):
        scene, image = scene_of("train", index, arguments)
        save_picture(scene, arguments.output, image)
        rng = Random(f"sign-captions:{arguments.seed}:{index}")
        yield {"image": image, "conversations": words.caption_conversation(scene, rng)}


def questions(arguments: argparse.Namespace) -> Iterator[dict]:
    for index in range(arguments.train):
        scene, image = scene_of("train", index, arguments)
        rng = Random(f"sign-questions:{arguments.seed}:{index}")
        for messages in words.question_conversations(scene, rng, arguments.concepts):
            yield {"image": image, "conversations": messages}


def close_ups(stage: str, arguments: argparse.Namespace) -> Iterator[dict]:
    for index in range(arguments.close_ups):
        scene, rng = scene_of("train", arguments.train + index, arguments)[0], Random(f"{arguments.seed}:{index}")
        close_up, image = signs.sample_close_up(scene, rng), f"close_up_{index:06d}.jpg"
        if stage == "pretrain":
            picture = signs.render_close_up(scene, close_up)
            picture.save(arguments.output / "images" / image, quality=QUALITY)
            talks = [words.told_conversation(close_up.signs, rng)]
        else:
            talks = words.close_up_conversations(scene, close_up.signs, rng)
        for messages in talks:
            yield {"image": image, "conversations": messages}


def held_out(arguments: argparse.Namespace) -> Iterator[dict]:
    for index in range(arguments.held_out):
        scene, image = scene_of("held_out", index, arguments)
        save_picture(scene, arguments.output, image)
        rng = Random(f"sign-exam:{arguments.seed}:{index}")
        for number, kind in enumerate(words.KINDS):
            language = LANGUAGES[(index + number) % 2]
            messages = conversation([words.ask(scene, kind, language, rng, arguments.concepts)], TAG)
            yield {"image": image, "kind": kind, "language": language, "conversations": messages}


def scene_of(split: str, index: int, arguments: argparse.Namespace) -> tuple[signs.SignScene, str]:
    """A scene and the name of its picture."""
    return signs.sample_sign_scene(arguments.seed, split, index, arguments.concepts), f"{split}_{index:06d}.jpg"


def save_picture(scene: signs.SignScene, output: Path, name: str) -> None:
    signs.render(scene).save(output / "images" / name, quality=QUALITY)


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "dataset/data/signs")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--concepts", type=int, default=None, help="only the first so many things; all without it")
    parser.add_argument("--train", type=int, default=2000, help="pictures with captions and questions")
    parser.add_argument("--close_ups", type=int, default=0, help="pieces of other scenes, the size of a tile")
    parser.add_argument("--held_out", type=int, default=150, help="held-out pictures, six questions each")
    arguments = parser.parse_args()
    (arguments.output / "images").mkdir(parents=True, exist_ok=True)
    if arguments.train:
        write(arguments.output / "pretrain.jsonl", captions(arguments))
        write(arguments.output / "sft.jsonl", questions(arguments))
    for stage in ("pretrain", "sft") if arguments.close_ups else ():
        write(arguments.output / f"close_ups_{stage}.jsonl", close_ups(stage, arguments))
    if arguments.held_out:
        write(arguments.output / "held_out.jsonl", held_out(arguments))
    (arguments.output / "LICENSE.txt").write_text(signs.attribution() + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"build_emoji_signs: {error}") from error
