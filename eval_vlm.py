"""Ask a trained model about pictures in a terminal, or put a whole file of questions to it.

    python eval_vlm.py --weight out/sft_vlm_192.safetensors --image cat.jpg --prompt "What is in the picture?"
    python eval_vlm.py --weight out/sft_vlm_192.safetensors --image cat.jpg              # asks for questions
    python eval_vlm.py --weight out/sft_vlm_192.safetensors --image a.jpg b.jpg --prompt "What differs?" "And where?"
    python eval_vlm.py --weight out/sft_vlm_192.safetensors --data held_out.jsonl --output answers.jsonl

Files given to --image together belong to one conversation; a folder begins one about each of its pictures. Several
--prompt are its turns. --weight also takes a folder as transformers saves it: ours, or a stock Llava.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from dataset.formats import DataError, Sample, read_samples
from model.command_line import CommandLine
from model.errors import UserError
from model.processing import SampleError, open_picture
from scripts.answer import Answer, Answerer, Interrupted, Options, assistant_turn, user_turn

PICTURE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}


def picture_groups(paths: list[Path]) -> list[list[Path]]:
    """The pictures of each conversation: all files together, and every picture of a folder alone."""
    files = [path for path in paths if not path.is_dir()]
    groups = [files] if files or not paths else []
    for folder in (path for path in paths if path.is_dir()):
        found = [[path] for path in sorted(folder.iterdir()) if path.suffix.lower() in PICTURE_ENDINGS]
        if not found:
            raise UserError(f"{folder} holds no picture ({', '.join(sorted(PICTURE_ENDINGS))})")
        groups += found
    return groups


def load_pictures(paths: list[Path]) -> list[Image.Image]:
    pictures = []
    for path in paths:
        try:
            pictures.append(open_picture(path))
        except SampleError as error:
            raise UserError(f"--image {path}: {error}") from error
    return pictures


def speed(answer: Answer) -> str:
    return (
        f"{answer.seconds_to_first * 1000:.0f} ms to the first token, {answer.tokens_per_second:.0f} tokens/s, "
        f"{answer.prompt_tokens} + {answer.new_tokens} tokens{', stopped' if answer.stopped else ''}"
    )


def facts(answer: Answer) -> dict:
    """What --json and --output say of an answer."""
    return {
        "answer": answer.text.strip(), "prompt_tokens": answer.prompt_tokens, "new_tokens": answer.new_tokens,
        "seconds_to_first": round(answer.seconds_to_first, 4),
        "tokens_per_second": round(answer.tokens_per_second, 1), "stopped": answer.stopped,
    }  # fmt: skip


class Stop:
    """Ctrl-C ends the answer; a second time within it, the program."""

    def __enter__(self) -> "Stop":
        self.asked = False
        self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_error) -> None:
        signal.signal(signal.SIGINT, self.before)

    def __call__(self) -> bool:
        return self.asked

    def _ask(self, *_signal) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def questions(prompts: list[str] | None) -> Iterator[str]:
    """Those of the command line, or those typed until an empty line or the end of input."""
    if prompts:
        yield from prompts
        return
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        yield question


def converse(answerer: Answerer, paths: list[Path], options: argparse.Namespace, drawing: Options) -> None:
    """The turns of one conversation about the same pictures."""
    pictures, messages = load_pictures(paths), []
    if not options.prompt:
        print(f"{len(pictures)} pictures. Ask; an empty line ends.", file=sys.stderr)
    for question in questions(options.prompt):
        messages.append(user_turn(question, 0 if messages else len(pictures)))
        with Stop() as stop:
            show = (lambda text: None) if options.json else lambda text: print(text, end="", flush=True)
            answer = answerer.stream(messages, pictures, drawing, show, stop)
        if options.json:
            asked = {"pictures": [str(path) for path in paths], "question": question}
            print(json.dumps({**asked, **facts(answer)}, ensure_ascii=False), flush=True)
        else:
            print()
            print(f"[{speed(answer)}]", file=sys.stderr)
        messages.append(assistant_turn(answer.text))


def split_truth(sample: Sample) -> tuple[list[dict], str | None]:
    """The messages up to the last question, and the answer that follows it in the file, if one does."""
    messages = sample.messages
    truth = messages[-1]["content"].strip() if messages and messages[-1].get("role") == "assistant" else None
    asked = messages if truth is None else messages[:-1]
    if not asked or asked[-1].get("role") != "user":
        raise DataError(f"{sample.where}: there is no question to answer: the last turn, or the one before an "
                        "assistant's, must be a user's")  # fmt: skip
    return asked, truth


def answer_file(answerer: Answerer, options: argparse.Namespace, drawing: Options) -> dict:
    """Answers to every line, in batches, each written as soon as it is there; returns counts and speed."""
    samples = read_samples(options.data, options.images_path)
    count = min(len(samples), options.limit or len(samples))
    started, tokens, right, judged = time.perf_counter(), 0, 0, 0
    with options.output.open("w", encoding="utf-8") as file:
        for start in range(0, count, options.batch_size):
            chunk = [samples[number] for number in range(start, min(start + options.batch_size, count))]
            split = [split_truth(sample) for sample in chunk]
            asked = [(m, sample.open_pictures()) for (m, _), sample in zip(split, chunk, strict=True)]
            try:
                answers = answerer.batch(asked, drawing)
            except SampleError as error:
                raise UserError(f"{chunk[0].where} to {chunk[-1].where}: {error}") from error
            for sample, (messages, truth), answer in zip(chunk, split, answers, strict=True):
                record = {"where": sample.where, "pictures": [str(p) for p in sample.pictures if isinstance(p, Path)]}
                record |= {"question": messages[-1]["content"].replace("<image>", "").strip(), **facts(answer)}
                if truth is not None:
                    record |= {"truth": truth, "exact": answer.text.strip() == truth}
                    judged, right = judged + 1, right + record["exact"]
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                tokens += answer.new_tokens
            file.flush()
            print(f"\r{start + len(chunk)} of {count}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    seconds = time.perf_counter() - started
    return {
        "answers": count, "judged": judged, "exact": right, "exact_match": round(right / judged, 4) if judged else None,
        "seconds": round(seconds, 2), "answers_per_second": round(count / seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1),
    }  # fmt: skip


def report(found: dict, options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(found))
        return
    if found["judged"]:
        print(f"exactly right: {found['exact']} of {found['judged']} ({100 * found['exact_match']:.1f} %)")
    print(f"{found['answers']} answers in {options.output}")
    print(f"[{found['seconds']:.1f} s, {found['answers_per_second']} answers/s, {found['tokens_per_second']} tokens/s]",
          file=sys.stderr)  # fmt: skip


def parse() -> argparse.Namespace:
    parser = CommandLine(__doc__)
    parser.add_argument("--weight", type=Path, required=True, help=".safetensors of a stage, MiniMind's .pth, a folder")
    parser.add_argument("--vision_model", help="folder of the CLIP tower; by default the one trained with")
    parser.add_argument("--image", type=Path, nargs="+", default=[], help="files for one conversation, or folders")
    parser.add_argument("--prompt", nargs="+", help="the question, or the turns; without it you are asked")
    parser.add_argument("--data", type=Path, help="a .jsonl or .parquet of questions, instead of --image and --prompt")
    parser.add_argument("--images_path", type=Path, help="folder of a .jsonl's pictures; by default `images` beside it")
    parser.add_argument("--output", type=Path, help="where answers to --data go; by default beside it, _answers.jsonl")
    parser.add_argument("--batch_size", type=int, default=16, help="questions of --data at once")
    parser.add_argument("--limit", type=int, help="only the first so many lines of --data")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of text")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    parser.add_argument("--top_p", type=float, default=0.9, help="with a temperature: share of likelihood to draw from")
    parser.add_argument("--top_k", type=int, default=0, help="with a temperature: how many tokens to draw from; 0: all")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    options = parser.parse_args()
    if options.data and (options.image or options.prompt):
        parser.error("--data brings its own pictures and questions: leave --image and --prompt out")
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
        drawing = Options(options.max_new_tokens, options.temperature, options.top_p, options.top_k, options.seed)
        groups = [] if options.data else picture_groups(options.image)
        answerer = Answerer.from_weight(options.weight, options.vision_model, options.device, options.dtype)
        if options.data:
            report(answer_file(answerer, options, drawing), options)
        for group in groups:
            if len(groups) > 1 and not options.json:
                print(f"{group[0].name}: ", end="", flush=True)
            converse(answerer, group, options, drawing)
    except (UserError, OSError, Interrupted) as error:
        raise SystemExit(f"eval_vlm: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("eval_vlm: stopped") from None


if __name__ == "__main__":
    main()
