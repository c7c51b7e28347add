"""A folder that lmms-eval takes as a task: yaml and functions of scripts/judge/tasks, and the questions as a parquet.

Nothing in it names this machine or this project: whoever has lmms-eval can be given the folder.
"""

import io
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow
from pyarrow import parquet

from dataset.exam.choices import plain
from dataset.exam.questions import Question
from dataset.readers.opening import left_out
from dataset.samples import BadSample, Sample
from model.files import written_aside
from model.processing import IMAGE_TAG

TASKS = Path(__file__).parent / "tasks"
QUESTIONS = "questions.parquet"
# Our own tasks, and the folder of TASKS that each stands in.
OWN = {"emoji_world": "emoji_world"} | {
    f"emoji_choices{asked}": "emoji_choices" for asked in ("", "_letters", "_generated")
}
AS_STORED = ("RGB", "L", "CMYK")  # modes that everybody makes the same RGB of
_PICTURE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])  # as `datasets` stores one
_COLUMNS = {
    **dict.fromkeys(("where", "question", "plain", "answer", "kind", "language", "category"), pyarrow.string()),
    "choices": pyarrow.list_(pyarrow.string()),
    "images": pyarrow.list_(_PICTURE),
}


def write_task(name: str, questions: Sequence[Question], folder: Path) -> Path:
    """folder/name, with copies of scripts/judge/tasks/name and utils.py, and the questions.

    A harness asks one thing at a time: questions with earlier turns are left out, and a line on stderr says so.

    Raises:
        UserError: none of the questions stands alone.
    """
    target = folder / name
    shutil.copytree(TASKS / name, target, dirs_exist_ok=True)
    shutil.copy(TASKS / "utils.py", target)
    write_questions(questions, target / QUESTIONS)
    return target


def write_questions(questions: Sequence[Question], path: Path) -> None:
    """A row for each, pictures as bytes; score.py reads the file again."""
    alone = [question for question in questions if len(question.sample.messages) == 2]
    if bad := [
        BadSample(question.sample.where, "it has earlier turns, and a harness asks one question at a time")
        for question in questions
        if len(question.sample.messages) != 2
    ]:
        print(left_out(bad, len(questions), "questions"), file=sys.stderr)
    table = pyarrow.Table.from_pylist([_row(question) for question in alone], _schema())
    with written_aside(path) as aside:
        parquet.write_table(table, aside, row_group_size=100)


def _row(question: Question) -> dict:
    sample = question.sample
    sample.refuse_videos("a judge")
    return {
        "where": sample.where.rpartition("/")[2],  # without the folders of this machine
        "question": _text(question),
        "plain": _text(plain(question)) if question.choices else None,  # without its choices
        "answer": question.truth,
        "kind": question.kind,
        "language": question.language,
        "category": question.category,
        "choices": list(question.choices),
        "images": [{"bytes": _stored(sample, number), "path": None} for number in range(len(sample.pictures))],
    }


def _text(question: Question) -> str:
    """With <image> where pictures go, but for a single one that comes first, where every wrapper puts it by itself."""
    text = question.sample.messages[0]["content"]
    return text.removeprefix(f"{IMAGE_TAG}\n") if text.count(IMAGE_TAG) == 1 else text


def _stored(sample: Sample, number: int) -> bytes:
    """The picture's file as it is, or a PNG of how our models see it, where others would see it otherwise."""
    picture = sample.pictures[number]
    if sample.open_picture(number, decode=False).mode in AS_STORED:
        return picture.read_bytes() if isinstance(picture, Path) else picture
    content = io.BytesIO()
    sample.open_picture(number).save(content, "PNG")
    return content.getvalue()


def _schema() -> pyarrow.Schema:
    """The columns, with what tells `datasets` (and the hub's viewer) which of them hold pictures."""
    text = {"dtype": "string", "_type": "Value"}
    features = {name: text for name in _COLUMNS}
    features |= {
        "choices": {"feature": text, "_type": "List"},
        "images": {"feature": {"_type": "Image"}, "_type": "List"},
    }
    return pyarrow.schema(list(_COLUMNS.items()), {"huggingface": json.dumps({"info": {"features": features}})})
