"""Whatever the library datasets opens, streamed or not: make test-hub. Nothing leaves this machine."""

import os
import pickle
import resource
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

datasets = pytest.importorskip("datasets", reason="make test-hub installs it")

from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, List, Value  # noqa: E402
from huggingface_hub import constants  # noqa: E402

from dataset.options import ReadOptions  # noqa: E402
from dataset.readers import hub_rows, hub_stream  # noqa: E402
from dataset.readers.opening import open_data, read_samples  # noqa: E402
from dataset.samples import BadSample, DataError  # noqa: E402
from helpers.data import make_picture, write_jsonl  # noqa: E402
from helpers.dataset_hub import dataset_hub  # noqa: E402
from helpers.faults import in_child, start_child, wait_for  # noqa: E402
from helpers.formats import WRITERS, Written, images_path, minimind  # noqa: E402
from helpers.hub import environment  # noqa: E402
from helpers.learnt import assert_same, captioned, learnt  # noqa: E402
from helpers.models import IMAGE_SIZE, IMAGE_TOKENS  # noqa: E402
from helpers.repository import ROOT  # noqa: E402
from helpers.runs import assert_bit_equal, run_until, tiny, weights_of  # noqa: E402
from model.processing import VLMProcessor  # noqa: E402
from trainer.stage import run_stage  # noqa: E402
from trainer.train_pretrain_vlm import PRETRAIN_VLM  # noqa: E402

LOCAL = [name for name in WRITERS if "tars" not in name and name not in ("WebDataset", "texts beside pictures")]
ONE, TWO = "save_to_disk", "save_to_disk of splits"
STREAMED = {False: "", True: "&streaming=1"}


@pytest.fixture(autouse=True)
def library_folders(tmp_path_factory, monkeypatch) -> None:
    """The library's own files go where tests' go."""
    home = tmp_path_factory.mktemp("library")
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, home / name)
    for settings in (datasets.config, constants):  # which read the environment before conftest could set it
        monkeypatch.setattr(settings, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def two_hundred(tmp_path_factory, tokenizer) -> tuple[list[Written], list[tuple]]:
    samples = captioned(200)
    path = minimind(tmp_path_factory.mktemp("wanted"), samples)
    return samples, learnt(path, ReadOptions(), VLMProcessor(tokenizer, IMAGE_TOKENS, IMAGE_SIZE))


def asked(writer: str, path: Path) -> str:
    """What opens the file or folder that a writer wrote."""
    if path.suffix in (".json", ".jsonl"):
        return f"hf:json?data_files={path}"
    if path.suffix == ".parquet":
        return f"hf:parquet?data_files={path}"
    return f"hf:{path}?split=train" if writer == "finevision" else f"hf:imagefolder?data_dir={path}"


def table_of(samples: list[Written]) -> Dataset:
    pictures = [[{"bytes": content, "path": None} for content in sample.pictures] for sample in samples]
    turn = {"role": Value("string"), "content": Value("string")}
    kinds = Features({"images": List(Image()), "messages": List(turn), "sound": Value("binary"), "n": Value("int64")})
    talks = [sample.messages for sample in samples]
    columns = {"images": pictures, "messages": talks, "sound": [b"x"] * len(samples), "n": list(range(len(samples)))}
    return Dataset.from_dict(columns, features=kinds)


def saved(writer: str, folder: Path, samples: list[Written]) -> Path:
    table = table_of(samples)
    (table if writer == ONE else DatasetDict(train=table, test=table.select([0]))).save_to_disk(folder / "saved")
    return folder / "saved"


# ---- the same samples


@pytest.mark.parametrize("streamed", STREAMED)
@pytest.mark.parametrize("writer", LOCAL)
def test_the_same_samples_through_the_library(writer, streamed, two_hundred, tmp_path, processor, monkeypatch):
    (samples, wanted), (write, recognised) = two_hundred, WRITERS[writer]
    (tmp_path / "data").mkdir()
    path = asked(writer, write(tmp_path / "data", samples)) + STREAMED[streamed]
    monkeypatch.setattr("helpers.learnt.read_samples", partial(read_samples, copies=tmp_path / "rows"))
    for most in (0, 13):
        options = ReadOptions(images_path=images_path(writer, tmp_path / "data"), max_samples=most)
        reader = read_samples(path, options, tmp_path / "rows")
        assert (
            f": {recognised} in {'a parquet' if streamed else 'a table of the library datasets'}" in reader.describe()
        )
        assert_same(learnt(path, options, processor), wanted[: most or None])
        sent = pickle.loads(pickle.dumps(reader))
        assert sent[7] == reader[7] and sent.identity() == reader.identity()
    assert (tmp_path / "rows").exists() == streamed  # what is not streamed is not copied


@pytest.mark.parametrize("writer", [ONE, TWO])
def test_what_save_to_disk_wrote(writer, two_hundred, tmp_path, processor):
    samples, wanted = two_hundred
    path = saved(writer, tmp_path, samples)
    assert_same(learnt(path, ReadOptions(), processor), wanted)
    assert_same(learnt(f"hf:{path}", ReadOptions(max_samples=3), processor), wanted[:3])
    reader = open_data(path)
    assert reader.where(4) == f"{path}:5" and reader[4].extra == {"n": 4}
    assert list(pickle.loads(pickle.dumps(reader))) == list(reader)
    assert reader.identity() != open_data(path, ReadOptions(max_samples=3)).identity()
    if writer == TWO:
        assert len(read_samples(f"hf:{path}?split=test")) == 1


def test_a_format_for_tensors_that_was_saved_is_not_used(two_hundred, tmp_path):
    table_of(two_hundred[0][:3]).with_format("numpy").save_to_disk(tmp_path / "saved")
    assert read_samples(tmp_path / "saved")[1].messages == two_hundred[0][1].messages


@pytest.mark.parametrize("streamed", STREAMED)
def test_json_whose_values_are_of_several_types(streamed, tmp_path):
    """The library keeps such values as JSON text."""
    part = [{"type": "text", "text": "a"}]
    contents = ("hello", part, "no", part)
    talks = [[{"role": "user", "content": said}, {"role": "assistant", "content": "yes"}] for said in contents]
    path = write_jsonl(tmp_path / "mixed.jsonl", [{"messages": talk} for talk in talks] + [{"text": "plain"}] * 40)
    reader = read_samples(f"hf:json?data_files={path}{STREAMED[streamed]}", copies=tmp_path / "rows")
    assert [reader[n].messages[0]["content"] for n in range(4)] == ["hello", "a", "no", "a"]
    assert read_samples(f"hf:json?data_files={path}&split=train[40:]")[3].text == "plain"


def test_lists_of_objects_that_are_kept_field_by_field(tmp_path):
    turns = {"from": ["human", "gpt"], "value": ["hello", "yes"]}
    table = Dataset.from_dict({"conversations": [turns, {"from": ["human"], "value": []}]})
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "table.parquet")
    for path in (str(tmp_path / "saved"), f"hf:parquet?data_files={tmp_path / 'table.parquet'}&streaming=1"):
        reader = read_samples(path, copies=tmp_path / "rows")
        assert reader.format == "llava" and [message["content"] for message in reader[0].messages] == ["hello", "yes"]
        with pytest.raises(BadSample, match=":2: 'conversations' must be a list of"):
            reader[1]


@pytest.mark.parametrize("streamed", STREAMED)
def test_a_bad_row_is_one_bad_sample(streamed, tmp_path):
    talk = '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
    Dataset.from_dict({"conversations": [talk, talk[:-1], talk]}).to_parquet(tmp_path / "t.parquet")
    reader = read_samples(
        f"hf:parquet?data_files={tmp_path / 't.parquet'}{STREAMED[streamed]}", copies=tmp_path / "rows"
    )
    assert reader[0].messages == reader[2].messages
    with pytest.raises(BadSample, match=r":2: .*(JSON|cannot be read)"):
        reader[1]


# ---- pictures that lie in files


@pytest.mark.parametrize("streamed", STREAMED)
def test_only_the_data_set_s_own_files_are_read(streamed, two_hundred, tmp_path):
    (tmp_path / "data" / "images").mkdir(parents=True)
    make_picture(0).save(tmp_path / "outside.png")
    make_picture(1).save(tmp_path / "data" / "images" / "a.png")
    outside = ("../../outside.png", str(tmp_path / "outside.png"), "/etc/hostname", "https://example.org/a.png")
    names = [str(tmp_path / "data" / "images" / "a.png"), "a.png", *outside]
    stored = [{"image": {"bytes": None, "path": name}, "caption": "x"} for name in names]
    path = write_jsonl(tmp_path / "data" / "p.jsonl", stored)
    said = []
    reader = read_samples(f"hf:json?data_files={path}{STREAMED[streamed]}", copies=tmp_path / "rows", say=said.append)
    for number in range(len(names)):
        if number < 2:
            assert reader[number].open_pictures()[0].getpixel((3, 3)) == make_picture(1).getpixel((3, 3))
        else:
            with pytest.raises(BadSample):
                reader[number].open_pictures()
    if streamed:
        assert "4 pictures could not be read" in " ".join(said) and "lies outside" in " ".join(said)


# ---- streams


def stream_of(samples: int, fails_after: int | None = None, asked_for: list | None = None) -> IterableDataset:
    def rows():
        for number in range(samples):
            if number == fails_after:
                raise ConnectionError("the line is dead")
            if asked_for is not None:
                asked_for.append(number)
            yield {"text": f"text {number} " + "x" * 100}

    return IterableDataset.from_generator(rows)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("fails_after", [0, 40, 199])
def test_a_stream_that_breaks_off_leaves_nothing(fails_after, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_stream, "load", lambda query: stream_of(200, fails_after))
    with pytest.raises(DataError, match=r"hf:x/y\?streaming=1: .*the line is dead.*connection"):
        read_samples("hf:x/y?streaming=1", copies=tmp_path / "rows")
    assert files_in(tmp_path / "rows") == []


def test_an_empty_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_stream, "load", lambda query: stream_of(0))
    with pytest.raises(DataError, match="hf:x/y.* holds no sample"):
        read_samples("hf:x/y?streaming=1", copies=tmp_path / "rows")
    assert files_in(tmp_path / "rows") == []


def test_a_second_start_asks_nobody(tmp_path, monkeypatch):
    asked_for, said = [], []
    monkeypatch.setattr(hub_stream, "load", lambda query: stream_of(5000, None, asked_for))
    first = read_samples("hf:x/y?streaming=1", ReadOptions(max_samples=40), tmp_path / "rows", said.append)
    assert len(first) == 40 and len(asked_for) <= 2 * hub_stream.ROWS_AT_ONCE
    assert any("kept in" in line and "without asking the hub" in line for line in said)
    monkeypatch.setattr(hub_stream, "load", None)  # would fail
    second = read_samples("hf:x/y?streaming=1", ReadOptions(max_samples=40), tmp_path / "rows")
    assert list(second) == list(first) and second.identity() == first.identity()


def test_row_groups_are_written_while_rows_come(tmp_path, monkeypatch):
    from pyarrow import parquet

    monkeypatch.setattr(hub_stream, "load", lambda query: stream_of(200))
    monkeypatch.setattr(hub_stream, "GROUP_BYTES", 4000)
    read_samples("hf:x/y?streaming=1", copies=tmp_path / "rows")
    (path,) = (tmp_path / "rows").glob("*.parquet")
    assert 5 < parquet.ParquetFile(path).num_row_groups < 10


def test_a_disk_that_fills_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_stream, "load", lambda query: stream_of(200))
    monkeypatch.setattr(hub_stream, "GROUP_BYTES", 2000)

    def read_within_4_kb() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        read_samples("hf:x/y?streaming=1", copies=tmp_path / "rows")

    log = tmp_path.with_suffix(".log")
    assert in_child(read_within_4_kb, log) == 70
    assert "cannot take it (File too large): make room, or give a --save_dir" in log.read_text()
    assert files_in(tmp_path / "rows") == []


def test_of_three_processes_one_streams(tmp_path, monkeypatch):
    def load(query: object) -> IterableDataset:
        print("streams")
        return stream_of(200)

    monkeypatch.setattr(hub_stream, "load", load)
    logs = [tmp_path / f"{number}.log" for number in range(3)]
    work = partial(read_samples, "hf:x/y?streaming=1", copies=tmp_path / "rows")
    assert wait_for([start_child(work, log) for log in logs]) == [0, 0, 0]
    assert sum(log.read_text().count("\nstreams\n") for log in logs) == 1
    assert len(list((tmp_path / "rows").glob("*.parquet"))) == 1


# ---- what cannot be read


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("hf:org/name", r"datasets cannot read it \(ConnectionError: .*org/name"),
        ("hf:json?data_files=/nowhere/x.jsonl", r"FileNotFoundError"),
        ("hf:/nowhere", "Couldn't find any data file"),
        ("hf:{saved}?split=x", "it has no split 'x', choose from train, test"),
        ("hf:{saved}?streaming=1", "streaming says nothing of a folder that save_to_disk wrote"),
        ("hf:json?data_files={odd}", r"none of its columns .* it has prompt: rename them"),
        ("hf:json?data_files={odd}&streaming=1", r"none of its columns .* it has prompt: rename them"),
        ("hf:json?data_files={odd}&split=test", r"Unknown split"),
    ],
)
def test_what_cannot_be_read_is_told(path, reason, tmp_path):
    odd = write_jsonl(tmp_path / "odd.jsonl", [{"prompt": "x"}])
    path = path.format(saved=saved(TWO, tmp_path, captioned(2)), odd=odd)
    with pytest.raises(DataError, match=reason) as refused:
        read_samples(path, copies=tmp_path / "rows")
    assert str(refused.value).startswith(f"{path}: ") and "\n" not in str(refused.value)


def test_columns_that_nobody_needs_are_not_read(tmp_path):
    reader = read_samples(saved(ONE, tmp_path, captioned(2)))
    assert reader.table.column_names == ["images", "messages", "n"]
    assert hub_rows.stored_pictures("a.png") == hub_rows.stored_pictures(None) == []


# ---- a run


def test_a_run_of_streamed_rows_stops_and_resumes_to_the_bit(data_folder, tower_folder, tmp_path, monkeypatch):
    path = f"hf:json?data_files={data_folder / 'train.jsonl'}&streaming=1"
    changes = {"data_path": path, "batch_size": 4, "save_interval": 2, "num_workers": 1}
    whole = tiny(PRETRAIN_VLM, data_folder, tower_folder, **changes, save_dir=str(tmp_path / "whole"))
    run_stage(whole)
    cut = tiny(PRETRAIN_VLM, data_folder, tower_folder, **changes, save_dir=str(tmp_path / "cut"))
    run_until(cut, 4, monkeypatch)
    monkeypatch.setattr(hub_stream, "load", None)  # is not asked again
    resumed = tiny(PRETRAIN_VLM, data_folder, tower_folder, **changes, save_dir=str(tmp_path / "cut"), from_resume=1)
    run_stage(resumed)
    assert_bit_equal(weights_of(whole), weights_of(resumed))
    lines = tiny(PRETRAIN_VLM, data_folder, tower_folder, **{**changes, "data_path": path.removesuffix("&streaming=1")})
    run_stage(lines)
    assert_bit_equal(weights_of(whole), weights_of(lines))


# ---- the hub


READ = """
import sys
from pathlib import Path
from dataset.readers.opening import read_samples
for path in sys.argv[2:]:
    reader = read_samples(path, copies=Path(sys.argv[1]), say=str)
    answers = [reader[n].messages[1]["content"] for n in (0, 7)]
    print(len(reader), answers, reader[7].open_pictures()[0].getpixel((3, 3)))
"""


@pytest.mark.parametrize("kind", ["finevision", "metadata.jsonl"])
def test_data_of_a_hub(kind, tmp_path):
    """In a process of its own, as both packages read the hub's address when they are loaded."""
    samples, folder, hub = captioned(8), tmp_path / "data", dataset_hub()
    folder.mkdir()
    WRITERS[kind][0](folder, samples)
    paths = [path for path in folder.rglob("*") if path.is_file()]
    hub.add("datasets/org/name", {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})
    around = {**os.environ, **environment(hub.address, tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    around.pop("HF_DATASETS_CACHE", None)
    answers = [samples[n].messages[1]["content"] for n in (0, 7)]
    wanted = f"8 {answers} {make_picture(7, 12).getpixel((3, 3))}"

    def read(*asked: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", READ, str(tmp_path / "rows"), *asked]
        return subprocess.run(command, env=around, capture_output=True, text=True, timeout=100)

    try:
        first = read("hf:org/name", "hf:org/name?streaming=1")
        assert first.stdout.splitlines() == [wanted, wanted], first.stderr
        assert len(hub.contents_sent()) > 2
        hub.requests.clear()
        hub.refuse = (401, {})
        second = read("hf:org/name?streaming=1", "hf:org/name", "hf:org/name?revision=x")
        assert second.stdout.splitlines() == [wanted, wanted]  # what is kept
        assert "hf:org/name?revision=x: the hub does not answer, so that nobody knows which" in second.stderr
    finally:
        hub.close()
