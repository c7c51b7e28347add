"""Engines that want other versions of packages than ours: each is asked in a venv of its own, by a script beside this.

They know nothing of this project: a file has the questions, another the answers. `make mlx vllm` installs them.
"""

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from dataset.exam.answering import BRIEF
from dataset.exam.questions import Question
from model.files import ROOT
from model.messages import UserError
from model.processing import content_parts

SCRIPTS = {"mlx": "ask_mlx.py", "vllm": "ask_vllm.py"}
SAID = 2000  # characters of an engine's last words


def python_of(name: str) -> Path:
    """The interpreter that has it. Raises UserError where it is not installed, or its install did not end."""
    venv = ROOT / f".venv-{name}"
    if not (venv / ".installed").is_file():
        raise UserError(f"{name} is not installed: `make {name}` installs it")
    return venv / "bin/python"


def ask_apart(name: str, path: str, questions: Sequence[Question]) -> list[str]:
    """A stock folder's answers to held-out questions, in the dtype that its tensors have."""
    with tempfile.TemporaryDirectory() as directory:
        asked = [_asked(question, Path(directory) / str(number)) for number, question in enumerate(questions)]
        (texts,) = ask_folders(name, {Path(path).resolve(): asked}, BRIEF.max_new_tokens)
    return [text.strip() for text in texts]


def _asked(question: Question, prefix: Path) -> dict:
    """Messages whose content is parts, and the paths of their pictures, which are written here."""
    messages = [
        {**m, "content": [{"type": kind} if kind == "image" else {"type": kind, "text": text}
                          for kind, text in content_parts(m["content"])]}
        for m in question.sample.messages[:-1]
    ]  # fmt: skip
    paths = []
    for number, picture in enumerate(question.sample.open_pictures()):
        paths.append(f"{prefix}_{number}.png")
        picture.save(paths[-1])
    return {"messages": messages, "pictures": paths}


def ask_folders(name: str, folders: Mapping[Path, Sequence[dict]], max_new_tokens: int) -> list[list[str]]:
    """What an engine answers, greedily, to the questions for each folder: {"messages": [...], "pictures": [paths]}.

    Raises:
        UserError: it is not installed, or ended otherwise than with an answer to each.
    """
    job = {"folders": {str(folder): list(asked) for folder, asked in folders.items()}, "max_new_tokens": max_new_tokens}
    with tempfile.TemporaryDirectory() as directory:
        asked, answered = Path(directory) / "asked.json", Path(directory) / "answers.json"
        asked.write_text(json.dumps(job), encoding="utf-8")
        command = [python_of(name), Path(__file__).with_name(SCRIPTS[name]), asked, answered]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"{name} ended with {done.returncode}: {(done.stderr or done.stdout)[-SAID:]}")
        texts = json.loads(answered.read_text(encoding="utf-8"))
    if list(map(len, texts)) != list(map(len, folders.values())):
        raise UserError(f"{name} has not answered every question")
    return texts
