"""scripts/prepare_data.py: what is read back is what was given, in the order and on the side that was asked for."""

import contextlib
import io
import json
import shutil

import numpy as np
import pytest
from pyarrow import parquet

from dataset.readers.opening import read_samples
from helpers.data import make_picture, turns, write_jsonl
from helpers.prepared import WORDS, contents, index_of, pictures_of, refusal, rows_of, shards_of, words_of
from scripts import prepare_data
from scripts.data.prepare.columns import MAX_FIELDS

# ---- what is read back


def test_what_is_read_back_is_what_was_given(prepare, source):
    before = contents(source.parent)
    folder = prepare()
    assert contents(source.parent) == before
    (path,) = shards_of(folder)
    given, found = list(read_samples(source)), list(read_samples(path))
    assert [sample.messages for sample in found] == [sample.messages for sample in given]
    for one, other in zip(found, given, strict=True):
        assert list(one.pictures) == [picture.read_bytes() for picture in other.pictures]
        for picture, wanted in zip(one.open_pictures(), other.open_pictures(), strict=True):
            assert np.array_equal(np.asarray(picture), np.asarray(wanted))
    wanted = [{name: value for name, value in sample.extra.items() if value is not None} for sample in given]
    assert [sample.extra for sample in found] == wanted
    assert [sample.messages for sample in read_samples(folder)] == [sample.messages for sample in given]
    names = {field.name: str(field.type) for field in parquet.read_schema(path)}
    assert names == {"conversations": "string", "image_bytes": "list<element: binary>", "kind": "string",
                     "number": "int64", "rating": "double", "good": "bool", "extra": "string"}  # fmt: skip


def test_texts_have_a_column_of_their_own(prepare, tmp_path):
    path = write_jsonl(tmp_path / "texts.jsonl", [{"text": f"There are {n} cats"} for n in range(20)])
    folder = prepare("--split", 0.2, path=path)
    assert {row["text"] for name in ("train", "held_out") for row in rows_of(folder, name)} == {
        f"There are {n} cats" for n in range(20)
    }
    assert list(rows_of(folder)[0]) == ["text"] and len(rows_of(folder, "held_out")) == 4
    mixed = [{"text": "a cat"}, {"conversations": turns(0)}]
    folder = prepare(path=write_jsonl(tmp_path / "mixed.jsonl", mixed), output=tmp_path / "both")
    assert [(sample.text, sample.messages) for sample in read_samples(folder)] == [("a cat", []), (None, turns(0))]
    rows = rows_of(folder)
    assert rows[0] == {"conversations": None, "text": "a cat", "image_bytes": []}
    assert rows[1] == {"conversations": json.dumps(turns(0)), "text": None, "image_bytes": []}


def test_fields_of_several_kinds_and_too_many_fields_stand_together(prepare, tmp_path):
    first = {f"field_{number}": number for number in range(MAX_FIELDS + 5)}
    records = [{"conversations": turns(0), "a": 1, **first}, {"conversations": turns(0, "a dog"), "a": "one"},
               {"conversations": turns(0, "a bird"), "a": 1 << 70}]  # fmt: skip
    rows = rows_of(prepare(path=write_jsonl(tmp_path / "train.jsonl", records)))
    assert [json.loads(row["extra"])["a"] for row in rows] == [1, "one", 1 << 70] and "a" not in rows[0]
    assert rows[0][f"field_{MAX_FIELDS - 2}"] == MAX_FIELDS - 2 and len(json.loads(rows[0]["extra"])) == 7


def test_a_shard_is_read_by_row_groups_and_holds_a_picture_once(prepare, source, monkeypatch):
    monkeypatch.setattr("scripts.data.prepare.shards.GROUP_ROWS", 12)
    (path,) = shards_of(prepare())
    facts = parquet.read_metadata(path)
    assert [facts.row_group(number).num_rows for number in range(facts.num_row_groups)] == [12] * 5 + [2]
    column = next(c for c in map(facts.row_group(0).column, range(facts.num_columns)) if "image" in c.path_in_schema)
    assert column.compression == "UNCOMPRESSED" and "RLE_DICTIONARY" in column.encodings
    pictures = {picture for row in rows_of(path.parent)[:12] for picture in row["image_bytes"]}
    assert len(pictures) == 4 and column.total_compressed_size < 1.2 * sum(map(len, pictures)) + 500


def test_row_groups_are_cut_by_bytes(prepare, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("scripts.data.prepare.shards.GROUP_BYTES", 7000)
        (path,) = shards_of(prepare())
    facts = parquet.read_metadata(path)
    sizes = [facts.row_group(number).total_byte_size for number in range(facts.num_row_groups)]
    assert len(sizes) > 5 and max(sizes) < 9000


# ---- order and sides


def test_shuffled_the_questions_about_a_picture_stay_together(prepare, tmp_path):
    plain, one = words_of(prepare(output=tmp_path / "0")), words_of(prepare("--shuffle", output=tmp_path / "1"))
    assert one == words_of(prepare("--shuffle", output=tmp_path / "2")) != plain and sorted(one) == sorted(plain)
    assert one != words_of(prepare("--shuffle", "--seed", 7, output=tmp_path / "3"))
    pictures = [word.split()[-1] for word in one if "." in word]
    assert sum(a != b for a, b in zip(pictures, pictures[1:], strict=False)) == 19
    assert [word.rsplit(" ", 1)[0] for word in one if word.endswith(" 0.png")] == list(WORDS)  # in the order they had


def test_no_picture_stands_on_both_sides(prepare, source, tmp_path):
    shutil.copy(source.parent / "images" / "3.png", source.parent / "images" / "again.png")
    with source.open("a") as file:
        file.write(json.dumps({"image": "again.png", "conversations": turns(1)}) + "\n")
    for seed in range(5):
        folder = prepare("--split", 0.1, "--seed", seed, "--shuffle", output=tmp_path / str(seed))
        train, held_out = (pictures_of(folder, name) for name in ("train", "held_out"))
        assert not train & held_out and len(train | held_out) == 20
        assert 6 <= len(rows_of(folder, "held_out")) <= 12
        assert index_of(folder)["counts"]["held_out"] == len(rows_of(folder, "held_out"))


def test_a_split_that_holds_out_nothing_is_refused(prepare, tmp_path):
    assert "--split 1 must be" in refused_flags("--split", "1")
    (tmp_path / "images").mkdir()
    make_picture(1).save(tmp_path / "images" / "a.png")
    lines = [{"image": "a.png", "conversations": turns(1, f"answer {number}")} for number in range(20)]
    sentence = refusal(prepare, "--split", 0.1, path=write_jsonl(tmp_path / "one.jsonl", lines))
    assert (
        "about 2 of 20 samples, but the smallest group about the same pictures has 20: give a larger share" in sentence
    )


def refused_flags(*flags: str) -> str:
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit):
        prepare_data.parse(["a.jsonl", "--output", "b", *flags])
    return said.getvalue()


def test_duplicates_are_told_and_left_out_on_demand(prepare, source, tmp_path, capsys):
    shutil.copy(source.parent / "images" / "0.png", source.parent / "images" / "copy.png")
    first = json.loads(source.read_text().splitlines()[0])
    with source.open("a") as file:
        for change in ({"number": 99}, {"image": "copy.png"}, {"image": "1.jpg"}):
            file.write(json.dumps({**first, **change}) + "\n")
    assert len(rows_of(prepare(output=tmp_path / "all"))) == 65
    assert "with 2 samples that repeat an earlier one (--dedup exact leaves them out)" in capsys.readouterr().out
    folder = prepare("--dedup", "exact")
    assert len(rows_of(folder)) == 63 and index_of(folder)["counts"]["duplicates"] == 2
    left_out = [json.loads(line) for line in (folder / "left_out.jsonl").read_text().splitlines()]
    assert left_out == [
        {"kind": "duplicate", "where": f"{source}:{line}", "reason": f"it says and shows the same as {source}:1"}
        for line in (63, 64)
    ]
    assert "left out 2 samples that repeat an earlier one" in capsys.readouterr().out


# ---- bad samples


def test_bad_samples_are_left_out_counted_and_named(prepare, source, capsys):
    (source.parent / "images" / "4.jpg").write_bytes((source.parent / "images" / "4.jpg").read_bytes()[:-60])
    lines = source.read_text().splitlines()
    lines[0], lines[10] = "nonsense", json.dumps({"conversations": [{"role": "nobody", "content": "?"}]})
    source.write_text("\n".join(lines))
    sentence = refusal(prepare)
    assert (
        "samples are bad, more than --max_bad_share 0.05 allows" in sentence and "left_out.jsonl names them" in sentence
    )
    folder = prepare("--max_bad_share", 0.2)
    left_out = [json.loads(line) for line in (folder / "left_out.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in left_out] == ["bad"] * 5
    assert [record["where"].rsplit(":")[-1] for record in left_out] == ["1", "11", "43", "44", "45"]
    assert len(rows_of(folder)) == 57 and index_of(folder)["counts"]["bad"] == 5
    assert "left out 5 bad samples, named in left_out.jsonl" in capsys.readouterr().out


def test_where_all_samples_are_bad_nothing_is_made(prepare, tmp_path):
    (tmp_path / "bad.jsonl").write_text("nonsense\nmore of it\n")
    sentence = refusal(prepare, "--max_bad_share", 1, path=tmp_path / "bad.jsonl")
    assert "no sample of 2 can be used" in sentence and not list((tmp_path / "prepared").glob("*.parquet"))
