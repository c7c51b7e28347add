"""The folder that lmms-eval takes as a task: what score.py would ask, and nothing of this machine."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from PIL import Image
from pyarrow import parquet

from dataset.exam.questions import read_questions
from helpers.data import make_picture, write_jsonl
from model.messages import UserError
from scripts.judge.task_folder import QUESTIONS, write_task


def line(names: list[str], question: str, answer: str, **fields: str) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"image": names, "conversations": turns, **fields}


@pytest.fixture
def held_out(tmp_path) -> Path:
    """One picture, two of which one lets the white through, none, and a talk of two questions."""
    folder = tmp_path / "images"
    folder.mkdir()
    make_picture(1).save(folder / "a.png")
    make_picture(2).save(folder / "b.jpg")
    Image.new("RGBA", (32, 32), (200, 0, 0, 0)).save(folder / "clear.png")
    records = [
        line(["a.png"], "<image>\nWhat is it?", "a cat ", kind="what", language="en"),
        line(["b.jpg", "clear.png"], "<image> and <image>: what differs?", "all", kind="pair"),
        line([], "How many legs has a cat?", "four"),
        line(["a.png"], "<image>\nWhat is it?", "a cat"),
    ]
    records[-1]["conversations"] += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "yes"}]
    return write_jsonl(tmp_path / "held_out.jsonl", records)


def functions_of(task: Path):
    spec = importlib.util.spec_from_file_location("task_utils", task / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_parquet_asks_what_the_data_file_asks(held_out, tmp_path, capsys):
    asked = read_questions(held_out)
    task = write_task("emoji_world", asked, tmp_path / "tasks")
    assert "left out 1 of 4 questions" in (said := capsys.readouterr().err) and "it has earlier turns" in said
    again = read_questions(task / QUESTIONS)
    assert len(again) == 3
    for one, other in zip(asked, again, strict=False):
        assert (one.truth, one.kind, one.language) == (other.truth, other.kind, other.language)
        assert one.sample.messages[0] == other.sample.messages[0]
        pictures = zip(one.sample.open_pictures(), other.sample.open_pictures(), strict=True)
        assert all(mine.tobytes() == theirs.tobytes() for mine, theirs in pictures)


def test_pictures_are_stored_as_their_files_unless_others_would_see_them_otherwise(held_out, tmp_path):
    rows = parquet.read_table(write_task("emoji_world", read_questions(held_out), tmp_path) / QUESTIONS).to_pylist()
    stored = [picture["bytes"] for row in rows for picture in row["images"]]
    files = [(tmp_path / "images" / name).read_bytes() for name in ("a.png", "b.jpg", "clear.png")]
    assert [one == other for one, other in zip(stored, files, strict=True)] == [True, True, False]


def test_the_columns_say_which_of_them_hold_pictures(held_out, tmp_path):
    schema = parquet.read_schema(write_task("emoji_world", read_questions(held_out), tmp_path) / QUESTIONS)
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == schema.names
    assert [name for name in features if features[name].get("feature", {}).get("_type") == "Image"] == ["images"]


def test_nothing_in_the_folder_names_this_machine_or_this_project(held_out, tmp_path):
    task = write_task("emoji_world", read_questions(held_out), tmp_path / "tasks")
    files = {path.name: path.read_bytes() for path in task.iterdir()}
    assert sorted(files) == ["emoji_world.yaml", QUESTIONS, "utils.py"]
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    assert b"import scripts" not in files["utils.py"] and b"from dataset" not in files["utils.py"]


def test_what_the_yaml_names_is_there(held_out, tmp_path):
    task = write_task("emoji_world", read_questions(held_out), tmp_path)
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    said = yaml.load(Path(task / "emoji_world.yaml").read_text(), Loader=loader)
    columns = parquet.read_schema(task / said["dataset_kwargs"]["data_files"][said["test_split"]]).names
    assert {said["doc_to_text"], said["doc_to_target"]} <= {*columns}
    named = [
        said["doc_to_visual"],
        said["doc_to_messages"],
        said["process_results"],
        said["metric_list"][1]["aggregation"],
    ]
    assert all(callable(getattr(functions_of(task), name.removeprefix("utils."))) for name in named)


def test_an_answer_is_right_as_it_is_for_score(held_out, tmp_path):
    functions = functions_of(write_task("emoji_world", read_questions(held_out), tmp_path))
    row = {"answer": "a cat", "kind": "what"}
    results = [functions.exact_match(row, [said]) for said in (" a cat\n", "A cat", "a cat.", "")]
    assert [result["exact_match"] for result in results] == [1, 0, 0, 0]
    kinds = [{"kind": kind, "score": score} for kind, score in (("a", 1), ("a", 1), ("a", 0), ("b", 0))]
    assert functions.mean_of_kinds(kinds) == pytest.approx(1 / 3)


def test_a_chat_template_gets_pictures_where_they_stand_in_the_text(held_out, tmp_path):
    functions = functions_of(write_task("emoji_world", read_questions(held_out), tmp_path))
    a, b = make_picture(1), make_picture(2)

    def parts(question: str, *pictures: Image.Image) -> list[str]:
        (message,) = functions.doc_to_messages({"question": question, "images": pictures})
        return [part.get("text", "picture") for part in message["content"]]

    assert parts("What is it?", a) == ["picture", "What is it?"]
    assert parts("What is it?\n<image>", a) == ["What is it?\n", "picture"]
    assert parts("<image> and <image>: what differs?", a, b) == ["picture", " and ", "picture", ": what differs?"]
    assert parts("What does <image> mean?") == ["What does <image> mean?"] == parts("What does <image> mean?")


def test_talks_alone_are_refused(held_out, tmp_path):
    with pytest.raises(UserError, match="earlier turns"):
        write_task("emoji_world", read_questions(held_out)[3:], tmp_path)
