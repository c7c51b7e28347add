"""The same samples written in every public format: each writer takes Written samples and gives the path to read."""

import base64
import csv
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow
from pyarrow import parquet

from helpers.data import write_jsonl

TAG = "<image>"


class Written(NamedTuple):
    """A conversation, TAG where a picture goes, and the pictures' bytes (PNG)."""

    messages: list[dict]
    pictures: list[bytes]


def save_pictures(folder: Path, samples: Sequence[Written]) -> list[list[str]]:
    """Into a folder; returns the names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [[f"{n:04}_{m}.png" for m in range(len(sample.pictures))] for n, sample in enumerate(samples)]
    for sample, row in zip(samples, names, strict=True):
        for content, name in zip(sample.pictures, row, strict=True):
            (folder / name).write_bytes(content)
    return names


def save_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def save_tar(path: Path, files: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


# ---- lines and lists


def _minimind_records(samples: Sequence[Written], names: list[list[str]]) -> list[dict]:
    return [{"image": row, "conversations": sample.messages} for sample, row in zip(samples, names, strict=True)]


def minimind(folder: Path, samples: Sequence[Written]) -> Path:
    names = save_pictures(folder / "images", samples)
    return write_jsonl(folder / "minimind.jsonl", _minimind_records(samples, names))


def minimind_and_zip(folder: Path, samples: Sequence[Written]) -> Path:
    """The pictures deflated in the zip that --images_path names."""
    names = save_pictures(folder / "loose", samples)
    files = {name: (folder / "loose" / name).read_bytes() for row in names for name in row}
    save_zip(folder / "images.zip", files)
    return write_jsonl(folder / "minimind.jsonl", _minimind_records(samples, names))


def minimind_and_tar(folder: Path, samples: Sequence[Written]) -> Path:
    names = save_pictures(folder / "loose", samples)
    save_tar(folder / "images.tar", [(name, (folder / "loose" / name).read_bytes()) for row in names for name in row])
    return write_jsonl(folder / "minimind.jsonl", _minimind_records(samples, names))


def _llava_records(samples: Sequence[Written], names: list[list[str]]) -> list[dict]:
    speakers = {"user": "human", "assistant": "gpt", "system": "system"}
    records = []
    for number, (sample, row) in enumerate(zip(samples, names, strict=True)):
        turns = [{"from": speakers[m["role"]], "value": m["content"]} for m in sample.messages]
        record = {"id": f"{number:012}", "image": row[0] if len(row) == 1 else row, "conversations": turns}
        records.append({name: value for name, value in record.items() if value != []})
    return records


def llava(folder: Path, samples: Sequence[Written]) -> Path:
    """One list, indented, as LLaVA publishes it."""
    names = save_pictures(folder / "images", samples)
    path = folder / "llava.json"
    path.write_text(json.dumps(_llava_records(samples, names), ensure_ascii=False, indent=2), encoding="utf-8")
    return path


def llava_lines(folder: Path, samples: Sequence[Written]) -> Path:
    return write_jsonl(folder / "llava.jsonl", _llava_records(samples, save_pictures(folder / "images", samples)))


def _parts(content: str) -> list[dict]:
    first, *rest = content.split(TAG)
    parts = [{"type": "text", "text": first}]
    for text in rest:
        parts += [{"type": "image", "text": None}, {"type": "text", "text": text}]
    return [part for part in parts if part["text"] != ""]


def messages(folder: Path, samples: Sequence[Written]) -> Path:
    """Typed content parts, as chat templates take them."""
    names = save_pictures(folder / "images", samples)
    records = []
    for sample, row in zip(samples, names, strict=True):
        talk = [{"role": m["role"], "content": _parts(m["content"])} for m in sample.messages]
        records.append({"messages": talk, "images": row})
    return write_jsonl(folder / "messages.jsonl", records)


# ---- tables


def minimind_parquet(folder: Path, samples: Sequence[Written]) -> Path:
    columns = {
        "conversations": [json.dumps(sample.messages, ensure_ascii=False) for sample in samples],
        "image_bytes": pyarrow.array([sample.pictures for sample in samples], pyarrow.list_(pyarrow.binary())),
    }
    parquet.write_table(pyarrow.table(columns), folder / "minimind.parquet", row_group_size=64)
    return folder / "minimind.parquet"


STORED = pyarrow.list_(pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))


def _stored(samples: Sequence[Written]) -> pyarrow.Array:
    """As the data sets library stores pictures."""
    return pyarrow.array([[{"bytes": content, "path": None} for content in s.pictures] for s in samples], STORED)


def messages_parquet(folder: Path, samples: Sequence[Written]) -> Path:
    talks = [[{"role": m["role"], "content": _parts(m["content"])} for m in s.messages] for s in samples]
    path = folder / "messages.parquet"
    parquet.write_table(pyarrow.table({"images": _stored(samples), "messages": talks}), path)
    return path


def finevision(folder: Path, samples: Sequence[Written]) -> Path:
    """Shards, in the folder that the hub's repositories have. Pictures come first, which the text does not say."""
    (folder / "data").mkdir()
    half = len(samples) // 2
    for number, part in enumerate((samples[:half], samples[half:])):
        texts, ratings = [], []
        for sample in part:
            said = [m["content"].replace(TAG, "").removeprefix("\n") for m in sample.messages]
            turns = zip(said[::2], said[1::2], strict=True)
            texts.append([{"user": user, "assistant": answer, "source": "x"} for user, answer in turns])
            ratings.append([5] * len(texts[-1]))
        columns = {"images": _stored(part), "texts": texts, "source": ["x"] * len(part), "relevance_ratings": ratings}
        parquet.write_table(pyarrow.table(columns), folder / "data" / f"train-{number:05}-of-00002.parquet")
    return folder


# ---- WebDataset, folders


def webdataset(folder: Path, samples: Sequence[Written]) -> Path:
    """Two shards of `.json` and pictures."""
    half, paths = len(samples) // 2, []
    for shard, part in enumerate((samples[:half], samples[half:])):
        files = []
        for number, sample in enumerate(part):
            record = json.dumps({"conversations": sample.messages}, ensure_ascii=False)
            files.append((f"{number:06}.json", record.encode()))
            files += [(f"{number:06}.{m}.png" if m else f"{number:06}.png", c) for m, c in enumerate(sample.pictures)]
        paths.append(save_tar(folder / f"{shard:03}.tar", files))
    return folder / "{000..001}.tar"


def captions_webdataset(folder: Path, samples: Sequence[Written]) -> Path:
    files = []
    for number, sample in enumerate(samples):
        files += [(f"a/{number:06}.png", sample.pictures[0]), (f"a/{number:06}.txt", answer_of(sample).encode())]
    return save_tar(folder / "captions.tar", files)


def answer_of(sample: Written) -> str:
    return sample.messages[-1]["content"]


def _named(samples: Sequence[Written], folder: Path) -> list[tuple[str, str]]:
    """(file, caption) of samples of one picture and one answer."""
    names = save_pictures(folder, samples)
    return [(row[0], answer_of(sample)) for row, sample in zip(names, samples, strict=True)]


def metadata_csv(folder: Path, samples: Sequence[Written]) -> Path:
    named = _named(samples, folder)
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *named])
    return folder


def metadata_jsonl(folder: Path, samples: Sequence[Written]) -> Path:
    write_jsonl(folder / "metadata.jsonl", [{"file_name": n, "caption": c} for n, c in _named(samples, folder)])
    return folder


def metadata_parquet(folder: Path, samples: Sequence[Written]) -> Path:
    files, said = zip(*_named(samples, folder), strict=True)
    parquet.write_table(pyarrow.table({"file_name": list(files), "text": list(said)}), folder / "metadata.parquet")
    return folder


def text_files(folder: Path, samples: Sequence[Written]) -> Path:
    for name, caption in _named(samples, folder):
        (folder / name).with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    return folder


def questions(folder: Path, samples: Sequence[Written]) -> Path:
    records = []
    for (name, answer), sample in zip(_named(samples, folder / "images"), samples, strict=True):
        question = sample.messages[0]["content"].replace(TAG, "").removeprefix("\n")
        records.append({"image": name, "question": question, "answer": answer})
    return write_jsonl(folder / "questions.jsonl", records)


def tsv(folder: Path, samples: Sequence[Written]) -> Path:
    """VLMEvalKit's, pictures in base64."""
    rows = [("index", "image", "question", "answer", "category")]
    for number, sample in enumerate(samples):
        question = sample.messages[0]["content"].replace(TAG, "").removeprefix("\n")
        pictures = base64.b64encode(sample.pictures[0]).decode()
        rows.append((str(number), pictures, question, answer_of(sample), "any"))
    with (folder / "questions.tsv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(rows)
    return folder / "questions.tsv"


Writer = Callable[[Path, Sequence[Written]], Path]
# What can say everything: several pictures anywhere, several turns.
ANY_TALK: dict[str, tuple[Writer, str]] = {
    "minimind": (minimind, "minimind"), "minimind and a zip": (minimind_and_zip, "minimind"),
    "minimind and a tar": (minimind_and_tar, "minimind"), "minimind's parquet": (minimind_parquet, "minimind"),
    "llava": (llava, "llava"), "llava's lines": (llava_lines, "llava"),
    "messages": (messages, "messages"), "messages in parquet": (messages_parquet, "messages"),
    "WebDataset": (webdataset, "minimind"),
}  # fmt: skip
# What can say a caption, or pictures ahead of a question; and the name of the format that is recognised.
WRITERS: dict[str, tuple[Writer, str]] = {
    **ANY_TALK, "finevision": (finevision, "finevision"), "questions": (questions, "questions"),
    "a .tsv": (tsv, "questions"), "captions in tars": (captions_webdataset, "captions"),
    "metadata.csv": (metadata_csv, "captions"),
    "metadata.jsonl": (metadata_jsonl, "captions"), "metadata.parquet": (metadata_parquet, "captions"),
    "texts beside pictures": (text_files, "captions"),
}  # fmt: skip


def images_path(writer: str, folder: Path) -> str:
    """The --images_path that a writer's data need."""
    return {"minimind and a zip": str(folder / "images.zip"), "minimind and a tar": str(folder / "images.tar")}.get(
        writer, ""
    )
