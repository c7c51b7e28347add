"""Data files to checked samples: both formats, and every error before training with file, line and cure."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from torch.utils.data import DataLoader

from dataset.options import ReadOptions
from dataset.readers.opening import read_samples
from dataset.samples import DataError
from helpers.data import SOUND, TURNS, construct, make_picture, open_lines, turns, write_jsonl, write_parquet
from model.processing import collate_training

# JSON lines


def test_fields_of_a_line(folder):
    images = folder / "images"
    records = [
        {"image": "a.png", "conversations": turns(1)},
        {"image": "a.png, b.png,c.png", "conversations": turns(3)},
        {"image": ["b.png", "a.png"], "conversations": turns(2)},
        {"conversations": turns(0)},
        {"image": "", "conversations": turns(0)},
        {"image": [], "conversations": turns(0)},
        {"image": None, "conversations": turns(0), "kind": "what", "language": "zh"},
        {"text": "plain 文字"},
    ]
    samples = open_lines(folder, *records)
    path = folder / "train.jsonl"
    assert [sample.where for sample in samples] == [f"{path}:{number}" for number in range(1, 9)]
    assert [[picture.relative_to(images.resolve()).name for picture in sample.pictures] for sample in samples] == [
        ["a.png"], ["a.png", "b.png", "c.png"], ["b.png", "a.png"], [], [], [], [], [],
    ]  # fmt: skip
    assert [sample.messages for sample in samples] == [record.get("conversations", []) for record in records]
    assert [sample.text for sample in samples] == [None] * 7 + ["plain 文字"]
    assert samples[6].extra == {"kind": "what", "language": "zh"}
    assert samples[0].extra == {}
    for picture, seed in zip(samples[2].open_pictures(), (1, 0), strict=True):
        assert np.array_equal(np.asarray(picture), np.asarray(make_picture(seed)))


def test_pictures_of_another_folder(folder):
    path = write_jsonl(folder / "elsewhere.jsonl", [{"image": "outside.png", "conversations": TURNS}])
    picture = read_samples(path, ReadOptions(images_path=str(folder)))[0].open_pictures()[0]
    assert np.array_equal(np.asarray(picture), np.asarray(make_picture(9)))


def test_names_that_stay_inside_are_allowed(folder):
    images = folder / "images"
    (images / "deep").mkdir()
    make_picture(5).save(images / "deep" / "猫 1.png")
    (images / "link.png").symlink_to(images / "a.png")
    names = ["deep/猫 1.png", "./a.png", "deep/../b.png", "link.png"]
    samples = open_lines(folder, *({"image": [name], "conversations": TURNS} for name in names))
    for sample, seed in zip(samples, (5, 0, 1, 0), strict=True):
        assert np.array_equal(np.asarray(sample.open_pictures()[0]), np.asarray(make_picture(seed)))


def test_byte_order_mark_blank_lines_and_line_numbers(folder):
    line = json.dumps({"conversations": [{"role": "user", "content": "\u2028 猫"}]}, ensure_ascii=False).encode()
    path = folder / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\n\n  \t\r\n" + line + b"\r\n\n" + line)  # the last without an end
    samples = read_samples(path)
    assert [sample.where for sample in samples] == [f"{path}:1", f"{path}:4", f"{path}:6"]
    assert {sample.messages[0]["content"] for sample in samples} == {"\u2028 猫"}


def test_lines_are_parsed_when_they_are_asked_for(folder):
    path = folder / "train.jsonl"
    path.write_text(json.dumps(SOUND) + "\nnonsense\n" + json.dumps(SOUND) + "\n")
    samples = read_samples(path)
    assert len(samples) == 3
    assert samples[2].where == f"{path}:3"
    with pytest.raises(DataError, match=r"train\.jsonl:2: "):
        samples[1]


# Parquet


def parquet_records(folder: Path) -> list[dict]:
    names = [["a.png"], ["b.png"], ["c.png", "a.png"], [], ["b.png"]]
    return [{"image": row, "conversations": turns(len(row), f"answer {n}")} for n, row in enumerate(names)]


@pytest.fixture
def parquet_file(folder) -> Path:
    """The same samples as parquet_records: five rows in three row groups, lists of pictures."""
    records = parquet_records(folder)
    pictures = [[(folder / "images" / name).read_bytes() for name in record["image"]] for record in records]
    texts = [json.dumps(record["conversations"]) for record in records]
    path = write_parquet(folder / "train.parquet", texts, pictures, row_group_size=2)
    assert parquet.ParquetFile(path).num_row_groups == 3
    return path


def test_parquet_is_the_same_as_json_lines(folder, parquet_file, processor):
    lines = read_samples(write_jsonl(folder / "train.jsonl", parquet_records(folder)))
    rows = read_samples(parquet_file)
    assert len(rows) == len(lines) == 5
    assert [row.where for row in rows] == [f"{parquet_file}:{number}" for number in range(1, 6)]
    assert [row.messages for row in rows] == [line.messages for line in lines]
    assert [list(row.pictures) for row in rows] == [[path.read_bytes() for path in line.pictures] for line in lines]
    from_rows, from_lines = construct(rows, processor), construct(lines, processor)
    for index in range(5):
        (rendered, pixels, _), (wanted, wanted_pixels, _) = from_rows[index], from_lines[index]
        assert rendered == wanted
        assert len(pixels) == len(wanted_pixels)
        assert all(map(torch.equal, pixels, wanted_pixels))


def test_parquet_with_one_picture_a_row(folder):
    content = (folder / "images" / "a.png").read_bytes()
    texts = [json.dumps(turns(1)), json.dumps(turns(0))]
    samples = read_samples(write_parquet(folder / "one.parquet", texts, pyarrow.array([content, None], "binary")))
    assert [sample.pictures for sample in samples] == [(content,), ()]
    assert samples[0].messages == turns(1)


def test_parquet_with_nested_conversations(folder):
    content = (folder / "images" / "a.png").read_bytes()
    samples = read_samples(write_parquet(folder / "nested.parquet", [turns(1)], [content]))
    assert samples[0].messages == turns(1)


def test_parquet_rows_are_parsed_when_they_are_asked_for(folder):
    path = write_parquet(folder / "bad.parquet", [json.dumps(turns(0)), "{", json.dumps(turns(0))], [None, None, None])
    samples = read_samples(path)
    assert (len(samples), samples[2].where) == (3, f"{path}:3")
    with pytest.raises(DataError, match=r"bad\.parquet:2: 'conversations' is no JSON"):
        samples[1]


def test_parquet_crosses_to_a_worker_without_its_data(parquet_file):
    samples = read_samples(parquet_file)
    wanted = list(samples)  # mapped now
    sent = pickle.dumps(samples)
    assert len(sent) < 1000 < len(wanted[0].pictures[0])
    assert list(pickle.loads(sent)) == wanted


def test_parquet_in_worker_processes(parquet_file, processor):
    data = construct(read_samples(parquet_file), processor)
    batches = list(DataLoader(data, batch_size=2, num_workers=2, collate_fn=collate_training))
    for batch, rows in zip(batches, ([0, 1], [2, 3], [4]), strict=True):
        wanted = collate_training([data[index] for index in rows])
        assert batch.keys() == wanted.keys()
        assert batch.pop("pictures_a_row") == wanted.pop("pictures_a_row")
        assert all(torch.equal(batch[name], wanted[name]) for name in wanted)


def test_the_second_opening_reuses_the_copy(parquet_file, monkeypatch):
    first = list(read_samples(parquet_file))
    copies = list(parquet_file.parent.glob("*.arrow"))
    assert len(copies) == 1
    monkeypatch.setattr("pyarrow.parquet.ParquetFile", None)  # reading the original would fail
    assert list(read_samples(parquet_file)) == first
    assert list(parquet_file.parent.glob("*.arrow")) == copies


def test_a_changed_parquet_is_copied_again(parquet_file):
    read_samples(parquet_file)
    write_parquet(parquet_file, [json.dumps(turns(0, "changed"))], [None])
    samples = read_samples(parquet_file)
    assert [sample.messages for sample in samples] == [turns(0, "changed")]


def test_broken_parquet(parquet_file):
    sound = parquet_file.read_bytes()
    for content in (sound[: len(sound) // 2], b"PAR1", b"<html>"):
        parquet_file.write_bytes(content)
        with pytest.raises(DataError, match=r"(?s)train\.parquet: cannot be read as parquet \(.*\): download it again"):
            read_samples(parquet_file)
    left = [path.name for path in parquet_file.parent.iterdir()]
    assert not [name for name in left if name.endswith((".tmp", ".arrow"))]  # half a copy would be taken for a whole


def test_a_broken_row_group_leaves_the_others(parquet_file):
    wanted = list(read_samples(parquet_file))
    sound = parquet_file.read_bytes()
    page = parquet.ParquetFile(parquet_file).metadata.row_group(1).column(1).data_page_offset
    parquet_file.write_bytes(sound[:page] + bytes(40) + sound[page + 40 :])
    samples = read_samples(parquet_file)
    assert [samples[number] for number in (0, 1, 4)] == [wanted[number] for number in (0, 1, 4)]
    for number in (2, 3):
        with pytest.raises(DataError, match=rf"train\.parquet:{number + 1}: row group 1 cannot be read .*download"):
            samples[number]
    copies = len(list(parquet_file.parent.glob("*.arrow")))
    with pytest.raises(DataError, match="row group 1 cannot be read"):  # from the copy, as every other rank does
        read_samples(parquet_file)[2]
    assert len(list(parquet_file.parent.glob("*.arrow"))) == copies


def test_a_row_that_is_no_utf8_leaves_the_others(folder):
    texts = [json.dumps(turns(0)).encode(), b'[{"role": "\xff"}]', json.dumps(turns(0)).encode()]
    column = pyarrow.array(texts, pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, column.buffers())  # which nobody checks
    samples = read_samples(write_parquet(folder / "bytes.parquet", column, [None] * 3))
    assert samples[0].messages == samples[2].messages == turns(0)
    with pytest.raises(DataError, match=r"bytes\.parquet:2: 'conversations' is no UTF-8"):
        samples[1]


def test_parquet_without_a_column(folder):
    path = folder / "less.parquet"
    parquet.write_table(pyarrow.table({"image_bytes": [b"x"], "other": [1]}), path)
    with pytest.raises(DataError, match=r"less\.parquet: none of its columns .*conversations.*image_bytes, other"):
        read_samples(path)
    parquet.write_table(pyarrow.table({"conversations": [json.dumps(turns(0)), json.dumps(turns(1))]}), path)
    samples = read_samples(path)
    assert samples[0].messages == turns(0)
    with pytest.raises(DataError, match=r"less\.parquet:2: the text holds 1 <image> but the sample has 0 pictures"):
        samples[1]


@pytest.mark.parametrize(
    ("conversations", "image_bytes", "reason"),
    [
        (None, None, "'conversations' must be a list"), ("", None, "'conversations' is no JSON"),
        ("[]", None, "'conversations' must be a list"), ("3", None, "'conversations' must be a list"),
        (json.dumps(turns(2)), [b"x"], "holds 2 <image> but the sample has 1 picture:"),
        (json.dumps(turns(1)), [b"no picture"], "picture 1: it cannot be read as a picture"),
        (json.dumps(turns(1)), None, "holds 1 <image> but the sample has 0 pictures"),
    ],
)  # fmt: skip
def test_broken_rows_are_found_before_training(folder, processor, conversations, image_bytes, reason):
    columns = [json.dumps(turns(0)), conversations], pyarrow.array([None, image_bytes], pyarrow.list_(pyarrow.binary()))
    path = write_parquet(folder / "rows.parquet", *columns)
    with pytest.raises(DataError) as error:
        construct(read_samples(path), processor)
    assert f"{path}:2: " in str(error.value)
    assert reason in str(error.value)


def test_parquet_with_names_of_pictures(folder):
    samples = read_samples(write_parquet(folder / "names.parquet", [json.dumps(turns(1))], ["a.png"]))
    assert samples[0].pictures == ((folder / "images" / "a.png").resolve(),)


def test_parquet_with_pictures_as_the_data_sets_library_stores_them(folder, processor):
    content = (folder / "images" / "a.png").read_bytes()
    rows = [{"bytes": content, "path": None}, {"bytes": None, "path": "a.png"}, {"bytes": b"x", "path": "a.png"}, None]
    samples = read_samples(write_parquet(folder / "structs.parquet", [json.dumps(turns(1))] * 4, rows))
    assert samples[0].pictures == (content,)
    for number, reason in ((2, "has 0 pictures"), (4, "has 0 pictures")):
        with pytest.raises(DataError, match=rf"structs\.parquet:{number}: .*{reason}"):
            samples[number - 1]
    with pytest.raises(DataError, match=r"structs\.parquet:3: picture 1: it cannot be read as a picture"):
        samples[2].open_pictures()


# Errors before training


@pytest.mark.parametrize(
    ("line", "reasons"),
    [
        ("nonsense", ["no JSON", "mend or delete it"]),
        ('{"conversations": [', ["no JSON", "mend or delete it"]),
        ("[" * 100_000, ["no JSON", "mend or delete it"]),
        ("9" * 5000, ["no JSON", "mend or delete it"]),
        ("[1, 2]", ["list", "must be an object"]),
        ('"text"', ["str", "must be an object"]),
        ("null", ["NoneType", "must be an object"]),
        ({}, ["'conversations' must be a list", "None"]),
        ({"conversations": []}, ["'conversations' must be a list", "[]"]),
        ({"conversations": "hello"}, ["'conversations' must be a list", "'hello'"]),
        ({"conversations": {"role": "user"}}, ["'conversations' must be a list"]),
        ({"conversations": ["hello"]}, ["'conversations' must be a list"]),
        ({"conversations": [{"role": "user"}]}, ["'content' must be text", "None"]),
        ({"conversations": [{"role": "user", "content": 3}]}, ["'content' must be text", "3"]),
        ({"conversations": [{"role": "user", "content": [{"type": "text"}]}]}, ["'content' must be text"]),
        ({"conversations": [{"role": "robot", "content": "x"}]}, ["needs a role, one of system, user, assistant"]),
        ({"conversations": [{"content": "x"}]}, ["needs a role, one of system, user, assistant"]),
        ({"conversations": [{"role": "user", "content": "\ud83d"}]}, ["surrogate", "fix the encoding"]),
        ({"text": ""}, ["'text' must be text that is not empty"]),
        ({"text": 3}, ["'text' must be text that is not empty"]),
        ({"text": "\udc00"}, ["surrogate", "fix the encoding"]),
        ({"image": "a.png", "conversations": turns(0)}, ["0 <image>", "1 picture:", "make them equal"]),
        ({"conversations": turns(2)}, ["2 <image>", "0 pictures", "make them equal"]),
        ({"image": "a.png,b.png", "conversations": turns(3)}, ["3 <image>", "2 pictures", "make them equal"]),
        ({"image": "a.png,", "conversations": turns(1)}, ["'image' is ['a.png', '']", "file name or a list"]),
        ({"image": 7, "conversations": turns(1)}, ["'image' is 7", "file name or a list"]),
        ({"image": [7], "conversations": turns(1)}, ["'image' is [7]", "file name or a list"]),
        ({"image": {"a": 1}, "conversations": turns(1)}, ["'image' is {'a': 1}", "file name or a list"]),
        ({"image": "no.png", "conversations": turns(1)}, ["images/no.png", "does not exist", "check --images_path"]),
        ({"image": "page.png", "conversations": turns(1)}, ["images/page.png", "cannot be read as a picture"]),
        ({"image": "empty.png", "conversations": turns(1)}, ["images/empty.png", "cannot be read as a picture"]),
        ({"image": "half.png", "conversations": turns(1)}, ["images/half.png", "cannot be read as a picture"]),
        ({"image": "../outside.png", "conversations": turns(1)}, ["'../outside.png' lies outside", "--images_path"]),
        ({"image": "/absolute.png", "conversations": turns(1)}, ["'/absolute.png' lies outside", "--images_path"]),
        ({"image": "out.png", "conversations": turns(1)}, ["'out.png' lies outside", "--images_path"]),
        ({"image": "outdoors/outside.png", "conversations": turns(1)}, ["lies outside", "--images_path"]),
        ({"image": "pipe.png", "conversations": turns(1)}, ["'pipe.png' is no regular file"]),
        ({"image": "to_pipe.png", "conversations": turns(1)}, ["'to_pipe.png' is no regular file"]),
        ({"image": ".", "conversations": turns(1)}, ["'.' is no regular file"]),
        ({"image": "a.png/b.png", "conversations": turns(1)}, ["cannot be read as a picture"]),
    ],
)
def test_errors_name_file_line_and_cure_before_training(folder, processor, line, reasons):
    images = folder / "images"
    (images / "page.png").write_text("<html>404</html>")
    (images / "empty.png").touch()
    content = (images / "a.png").read_bytes()
    (images / "half.png").write_bytes(content[: len(content) // 2])
    (images / "out.png").symlink_to(folder / "outside.png")
    (images / "outdoors").symlink_to(folder)
    os.mkfifo(images / "pipe.png")
    (images / "to_pipe.png").symlink_to(images / "pipe.png")
    path = folder / "train.jsonl"
    lines = [json.dumps(SOUND), "", line if isinstance(line, str) else json.dumps(line), json.dumps(SOUND)]
    path.write_text("\n".join(lines))
    samples = read_samples(path)
    with pytest.raises(DataError) as error:
        construct(samples, processor)
    message = str(error.value)
    assert message.startswith(f"{path}:3: ")
    assert [reason for reason in reasons if reason not in message] == []


@pytest.mark.parametrize(
    "name",
    ["x" * 300 + ".png", "loop.png", "loop.png/a.png", "\ud800.png", "a\0.png"],
    ids=["long", "loop", "in_loop", "surrogate", "zero"],
)
def test_names_that_no_file_can_have(folder, processor, name):
    (folder / "images" / "loop.png").symlink_to("loop.png")
    path = write_ascii(folder / "train.jsonl", [SOUND, {"image": [name], "conversations": TURNS}])
    with pytest.raises(DataError, match=r"train\.jsonl:2: "):
        construct(read_samples(path), processor)


def write_ascii(path: Path, records: list[dict]) -> Path:
    """As write_jsonl, but escaped, so that what is no Unicode can be written."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_text_that_is_not_utf8(folder, processor):
    path = folder / "train.jsonl"
    path.write_bytes(json.dumps(SOUND).encode() + b"\n" + '{"text": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"train\.jsonl:2: this line is no JSON"):
        construct(read_samples(path), processor)
    path.write_bytes(json.dumps(SOUND).encode("utf-16"))
    with pytest.raises(DataError, match=r"train\.jsonl:1: this line is no JSON"):
        construct(read_samples(path), processor)


def test_files_that_hold_nothing_or_are_not_there(folder):
    for name, cure in (
        ("train.xlsx", "save the table as .csv"),
        ("train.JSONL.gz", "unpack it"),
        ("t.zip", "images_path"),
    ):
        (folder / name).touch()
        with pytest.raises(DataError, match=rf"the ending '.*' is none of \.jsonl, .*\.parquet.*: .*{cure}"):
            read_samples(folder / name)
    with pytest.raises(DataError, match=r"absent\.jsonl does not exist: check --data_path"):
        read_samples(folder / "absent.jsonl")
    with pytest.raises(DataError, match="does not exist: check --data_path"):
        read_samples(str(folder / "absent.parquet"))
    (folder / "folder.jsonl").mkdir()
    os.mkfifo(folder / "pipe.jsonl")
    for name in ("folder.jsonl", "pipe.jsonl"):
        with pytest.raises(DataError, match="does not exist"):
            read_samples(folder / name)
    for content in ("", "\n\n  \n"):
        (folder / "empty.jsonl").write_text(content)
        with pytest.raises(DataError, match=r"empty\.jsonl holds no sample"):
            read_samples(folder / "empty.jsonl")
    path = write_parquet(folder / "empty.parquet", pyarrow.array([], "string"), pyarrow.array([], "binary"))
    with pytest.raises(DataError, match=r"empty\.parquet holds no sample"):
        read_samples(path)
