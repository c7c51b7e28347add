"""The same questions to our engine and to others': how many answers are the same, and how many are right.

    python scripts/measure/engines.py --data held_out.jsonl --limit 240 \\
        ours=out/sft_vlm_192.safetensors transformers=out/llava llama.cpp=out/gguf llama.cpp=out/gguf_q8

Each is an engine of ENGINES with what it loads; the first is the one that the others are compared with. mlx and vllm
are asked in venvs of their own (scripts/measure/apart.py). With --keep FILE the answers are written there, and those
that it holds are not asked for again. Answers are the likeliest ones; `as it is` before a folder of llama.cpp's sends
it pictures that nobody made square: `llama.cpp=as it is:out/gguf`.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from dataset.exam.answering import BRIEF, answer_all
from dataset.exam.figures import wilson_interval
from dataset.exam.questions import Question, read_questions
from dataset.options import ReadOptions
from model.command_line import CommandLine
from model.inference.answerer import Answerer
from model.messages import UserError
from model.processing import content_parts
from model.progress import progress_over
from scripts.measure.apart import SCRIPTS, ask_apart

AS_IT_IS = "as it is:"


def ask_ours(path: str, questions: Sequence[Question]) -> list[str]:
    """Our engine in float32: a weights file, or a folder of any format that it reads."""
    return answer_all(Answerer.from_weight(path, device="cpu", dtype="float32"), questions, "right", questions, 24)


def ask_transformers(path: str, questions: Sequence[Question]) -> list[str]:
    """A stock folder by transformers alone, in float32."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(path, local_files_only=True)
    answers = []
    for question in progress_over(questions, "transformers", "question"):
        pictures = iter(question.sample.open_pictures())
        messages = [
            {"role": m["role"], "content": [{"type": kind, kind: next(pictures) if kind == "image" else text}
                                            for kind, text in content_parts(m["content"])]}
            for m in question.sample.messages[:-1]
        ]  # fmt: skip
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**inputs, max_new_tokens=BRIEF.max_new_tokens, do_sample=False)
        text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.append(text.strip())
    return answers


def ask_llama_cpp(path: str, questions: Sequence[Question]) -> list[str]:
    """A folder of --to gguf in llama.cpp with its own defaults, on one thread."""
    from scripts.export.llama_cpp import LlamaCpp, Settings

    engine = LlamaCpp(Path(path.removeprefix(AS_IT_IS)), Settings(squeeze=not path.startswith(AS_IT_IS)))
    return [
        engine.ask(q.sample.messages[:-1], q.sample.open_pictures(), BRIEF.max_new_tokens).text.strip()
        for q in progress_over(questions, "llama.cpp", "question")
    ]


ENGINES: dict[str, Callable[[str, Sequence[Question]], list[str]]] = {
    "ours": ask_ours,
    "transformers": ask_transformers,
    "llama.cpp": ask_llama_cpp,
    **{name: partial(ask_apart, name) for name in SCRIPTS},
}


def compare(questions: Sequence[Question], answers: dict[str, list[str]]) -> dict[str, dict]:
    """By engine: exact match with its interval, and the share of answers that are the first engine's."""
    reference = next(iter(answers.values()))
    found = {}
    for name, texts in answers.items():
        right = sum(text == question.truth for text, question in zip(texts, questions, strict=True))
        same = sum(text == other for text, other in zip(texts, reference, strict=True))
        found[name] = {
            "count": len(texts),
            "exact_match": round(right / len(texts), 4),
            "interval": wilson_interval(right, len(texts)),
            "same": round(same / len(texts), 4),
        }
    return found


def table(found: dict[str, dict]) -> str:
    first = next(iter(found))
    lines = [f"{found[first]['count']} questions", f"| engine | exact match | the same as {first} |", "|---|---|---|"]
    for name, figures in found.items():
        low, high = figures["interval"]
        lines.append(f"| {name} | {figures['exact_match']:.4f} ({low:.2f} to {high:.2f}) | {figures['same']:.4f} |")
    return "\n".join(lines)


def read_kept(path: Path | None, questions: Sequence[Question]) -> dict[str, list[str]]:
    """Answers of an earlier call. Raises UserError where they are to other questions."""
    if path is None or not path.is_file():
        return {}
    kept = json.loads(path.read_text(encoding="utf-8"))
    if kept["questions"] != [question.sample.where for question in questions]:
        raise UserError(f"--keep {path} has answers to other questions: name another file, or the same --data, --limit")
    return kept["answers"]


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("engines", nargs="*", metavar="ENGINE=PATH", help=f"ENGINE is one of {', '.join(ENGINES)}")
    parser.add_argument("--data", type=Path, required=True, help="held-out questions, a file or a folder of any format")
    parser.add_argument("--images_path", default="", help="folder of the pictures; by default images/ beside the data")
    parser.add_argument("--limit", type=int, help="only the first so many lines")
    parser.add_argument("--keep", type=Path, help="answers are kept here, and not asked for again")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if unknown := [one for one in options.engines if one.partition("=")[0] not in ENGINES or "=" not in one]:
        parser.error(f"{unknown[0]}: an engine is given as NAME=PATH, NAME one of {', '.join(ENGINES)}")
    try:
        questions = read_questions(options.data, ReadOptions(images_path=options.images_path), options.limit)
        answers = read_kept(options.keep, questions)
        for one in options.engines:
            name, _, path = one.partition("=")
            if one not in answers:
                answers[one] = ENGINES[name](path, questions)
            if options.keep:
                kept = {"questions": [question.sample.where for question in questions], "answers": answers}
                options.keep.write_text(json.dumps(kept, ensure_ascii=False, indent=1), encoding="utf-8")
        if not answers:
            parser.error("name an engine, as ours=out/sft_vlm_192.safetensors")
    except (UserError, OSError) as error:
        raise SystemExit(f"engines: {error}") from error
    found = compare(questions, answers)
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
