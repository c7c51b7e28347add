"""hf:...: what it may say, who lets it through, and what is told without the package that opens it."""

import sys
from pathlib import Path

import pytest

from dataset.readers.hub_query import HubQuery, is_hub, parse_query
from dataset.readers.opening import is_there, open_data, read_samples
from dataset.samples import DataError
from dataset.sources import parse_sources
from helpers.data import write_jsonl
from helpers.runs import tiny
from trainer.guard.needs import check_needs
from trainer.report.next_steps import next_steps
from trainer.train_pretrain_vlm import PRETRAIN_VLM


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:org/name", HubQuery("", "org/name")),
        ("hf:/a/b c", HubQuery("", "/a/b c")),
        ("hf:org/name?name=ai2d&streaming=1", HubQuery("", "org/name", "ai2d", streaming=True)),
        ("hf:x/y?split=test[:10%25]&streaming=0", HubQuery("", "x/y", split="test[:10%]")),
        ("hf:x/y?revision=abc&data_dir=d", HubQuery("", "x/y", revision="abc", data_dir="d")),
        ("hf:json?data_files=a%2Cb.jsonl&data_files=c+d=e.jsonl",
         HubQuery("", "json", data_files=("a,b.jsonl", "c+d=e.jsonl"))),
    ],
)  # fmt: skip
def test_what_may_be_asked(text, expected):
    found = parse_query(text)
    assert found.text == text and HubQuery(**{**vars(found), "text": ""}) == expected
    assert is_hub(text) and is_there(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("hf:", "no data set is named"),
        ("hf:?name=x", "no data set is named"),
        ("hf:x/y?nmae=z", "'nmae' is none of name, split"),
        ("hf:x/y?trust_remote_code=1", "'trust_remote_code' is none of"),
        ("hf:x/y?split=", "split has no value"),
        ("hf:x/y?split=a&split=b", "split stands there twice"),
        ("hf:x/y?streaming=yes", "streaming=yes must be 0 or 1"),
        ("hf:json", "json is a kind of files: name them with data_files"),
    ],
)
def test_what_is_not_understood_is_named(text, reason):
    with pytest.raises(DataError) as refused:
        open_data(text)
    assert str(refused.value).startswith(f"{text}: ") and reason in str(refused.value)


def test_weights_stand_behind_it():
    sources = parse_sources("hf:x/y?name=z:0.5,hf:json?data_files=/a//b.jsonl:1.5")
    assert [source.path for source in sources] == ["hf:x/y?name=z", "hf:json?data_files=/a//b.jsonl"]
    assert [source.weight for source in sources] == [0.25, 0.75]


def test_another_query_or_another_file_has_another_name(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    said = ("hf:x/y", "hf:x/y?name=a", "hf:x/y?split=a", "hf:x/y?revision=a", f"hf:json?data_files={path}")
    queries = [parse_query(text) for text in said]
    names = [query.short_name(rows) for query in queries for rows in (0, 5)]
    write_jsonl(path, [{"text": "other"}])
    names.append(queries[-1].short_name(0))
    assert len(set(names)) == len(names) == 11 and names == [Path(name).name for name in names]
    assert queries[0].short_name(5).startswith("y-train.first-5.") and queries[1].short_name(0).startswith("y-a-train.")
    assert parse_query("hf:x/y?split=train").short_name(0) == names[0]


def test_a_run_of_hub_data_needs_no_file(data_folder, tower_folder, tmp_path):
    config = tiny(PRETRAIN_VLM, data_folder, tower_folder, data_path="hf:x/y?name=z", save_dir=str(tmp_path))
    check_needs(config)
    assert f"train_sft_vlm.py --from_weight {config.weight_path} --data_path 'hf:x/y?name=z'" in next_steps(
        config, None
    )


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    for path in ("hf:x/y", "hf:x/y?streaming=1", str(tmp_path)):
        with pytest.raises(DataError, match=r"not installed: pip install -r requirements/hub\.txt"):
            read_samples(path)
