"""Held-out questions to our engine and to another: how many answers are the same, how many are right?

    python scripts/measure/agreement.py --weight out/sft_vlm_512.safetensors --data held_out.jsonl --engine mlx

The weights are converted as docs/deploy.md says for the engine, which reads the folder in a process of its own: in its
venv where it has one (`make .venv-mlx/.installed .venv-vllm/.installed`). Both answer greedily, in --dtype.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.exam.answering import BRIEF
from dataset.exam.questions import Question, read_questions
from dataset.samples import Sample
from model.command_line import CommandLine
from model.files import ROOT
from model.inference.answerer import Answerer
from model.messages import UserError
from model.processing import IMAGE_TAG

SAID = 2000  # characters of an engine's last words


@dataclass(frozen=True)
class Engine:
    """Who reads a folder, and with what."""

    script: str  # of this folder, that asks it
    flags: tuple[str, ...] = ()  # of convert_vlm.py
    venv: Path | None = None  # None: it is installed beside us

    @property
    def python(self) -> Path:
        """Raises UserError where its venv is not there, or its install did not end."""
        if self.venv is None:
            return Path(sys.executable)
        if not (self.venv / ".installed").is_file():
            raise UserError(f"{self.venv.name} is not there: make {self.venv.name}/.installed")
        return self.venv / "bin/python"


ENGINES = {
    "transformers": Engine("ask_transformers.py"),
    "mlx": Engine("ask_mlx.py", ("--engine", "mlx"), ROOT / ".venv-mlx"),
    "vllm": Engine("ask_vllm.py", ("--engine", "vllm"), ROOT / ".venv-vllm"),
}


def convert(weight: Path, engine: Engine, dtype: str, folder: Path) -> None:
    """The folder that docs/deploy.md has for the engine."""
    flags = ["--weight", weight, "--to", "llava", "--output", folder, "--dtype", dtype, *engine.flags]
    command = [sys.executable, ROOT / "scripts/convert_vlm.py", *flags, "--no_training_proof"]
    _run(command, "scripts/convert_vlm.py")


def question_for(sample: Sample, folder: Path) -> dict:
    """The last question of a conversation, for ask: messages whose content is parts, and the pictures' paths."""
    *before, asked, _ = sample.messages
    if before:
        raise UserError(
            f"{sample.where}: {len(before) + 1} questions in one conversation: this asks files that have one"
        )
    words = asked["content"].split(IMAGE_TAG)
    content = [{"type": "text", "text": words[0]}] if words[0] else []
    for text in words[1:]:
        content += [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
    pictures = []
    for number, picture in enumerate(sample.open_pictures()):
        pictures.append(str(folder / f"{sample.where.rpartition(':')[2]}_{number}.png"))
        picture.save(pictures[-1])
    return {"messages": [{**asked, "content": content}], "pictures": pictures}


def ask(engine: Engine, folder: Path, questions: Sequence[dict], max_new_tokens: int) -> list[str]:
    """What an engine answers to questions of question_for, greedily, in the dtype that the folder is written in.

    Raises:
        UserError: it is not installed, or ended otherwise than with an answer to each.
    """
    python = engine.python
    with tempfile.TemporaryDirectory() as directory:
        asked, answered = Path(directory) / "questions.json", Path(directory) / "answers.json"
        asked.write_text(json.dumps({"questions": list(questions), "max_new_tokens": max_new_tokens}))
        _run([python, Path(__file__).with_name(engine.script), folder, asked, answered], engine.script)
        texts = json.loads(answered.read_text(encoding="utf-8"))
    if len(texts) != len(questions):
        raise UserError(f"{engine.script} answered {len(texts)} of {len(questions)} questions")
    return texts


def _run(command: Sequence[object], name: str) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{name} ended with {done.returncode}: {(done.stderr or done.stdout)[-SAID:]}")


def compare(ours: Sequence[str], theirs: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    """Shares of all questions: the same answer, and the true one."""
    count = len(questions)
    truths = [question.truth for question in questions]
    return {
        "questions": count,
        "same": sum(a == b for a, b in zip(ours, theirs, strict=True)) / count,
        "right_ours": sum(a == b for a, b in zip(ours, truths, strict=True)) / count,
        "right_theirs": sum(a == b for a, b in zip(theirs, truths, strict=True)) / count,
    }


def parse_arguments() -> CommandLine:
    parser = CommandLine(__doc__)
    parser.add_argument("--weight", type=Path, required=True, help="what is asked")
    parser.add_argument("--data", type=Path, required=True, help="questions that have an answer, one a line")
    parser.add_argument("--engine", choices=ENGINES, required=True, help="who answers beside us")
    parser.add_argument("--questions", type=int, default=240, help="the first so many lines")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of both")
    parser.add_argument("--json", type=Path, help="write the figures and all answers there")
    return parser


def main() -> None:
    options = parse_arguments().parse_args()
    engine = ENGINES[options.engine]
    try:
        engine.python  # noqa: B018  # before minutes of work
        questions = read_questions(options.data, limit=options.questions)
        answerer = Answerer.from_weight(options.weight, device="cpu", dtype=options.dtype)
        prompts = [answerer.prompt(q.sample.messages[:-1], q.sample.open_pictures()) for q in questions]
        ours = [answerer.stream(prompt, BRIEF).text.strip() for prompt in prompts]
        with tempfile.TemporaryDirectory() as directory:
            folder, pictures = Path(directory) / "llava", Path(directory)
            convert(options.weight, engine, options.dtype, folder)
            asked = [question_for(question.sample, pictures) for question in questions]
            theirs = [text.strip() for text in ask(engine, folder, asked, BRIEF.max_new_tokens)]
    except UserError as error:
        raise SystemExit(f"agreement: {error}") from error
    figures = compare(ours, theirs, questions)
    print("{questions} questions: {same:.4f} the same; right: ours {right_ours:.4f}, ".format(**figures), end="")
    print(f"{options.engine} {figures['right_theirs']:.4f}")
    if options.json:
        records = [
            {"ours": a, options.engine: b, "truth": q.truth} for a, b, q in zip(ours, theirs, questions, strict=True)
        ]
        options.json.write_text(
            json.dumps({**figures, "answers": records}, ensure_ascii=False, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
