"""Tables of VLMEvalKit: what a cell may hold, rows that share a picture, and what is wrong with a row."""

import base64
import csv
import pickle
from pathlib import Path

import pytest

from dataset.options import ReadOptions
from dataset.readers.opening import read_samples
from dataset.samples import DataError
from helpers.data import encoded, make_picture

PICTURES = [encoded(make_picture(seed, 64), "PNG") for seed in range(3)]
CELLS = [base64.b64encode(content).decode() for content in PICTURES]
NAMES = ("index", "image", "question", "A", "B", "C", "answer", "category")


def write(path: Path, *rows: tuple, names: tuple = NAMES) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([names, *rows])
    return path


def test_choices(folder):
    path = write(
        folder / "x.tsv",
        ("7", CELLS[0], 'What is "this",\na\tcat?', "cat", "dog", "", "B", "animals"),
        ("9", "7", "And this?", "no", "猫", "0", "C", ""),
        ("11", str(CELLS[1:]), "Which?", "left", "right", "", "A", "place"),
        ("13", "", "What is two and two?", "3", "4", "", "B", "words"),
    )
    samples = read_samples(path)
    assert samples.describe().endswith("x.tsv: choices in a table with pictures in it, 4 records")
    assert [sample.pictures for sample in samples] == [(PICTURES[0],), (PICTURES[0],), tuple(PICTURES[1:]), ()]
    first = samples[0]
    assert [message["content"] for message in first.messages] == [
        '<image>\nQuestion: What is "this",\na\tcat?\nOptions:\nA. cat\nB. dog\n'
        "Please select the correct answer from the options above.",
        "B",
    ]
    assert [message["content"] for message in samples[1].messages][1] == "C"
    assert samples[2].messages[0]["content"].startswith("<image><image>\nQuestion: Which?")
    assert first.extra == {
        "index": "7", "question": 'What is "this",\na\tcat?', "A": "cat", "B": "dog", "category": "animals",
    }  # fmt: skip
    assert [sample.where for sample in samples] == [f"{path}:{line}" for line in (2, 4, 5, 6)]
    assert [sample.pictures for sample in pickle.loads(pickle.dumps(samples))] == [s.pictures for s in samples]


def test_questions_with_hints_names_and_several_answers(folder):
    hinted = write(folder / "h.tsv", ("1", "It is red.", "What?", "a", "b", "A"),
                   names=("index", "hint", "question", "A", "B", "answer"))  # fmt: skip
    assert read_samples(hinted)[0].messages[0]["content"].startswith("Hint: It is red.\nQuestion: What?\n")
    named = write(folder / "n.tsv", ("a.png", "What?", "['a cat', 'cat']"), ("['b.png', 'c.png']", "Is it?", "Yes"),
                  names=("image_path", "question", "answer"))  # fmt: skip
    samples = read_samples(named)
    assert [[picture.name for picture in sample.pictures] for sample in samples] == [["a.png"], ["b.png", "c.png"]]
    assert [sample.messages[1]["content"] for sample in samples] == ["a cat", "Yes"]
    short = write(folder / "s.tsv", ("c.png", "What?", "[sic]"), names=("image", "question", "answer"))
    assert read_samples(short)[0].pictures[0].name == "c.png"
    assert read_samples(short)[0].messages[1]["content"] == "[sic]"


def test_byte_order_mark_and_most_samples(folder):
    path = write(folder / "x.tsv", *(("a.png", f"What {n}?", "yes") for n in range(5)),
                 names=("image", "question", "answer"))  # fmt: skip
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\r\n", b"\n"))
    samples = read_samples(path, ReadOptions(max_samples=3))
    assert [sample.messages[0]["content"] for sample in samples] == [f"<image>\nWhat {n}?" for n in range(3)]
    assert samples.identity() == read_samples(path, ReadOptions(max_samples=3)).identity()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (("1", CELLS[0][:-5] + "!" * 8, "What?", "a", "b", "", "A", ""), r"x\.tsv:2: its 'image' .* is no base64"),
        (("1", CELLS[0], "What?", "a", "b", "", "C", ""), r"'answer' is 'C': it must be the letter of a choice, A, B"),
        (("1", CELLS[0], "What?", "a", "b", "", "AB", ""), "'answer' is 'AB'"),
        (("1", CELLS[0], "What?", "a", "b", "", "", ""), "'answer' is None: it must be the letter of a choice"),
        (("1", CELLS[0], "What?", "a", "", "c", "A", ""), "it has 1 choices: give at least two"),
        (("1", CELLS[0], "", "a", "b", "", "A", ""), "'question' must be text that is not empty, it is None"),
        (("1", CELLS[0], "What?", "a", "b", "", "A", "", "x"), "more fields than the first line has names"),
        (("1", "['a', 3]", "What?", "a", "b", "", "A", ""), "'image' is the list .*it must hold texts"),
        (("1", "12", "What?", "a", "b", "", "A", ""), "12: the file does not exist"),
    ],
)
def test_what_is_wrong_with_a_row(row, said, folder):
    path = write(folder / "x.tsv", row)
    with pytest.raises(DataError, match=said):
        read_samples(path, ReadOptions(data_format="choices"))[0].open_pictures()


def test_what_is_wrong_with_a_file(folder):
    path = folder / "x.tsv"
    path.write_text('question\tanswer\n"What?\tyes\n')
    with pytest.raises(DataError, match=r"x\.tsv"):
        read_samples(path)[0]
    path.write_text("question\tanswer\n")
    with pytest.raises(DataError, match="holds no sample"):
        read_samples(path)
    samples = read_samples(write(path, ("a.png", "What?", "yes"), names=("image", "question", "answer")))
    path.write_text("shorter")
    with pytest.raises(DataError, match="has changed since it was opened"):
        samples[0]
