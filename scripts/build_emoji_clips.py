"""Write Emoji World's clips as files in the ordinary format: JSONL beside a folder of videos.

python scripts/build_emoji_clips.py --output dataset/data        # after: pip install -r requirements/video.txt

clips/                  224 x 224 pixels, 8 frames, one a second, H.264
pretrain_clips.jsonl    a clip and what each of its frames shows (stage 1)
sft_clips.jsonl         several lines a clip: single questions, from when to when each thing is there and which way it
                        goes, and what each frame shows (stage 2)
held_out_clips.jsonl    one question a line, of every kind that a clip can be asked, on clips whose things train never
                        shows together; all of them need the order of the frames
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from random import Random

from dataset import emoji_clip_words as words
from dataset.emoji_clips import RATE, Clip, draw_clip, sample_clip
from dataset.emoji_talks import conversation
from dataset.emoji_world import LANGUAGES, attribution
from model.command_line import CommandLine
from model.files import ROOT
from model.messages import UserError
from model.progress import progress_over
from model.video import write_video
from scripts.build_emoji_world import write

SEEDS = {"pretrain": 1, "sft": 2, "held_out": 3}  # so that no two files share a clip


def training(stage: str, arguments: argparse.Namespace) -> Iterator[dict]:
    for _, rng, clip, video in draw_clips(stage, arguments):
        if stage == "pretrain":
            talks = [words.log_conversation(clip, rng)]
        else:
            talks = words.question_conversations(clip, rng, arguments.questions)
        for messages in talks:
            yield {"video": video, "conversations": messages}


def held_out(arguments: argparse.Namespace) -> Iterator[dict]:
    for index, rng, clip, video in draw_clips("held_out", arguments):
        possible = words.askable(clip)
        for number, kind in enumerate(words.KINDS):
            if keys := [key for key in possible if key[0] == kind]:
                key, language = rng.choice(keys), LANGUAGES[(index + number) % 2]
                pair = words.ask(key, possible[key], language, rng)
                messages = conversation([pair], words.TAG)
                yield {"video": video, "kind": kind, "language": language, "conversations": messages}


def draw_clips(name: str, arguments: argparse.Namespace) -> Iterator[tuple[int, Random, Clip, str]]:
    """Clips of a file, each with its index, a generator for its words, and the name of its video, now written."""
    split = "held_out" if name == "held_out" else "train"
    for index in progress_over(range(getattr(arguments, name)), name, "clip"):
        clip = sample_clip(arguments.seed * 10 + SEEDS[name], split, index, arguments.concepts)
        video = f"clips/{name}_{index:06d}.mp4"
        write_video(arguments.output / video, draw_clip(clip), RATE)
        yield index, Random(f"clips:{name}:{arguments.seed}:{index}"), clip, video


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "dataset/data")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--concepts", type=int, default=128, help="only the first so many: short everyday names")
    parser.add_argument("--questions", type=int, default=9, help="single questions a clip, at most")
    parser.add_argument("--pretrain", type=int, default=600, help="clips with what each frame shows")
    parser.add_argument("--sft", type=int, default=2500, help="clips with questions")
    parser.add_argument("--held_out", type=int, default=200, help="held-out clips, up to seven questions each")
    arguments = parser.parse_args()
    try:
        (arguments.output / "clips").mkdir(parents=True, exist_ok=True)
        for stage in ("pretrain", "sft"):
            if getattr(arguments, stage):
                write(arguments.output / f"{stage}_clips.jsonl", training(stage, arguments))
        if arguments.held_out:
            write(arguments.output / "held_out_clips.jsonl", held_out(arguments))
        (arguments.output / "LICENSE.txt").write_text(attribution() + "\n")
    except UserError as error:
        raise SystemExit(f"build_emoji_clips: {error}") from error


if __name__ == "__main__":
    main()
