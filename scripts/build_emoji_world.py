"""Write Emoji World as files in the ordinary format: JSONL beside a folder of pictures.

python scripts/build_emoji_world.py --output dataset/data

llm.jsonl        conversations without pictures: questions about described scenes, and names in the other language
pretrain.jsonl   a picture and its caption each (stage 1)
sft.jsonl        several lines a picture: single questions, a caption, a conversation of several questions (stage 2);
                 with --relations also what is beside what; --pairs adds questions about two pictures, --boxes such
                 as are answered with boxes (docs/grounding.md)
held_out.jsonl   one question a line, six kinds equally often, on scenes and pairs of concepts that train never has
held_out_boxes.jsonl    with --boxes: on the same pictures the box of one thing, and those of all
exam.jsonl       the harder exam, whose families dataset/exam/emoji_exam.py tells
choices.tsv      questions with four choices on such scenes, as VLMEvalKit's tables hold them
"""

import argparse
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from random import Random

from dataset import emoji_boxes
from dataset import emoji_talks as talks
from dataset import emoji_words as words
from dataset import emoji_world as world
from dataset.exam.emoji_choices import emoji_choices
from dataset.exam.emoji_exam import write_exam
from dataset.exam.table import write_table
from model.command_line import CommandLine
from model.files import ROOT
from model.messages import UserError, counted
from model.tokenizer_files import load_tokenizer

ZIPF = 1.0  # of the names in the base decoder's texts, as in any language
ENDINGS = {"en": ("", ".", "?", "!"), "zh": ("", "。", "？", "！")}
SEEDS = {"llm": 1, "pretrain": 2, "sft": 3, "held_out": 4, "pairs": 6}  # so that no two files share a scene


def practice(arguments: argparse.Namespace) -> Iterator[dict]:
    """The base decoder's. One scene in sixteen is a dictionary instead, one in sixty-four a plain caption."""
    for index in range(arguments.llm):
        rng = Random(f"reading:{arguments.seed}:{index}")
        scene = world.sample_scene(seed_of("llm", arguments), "train", index, arguments.concepts, zipf=ZIPF)
        if index % 16 == 0:
            messages = talks.translation_conversation(rng, arguments.questions, arguments.concepts, ZIPF)
            yield {"conversations": messages}
        elif index % 64 == 1:
            yield {"text": words.caption(scene, rng.choice(world.LANGUAGES))}
        else:
            for messages in talks.reading_conversations(scene, rng, arguments.questions, arguments.concepts):
                yield {"conversations": messages}


def strangers(arguments: argparse.Namespace) -> Iterator[dict]:
    """Words that Emoji World mostly lacks, in no order, asked and answered.

    A decoder that has read nothing but Emoji World is certain of it: where somebody else's words stand it was at three
    times the loss of a uniform guess. From these it learns that strange words follow strange ones.
    """
    tokenizer = load_tokenizer()
    tokens = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]  # the commoner, the earlier
    patterns = {"en": " [a-z]{2,}", "zh": "[\u4e00-\u9fff]+"}
    known = {
        language: [token for token in tokens if re.fullmatch(pattern, token)] for language, pattern in patterns.items()
    }
    weights = {language: [1 / (rank + 10) for rank in range(len(known[language]))] for language in known}
    rng = Random(f"strangers:{arguments.seed}")
    for _ in range(arguments.strangers):
        language = rng.choice(world.LANGUAGES)
        texts = [rng.choices(known[language], weights[language], k=rng.randint(1, 12)) for _ in range(2)]
        pair = ["".join(text).strip().capitalize() + rng.choice(ENDINGS[language]) for text in texts]
        yield {"conversations": talks.conversation([pair])}


def training(stage: str, arguments: argparse.Namespace) -> Iterator[dict]:
    for index, rng, scene, image in draw_scenes(stage, arguments):
        if stage == "pretrain":
            conversations = [talks.caption_conversation(scene, rng)]
        else:
            conversations = talks.question_conversations(
                scene, rng, arguments.questions, arguments.concepts, arguments.relations, arguments.behind
            )
            if arguments.boxes:  # first, because the last may have its picture behind, and then shares no row
                conversations = emoji_boxes.box_conversations(scene, boxes_rng(stage, arguments, index)) + conversations
        for messages in conversations:
            yield {"image": image, "conversations": messages}


def pairs(arguments: argparse.Namespace) -> Iterator[dict]:
    for index in range(arguments.pairs):
        rng = Random(f"pairs:{arguments.seed}:{index}")
        *scenes, shared = world.sample_pair(seed_of("pairs", arguments), "train", index, arguments.concepts)
        images = [f"pairs_{index:06d}_{number}.jpg" for number in (1, 2)]
        for scene, image in zip(scenes, images, strict=True):
            save_picture(scene, arguments.output, image)
        for messages in talks.pair_conversations(scenes, shared, rng, arguments.questions):
            yield {"image": ",".join(images), "conversations": messages}


def held_out(arguments: argparse.Namespace) -> Iterator[dict]:
    for index, rng, scene, image in draw_scenes("held_out", arguments):
        for number, kind in enumerate(words.KINDS):
            language = world.LANGUAGES[(index + number) % 2]
            pair = words.ask(scene, kind, language, rng, arguments.concepts)
            messages = talks.conversation([pair], "<image>")
            yield {"image": image, "kind": kind, "language": language, "conversations": messages}


def held_out_boxes(arguments: argparse.Namespace) -> Iterator[dict]:
    """Questions about the pictures that held_out has written."""
    for index, scene, image in scenes_of("held_out", arguments):
        rng = boxes_rng("held_out", arguments, index)
        for number, kind in enumerate(emoji_boxes.KINDS):
            language = world.LANGUAGES[(index + number) % 2]
            messages = talks.conversation([emoji_boxes.ask(scene, kind, language, rng)], "<image>")
            yield {"image": image, "kind": kind, "language": language, "conversations": messages}


def boxes_rng(name: str, arguments: argparse.Namespace, index: int) -> Random:
    """A generator of their own: with boxes and without, everything else of a file is the same."""
    return Random(f"boxes:{name}:{arguments.seed}:{index}")


def scenes_of(name: str, arguments: argparse.Namespace) -> Iterator[tuple[int, world.Scene, str]]:
    """Scenes of a file, each with its index and the name of its picture."""
    split = "held_out" if name == "held_out" else "train"
    for index in range(getattr(arguments, name)):
        most = arguments.max_things if split == "train" else 4
        scene = world.sample_scene(seed_of(name, arguments), split, index, arguments.concepts, most)
        yield index, scene, f"{name}_{index:06d}.jpg"


def draw_scenes(name: str, arguments: argparse.Namespace) -> Iterator[tuple[int, Random, world.Scene, str]]:
    """The same with a generator for its words, and the picture now written."""
    for index, scene, image in scenes_of(name, arguments):
        save_picture(scene, arguments.output, image)
        yield index, Random(f"{name}:{arguments.seed}:{index}"), scene, image


def save_picture(scene: world.Scene, output: Path, name: str) -> None:
    world.render(scene)[0].save(output / "images" / name, quality=world.QUALITY)


def seed_of(name: str, arguments: argparse.Namespace) -> int:
    return arguments.seed * 10 + SEEDS[name]


def write(path: Path, records: Iterable[dict]) -> None:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    print(f"{path}: {counted(count, 'lines')}")


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "dataset/data")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--concepts", type=int, default=None, help="only the first so many; all without it")
    parser.add_argument(
        "--questions", type=int, default=9, help="single questions a scene, beside a talk and a caption"
    )
    parser.add_argument("--max_things", type=int, default=4, help="things a picture of the stages, at most")
    parser.add_argument("--relations", action="store_true", help="ask what is beside what, too, and what is larger")
    parser.add_argument("--boxes", action="store_true", help="ask where things are, to be answered with boxes, too")
    parser.add_argument(
        "--behind",
        type=float,
        default=talks.BEHIND,
        help="share of the pictures that stand behind a question",
    )
    parser.add_argument("--llm", type=int, default=0, help="scenes in words for the base decoder")
    parser.add_argument("--strangers", type=int, default=0, help="and so many talks in other words, for the same file")
    parser.add_argument("--pretrain", type=int, default=4000, help="captioned pictures")
    parser.add_argument("--sft", type=int, default=8000, help="pictures with questions")
    parser.add_argument("--pairs", type=int, default=0, help="two pictures with questions, for the same file")
    parser.add_argument("--held_out", type=int, default=240, help="held-out pictures, six questions each")
    parser.add_argument("--exam", type=int, default=0, help="held-out scenes of each family of the harder exam")
    parser.add_argument("--choices", type=int, default=0, help="held-out questions with four choices, five a picture")
    arguments = parser.parse_args()
    (arguments.output / "images").mkdir(parents=True, exist_ok=True)
    if arguments.llm:
        write(arguments.output / "llm.jsonl", chain(practice(arguments), strangers(arguments)))
    if arguments.pretrain:
        write(arguments.output / "pretrain.jsonl", training("pretrain", arguments))
    if arguments.sft or arguments.pairs:
        write(arguments.output / "sft.jsonl", chain(training("sft", arguments), pairs(arguments)))
    if arguments.held_out:
        write(arguments.output / "held_out.jsonl", held_out(arguments))
        if arguments.boxes:
            write(arguments.output / "held_out_boxes.jsonl", held_out_boxes(arguments))
    if arguments.exam:
        count = write_exam(arguments.output, arguments.exam, arguments.seed)
        print(f"{arguments.output / 'exam.jsonl'}: {counted(count, 'lines')}")
    if arguments.choices:
        path = arguments.output / "choices.tsv"
        write_table(emoji_choices(arguments.choices, arguments.seed, arguments.concepts), path)
        print(f"{path}: {counted(arguments.choices, 'questions')}")
    (arguments.output / "LICENSE.txt").write_text(world.attribution() + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"build_emoji_world: {error}") from error
