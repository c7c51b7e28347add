"""Several files as one: what --data_path may say, and samples that keep their file and line."""

import pickle

import numpy as np
import pytest

from dataset.readers.opening import open_data, read_samples
from dataset.samples import DataError
from dataset.sources import Source, Sources, open_sources, parse_sources, short_names
from dataset.vlm_dataset import ConversationDataset
from helpers.data import write_jsonl, write_parquet
from model.messages import UserError


def texts(path, *lines: str):
    return write_jsonl(path, [{"text": line} for line in lines])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jsonl", [("a.jsonl", None)]),
        ("a.jsonl:0.7", [("a.jsonl", None)]),  # alone it is everything
        ("a.jsonl,b.parquet", [("a.jsonl", None), ("b.parquet", None)]),
        ("a.jsonl:0.7, b.parquet:0.3", [("a.jsonl", 0.7), ("b.parquet", 0.3)]),
        ("a.jsonl:30,b.parquet:10", [("a.jsonl", 0.75), ("b.parquet", 0.25)]),
        ("a:1e-1,b:.1,c:+2.e-1", [("a", 0.25), ("b", 0.25), ("c", 0.5)]),
        (r"C:\data\a.jsonl,D:\b.jsonl", [(r"C:\data\a.jsonl", None), (r"D:\b.jsonl", None)]),
        (r"C:\data\a.jsonl:1,D:\b.jsonl:1", [(r"C:\data\a.jsonl", 0.5), (r"D:\b.jsonl", 0.5)]),
        ("hf:someone/set:train:3,b.jsonl:1", [("hf:someone/set:train", 0.75), ("b.jsonl", 0.25)]),
        ("", [("", None)]),
    ],
)
def test_what_may_be_said(text, expected):
    found = parse_sources(text)
    assert [source.path for source in found] == [path for path, _ in expected]
    assert [source.weight for source in found] == pytest.approx([weight for _, weight in expected])


def test_what_exists_is_one_file_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl:0.7,b.jsonl:0.3", "c.jsonl:2"):
        texts(tmp_path / name, "x")
    assert parse_sources("a.jsonl:0.7,b.jsonl:0.3") == [Source("a.jsonl:0.7,b.jsonl:0.3")]
    assert parse_sources("c.jsonl:2:1,d.jsonl:3") == [Source("c.jsonl:2", 0.25), Source("d.jsonl", 0.75)]


@pytest.mark.parametrize(
    ("text", "flag", "reason"),
    [
        ("a.jsonl:1,b.jsonl", "--data_path", "b.jsonl has no weight"),
        ("a.jsonl:0,b.jsonl:1", "--data_path", "above 0"),
        ("a.jsonl:-1,b.jsonl:1", "--data_path", "above 0"),
        ("a.jsonl:1e999,b.jsonl:1", "--data_path", "above 0"),
        ("a.jsonl,,b.jsonl", "--data_path", "empty"),
        ("a.jsonl,b.jsonl,", "--data_path", "empty"),
        ("a.jsonl:1,a.jsonl:2", "--data_path", "twice"),
        ("a.jsonl:1,b.jsonl:2", "--val_path", "only --data_path takes weights"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_flag_and_cure(text, flag, reason):
    with pytest.raises(UserError, match=reason) as refused:
        parse_sources(text, flag)
    assert str(refused.value).startswith(flag)


def test_joined_samples_keep_their_place(tmp_path, picture):
    first, second = texts(tmp_path / "a.jsonl", "one", "two"), texts(tmp_path / "b.jsonl", "three")
    third = write_parquet(tmp_path / "c.parquet", ['[{"role": "user", "content": "four"}]'] * 2, [b"", b""])
    joined = open_sources(f"{first},{second},{third}", lambda path: read_samples(path, say=lambda _: None))
    assert len(joined) == 5 and joined.bounds == [0, 2, 3, 5] and joined.weights == ()
    assert [sample.text for sample in joined] == ["one", "two", "three", None, None]
    places = [f"{first}:1", f"{first}:2", f"{second}:1", f"{third}:1", f"{third}:2"]
    assert [joined.where(number) for number in range(5)] == places == [sample.where for sample in joined]
    assert [sample.where for sample in pickle.loads(pickle.dumps(joined))] == places
    assert isinstance(open_sources(f"{first}:3", read_samples), type(read_samples(first)))


def test_tokens_are_kept_for_these_files_in_this_order_and_for_any_weights(tmp_path):
    first, second = texts(tmp_path / "a.jsonl", "one"), texts(tmp_path / "b.jsonl", "two")
    identities = [
        open_sources(text, read_samples).identity()
        for text in (f"{first},{second}", f"{first}:2,{second}:1", f"{second},{first}")
    ]
    assert identities[0] == identities[1] != identities[2]


def test_a_file_that_gives_no_row_is_named(tmp_path, processor):
    first, second = texts(tmp_path / "a.jsonl", "one cat", "two cats"), texts(tmp_path / "b.jsonl", "a dog")
    joined = open_sources(f"{first},{second}", read_samples)
    data = ConversationDataset(joined, processor, 64)
    assert joined.rows_of_each(data.kept) == [2, 1]
    with pytest.raises(DataError, match="b.jsonl"):
        joined.rows_of_each(np.array([0, 1]))
    assert isinstance(data.samples, Sources) and data.where(2) == f"{second}:1"


def test_what_weights_were_trained_on_is_told_in_short():
    assert short_names("/data/a/b/sft.jsonl") == "sft.jsonl"
    assert short_names("/data/a/sft.jsonl:0.7,b/c.parquet:0.3") == "sft.jsonl:0.7, c.parquet:0.3"
    assert short_names("/data/a/b/sft.jsonl,c.jsonl", 3) == "a/b/sft.jsonl, c.jsonl"


def test_commands_take_what_training_takes(tmp_path):
    first, second = texts(tmp_path / "a.jsonl", "one cat", "two cats"), texts(tmp_path / "b.jsonl", "a dog")
    for text in (f"{first},{second}", f"{first}:0.7,{second}:0.3"):
        assert [sample.text for sample in open_data(text)] == ["one cat", "two cats", "a dog"]
    with pytest.raises(UserError, match=r"b\.jsno does not exist: did you mean .*b\.json"):
        open_data(f"{first},{tmp_path / 'b.jsno'}")
