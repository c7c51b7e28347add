"""Ask a trained model about pictures in a terminal, or put a whole file of questions to it.

    python eval_vlm.py --image cat.jpg --prompt "What is in the picture?"
    python eval_vlm.py --weight out/sft_vlm_192.safetensors --image cat.jpg              # asks for questions
    python eval_vlm.py --weight out/sft_vlm_192.safetensors --image a.jpg b.jpg --prompt "What differs?" "And where?"
    python eval_vlm.py --weight out/sft_vlm_192.safetensors --video clip.mp4 --prompt "What came in last?"
    python eval_vlm.py --weight out/sft_vlm_192.safetensors --data held_out.jsonl --output answers.jsonl

Files given to --image together belong to one conversation, and those to --video behind them (docs/video.md); a folder
begins one about each of its pictures. Several --prompt are its turns. Without --weight the newest in out/ answers, or
what ships. --weight also takes a folder as transformers saves it: ours, or a stock Llava. --boxes FOLDER draws boxes of
answers on their pictures there.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image

from dataset.box_drawing import draw_boxes
from dataset.options import ReadOptions, add_read_flags
from dataset.readers.opening import left_out, open_data
from dataset.samples import BadSample, Sample
from model.command_line import CommandLine
from model.inference.answerer import (
    Answer,
    Answerer,
    Interrupted,
    Options,
    add_weight_flags,
    add_window_flag,
    assistant_turn,
    user_turn,
)
from model.inference.reader import Prompt
from model.messages import UserError, counted, did_you_mean
from model.pictures import SampleError, open_picture
from model.processing import IMAGE_TAG
from model.progress import progress_over
from model.video import open_video
from model.views import Frames
from scripts.demo.weights import weights_or_newest

Shown = TypeVar("Shown", Image.Image, Frames)
PICTURE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}


def picture_groups(paths: list[Path]) -> list[list[Path]]:
    """The pictures of each conversation: the files together, and every picture of a folder alone.

    Raises:
        UserError: a file is no picture, or a folder holds none.
    """
    files = [path for path in paths if not path.is_dir()]
    load_pictures(files)
    groups = [files] if files or not paths else []
    for folder in (path for path in paths if path.is_dir()):
        inside = [[path] for path in sorted(folder.iterdir()) if path.suffix.lower() in PICTURE_ENDINGS]
        if not inside:
            raise UserError(f"{folder} holds no picture ({', '.join(sorted(PICTURE_ENDINGS))})")
        groups += inside
    return groups


def load_pictures(paths: list[Path]) -> list[Image.Image]:
    return [load(open_picture, "--image", path) for path in paths]


def load_videos(answerer: Answerer, paths: list[Path]) -> list[Frames]:
    sight = answerer.processor.sight
    return [load(lambda path: open_video(path, sight.frames, sight.square), "--video", path) for path in paths]


def load(opener: Callable[[Path], Shown], flag: str, path: Path) -> Shown:
    """Raises UserError where it cannot be read."""
    try:
        return opener(path)
    except SampleError as error:
        meant = "" if path.exists() else did_you_mean(path)
        raise UserError(f"{flag} {path}: {error.reason}{meant}") from error


def speed(answer: Answer) -> str:
    return (
        f"{answer.seconds_to_first * 1000:.0f} ms to the first token, {answer.tokens_per_second:.0f} tokens/s, "
        f"{answer.prompt_tokens} + {answer.new_tokens} tokens{', stopped' if answer.stopped else ''}"
    )


def forgotten(answer: Answer) -> str:
    turns, pictures = answer.forgotten
    seen = f" with {counted(pictures, 'pictures')}" if pictures else ""
    return f"{counted(turns, 'turns')}{seen} forgotten to stay within --context_window"


def facts(answer: Answer) -> dict:
    """What --json and --output say of an answer."""
    return {
        "answer": answer.text.strip(), "prompt_tokens": answer.prompt_tokens, "new_tokens": answer.new_tokens,
        "seconds_to_first": round(answer.seconds_to_first, 4),
        "tokens_per_second": round(answer.tokens_per_second, 1), "stopped": answer.stopped,
        **({"forgotten_turns": answer.forgotten.turns} if answer.forgotten.turns else {}),
    }  # fmt: skip


@contextmanager
def stop_at_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C ends the answer: the function then says True. A second time within the answer, it ends the program."""
    asked = []

    def ask(*_signal: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def questions(prompts: list[str] | None) -> Iterator[str]:
    """Those of the command line, or those typed until an empty line or the end of input."""
    if prompts:
        yield from prompts
        return
    with suppress(EOFError):
        while question := input("> ").strip():
            yield question


@dataclass
class Drawings:
    """Boxes of answers, each on its conversation's last picture: files of a folder, if there is one."""

    folder: Path | None
    count: int = 0  # of the files so far

    def draw(self, shown: dict[Path, Image.Image | Frames], text: str) -> None:
        """shown: the pictures of the conversation. stderr says where, or that there is nothing to draw."""
        if self.folder is None:
            return
        pictures = [(path, one) for path, one in shown.items() if not isinstance(one, Frames)]
        path, picture = pictures[-1] if pictures else (None, None)
        drawn = draw_boxes(picture, text) if picture else None
        if drawn is None:
            print(f"[no {'box in the answer' if picture else 'picture'}, nothing drawn]", file=sys.stderr)
            return
        self.count += 1
        file = self.folder / f"{self.count}_{path.stem}.png"
        drawn.save(file)
        print(f"[boxes: {file}]", file=sys.stderr)


def converse_all(answerer: Answerer, groups: list[list[Path]], options: argparse.Namespace, sampling: Options) -> None:
    """A conversation about each group. Pictures that cannot be read are left out, and a line at the end says so."""
    refused, drawings = [], Drawings(options.boxes)
    videos = dict(zip(options.video, load_videos(answerer, options.video), strict=True))
    for group in groups:
        try:
            pictures = load_pictures(group)
        except UserError as error:
            refused.append(error)
            continue
        if len(groups) > 1 and not options.json:
            print(f"{group[0].name}: ", end="", flush=True)
        converse(answerer, dict(zip(group, pictures, strict=True)) | videos, options, sampling, drawings)
    if refused:
        print(left_out(refused, len(groups), "pictures"), file=sys.stderr)


def converse(
    answerer: Answerer, shown: dict[Path, Image.Image | Frames], options: argparse.Namespace, sampling: Options,
    drawings: Drawings,
) -> None:  # fmt: skip
    """The turns of one conversation about the same pictures and videos."""
    pictures, messages = list(shown.values()), []
    if not options.prompt:
        print(f"{counted(len(pictures), 'pictures')}. Ask; an empty line ends.", file=sys.stderr)
    for question in questions(options.prompt):
        messages.append(user_turn(question, 0 if messages else len(pictures)))
        with stop_at_interrupt() as stopped:
            show = (lambda text: None) if options.json else lambda text: print(text, end="", flush=True)
            answer = answerer.stream(answerer.prompt(messages, pictures), sampling, show, stopped)
        if options.json:
            asked = {"pictures": [str(path) for path in shown], "question": question}
            print(json.dumps({**asked, **facts(answer)}, ensure_ascii=False), flush=True)
        else:
            print()
            print(f"[{speed(answer)}]", file=sys.stderr)
            if answer.forgotten.turns:
                print(f"[{forgotten(answer)}]", file=sys.stderr)
        drawings.draw(shown, answer.text)
        messages.append(assistant_turn(answer.text))


@dataclass(frozen=True)
class Line:
    """A line of --data: its last question as a prompt, and the answer that follows it in the file, if one does."""

    sample: Sample
    question: str
    truth: str | None
    prompt: Prompt

    def record(self, answer: Answer) -> dict:
        """The line of --output."""
        pictures = [str(path) for path in self.sample.pictures if isinstance(path, Path)]
        record = {"where": self.sample.where, "pictures": pictures, "question": self.question, **facts(answer)}
        return (
            record if self.truth is None else {**record, "truth": self.truth, "exact": record["answer"] == self.truth}
        )


def read_line(answerer: Answerer, sample: Sample) -> Line:
    """Raises BadSample: there is no question, a picture cannot be read, or all of it is no prompt for the model."""
    messages, truth = sample.messages, None
    if messages and messages[-1].get("role") == "assistant":
        *messages, last = messages
        truth = last["content"].strip()
    if not messages or messages[-1].get("role") != "user":
        raise BadSample(sample.where, "there is no question to answer: the last turn, or the one before an "
                        "assistant's, must be a user's")  # fmt: skip
    try:
        prompt = answerer.prompt(messages, sample.open_shown(answerer.processor.sight))
    except SampleError as error:
        raise BadSample(sample.where, str(error)) from error
    return Line(sample, messages[-1]["content"].replace(IMAGE_TAG, "").strip(), truth, prompt)


def answer_file(answerer: Answerer, samples: Sequence[Sample], options: argparse.Namespace, sampling: Options) -> dict:
    """Answers to every line, in batches, each written as soon as it is there; returns counts and speed."""
    count = min(len(samples), options.limit or len(samples))
    started, tokens, exact, bad = time.perf_counter(), 0, [], []
    with options.output.open("w", encoding="utf-8") as file:
        for start in progress_over(range(0, count, options.batch_size), "answers", "batch"):
            lines = []
            for index in range(start, min(start + options.batch_size, count)):
                try:
                    lines.append(read_line(answerer, samples[index]))
                except BadSample as error:
                    bad.append(error)
            answers = answerer.batch([line.prompt for line in lines], sampling)
            for line, answer in zip(lines, answers, strict=True):
                record = line.record(answer)
                if line.truth is not None:
                    exact.append(record["exact"])
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                tokens += answer.new_tokens
            file.flush()
    if bad:
        print(left_out(bad, count, "lines"), file=sys.stderr)
    seconds, answered = time.perf_counter() - started, count - len(bad)
    return {
        "answers": answered, "left_out": len(bad), "judged": len(exact), "exact": sum(exact),
        "exact_match": round(sum(exact) / len(exact), 4) if exact else None, "seconds": round(seconds, 2),
        "answers_per_second": round(answered / seconds, 2), "tokens_per_second": round(tokens / seconds, 1),
    }  # fmt: skip


def report(totals: dict, options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(totals))
        return
    if totals["judged"]:
        print(f"exactly right: {totals['exact']} of {totals['judged']} ({100 * totals['exact_match']:.1f} %)")
    print(f"{counted(totals['answers'], 'answers')} in {options.output}")
    speeds = f"{totals['answers_per_second']} answers/s, {totals['tokens_per_second']} tokens/s"
    print(f"[{totals['seconds']:.1f} s, {speeds}]", file=sys.stderr)


def parse() -> argparse.Namespace:
    parser = CommandLine(__doc__)
    add_weight_flags(parser)
    add_window_flag(parser)
    parser.add_argument("--image", type=Path, nargs="+", default=[], help="files for one conversation, or folders")
    parser.add_argument("--video", type=Path, nargs="+", default=[], help="videos, behind the pictures")
    parser.add_argument("--prompt", nargs="+", help="the question, or the turns; without it you are asked")
    parser.add_argument("--data", type=Path, help="a .jsonl or .parquet of questions, instead of --image and --prompt")
    add_read_flags(parser)
    parser.add_argument("--output", type=Path, help="where answers to --data go; by default beside it, _answers.jsonl")
    parser.add_argument("--batch_size", type=int, default=16, help="questions of --data at once")
    parser.add_argument("--limit", type=int, help="only the first so many lines of --data")
    parser.add_argument("--boxes", type=Path, help="a folder: draw the boxes of answers on their pictures there")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of text")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    parser.add_argument("--top_p", type=float, default=0.9, help="with a temperature: share of likelihood to draw from")
    parser.add_argument("--top_k", type=int, default=0, help="with a temperature: how many tokens to draw from; 0: all")
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    if options.data and (options.image or options.video or options.prompt):
        parser.error("--data brings its own pictures and questions: leave --image, --video and --prompt out")
    if options.data and options.boxes:
        parser.error("--boxes is for --image and --prompt; scripts/score.py --sheet draws those of --data")
    if options.batch_size < 1 or (options.limit is not None and options.limit < 1):
        parser.error("--batch_size and --limit must be at least 1")
    if options.data and not options.output:
        options.output = options.data.with_name(f"{options.data.stem}_answers.jsonl")
    if options.data and options.output.resolve() == options.data.resolve():
        parser.error("--output would overwrite --data")
    return options


def main() -> None:
    options = parse()
    try:
        sampling = Options(options.max_new_tokens, options.temperature, options.top_p, options.top_k, options.seed)
        samples = open_data(options.data, ReadOptions.from_flags(options)) if options.data else []
        if options.data and not options.output.parent.is_dir():
            raise UserError(f"--output {options.output}: there is no folder {options.output.parent}")
        if options.boxes and not options.boxes.parent.is_dir():
            raise UserError(f"--boxes {options.boxes}: there is no folder {options.boxes.parent}")
        groups = [] if options.data else picture_groups(options.image)
        if options.boxes:
            options.boxes.mkdir(exist_ok=True)
        options.weight = weights_or_newest(options.weight)
        answerer = Answerer.from_flags(options)
        if options.data:
            report(answer_file(answerer, samples, options, sampling), options)
        else:
            converse_all(answerer, groups, options, sampling)
    except (UserError, OSError, Interrupted) as error:
        raise SystemExit(f"eval_vlm: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("eval_vlm: stopped") from None


if __name__ == "__main__":
    main()
