"""hf:NAME?key=value&key=value: what is asked of the library `datasets`, as --data_path says it."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from dataset.samples import DataError

SCHEME = "hf:"
KEYS = ("name", "split", "revision", "data_files", "data_dir", "streaming")  # load_dataset's own
SPLIT = "train"
SAVED, SAVED_SPLITS = ("dataset_info.json", "state.json"), "dataset_dict.json"  # what save_to_disk writes
KINDS = ("json", "csv", "parquet", "arrow", "text", "imagefolder", "webdataset")  # of files; there are more
EXAMPLE = "hf:json?data_files=a.jsonl"


@dataclass(frozen=True)
class HubQuery:
    """text: as it was typed; NAME is a data set of the hub, a folder, or a kind of files as load_dataset knows them."""

    text: str
    dataset: str
    name: str | None = None
    split: str | None = None
    revision: str | None = None
    data_files: tuple[str, ...] = ()
    data_dir: str | None = None
    streaming: bool = False

    @property
    def is_saved(self) -> bool:
        """Whether it is a folder that save_to_disk wrote."""
        return is_saved(self.dataset)

    def local_files(self) -> list[Path]:
        """What of it lies on this machine as files that anyone may change."""
        places = [Path(place) for place in (self.dataset, self.data_dir) if place and os.path.isdir(place)]
        files = [path for place in places for path in sorted(place.rglob("*"))]
        for pattern in self.data_files:
            if "://" not in pattern:
                path = Path(self.data_dir or "") / pattern
                files += sorted(path.parent.glob(path.name))
        return [path for path in files if path.is_file()]

    def folders(self) -> list[Path]:
        """Folders of this machine that it is read from."""
        named = [Path(self.data_dir or "", file).parent for file in self.data_files if "://" not in file]
        places = [Path(place) for place in (self.dataset, self.data_dir) if place and os.path.isdir(place)]
        return [*places, *(place for place in named if place.is_dir() and "*" not in str(place))]

    def short_name(self, rows: int) -> str:
        """For a file that holds the first so many rows of it, 0 for all: another query, or changed files, another name.

        What the hub holds under the same name and revision is not asked for.
        """
        files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in self.local_files()]
        keys = (self.dataset, self.name, self.split or SPLIT, self.revision, self.data_files, self.data_dir)
        digest = hashlib.sha256(json.dumps([keys, rows, files]).encode()).hexdigest()[:12]
        parts = [self.dataset, self.name or "", self.split or SPLIT]
        said = "-".join(part.strip("/").rpartition("/")[2] for part in parts if part)
        said = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in said)
        return f"{said[:80]}{f'.first-{rows}' if rows else ''}.{digest}"


def is_hub(path: str | Path) -> bool:
    """Whether a data path is one that the library opens."""
    return str(path).startswith(SCHEME) or is_saved(path)


def is_saved(path: str | Path) -> bool:
    splits, *files = (os.path.isfile(os.path.join(path, name)) for name in (SAVED_SPLITS, *SAVED))
    return splits or all(files)  # a Path would raise where the folder may not be read


def parse_query(text: str) -> HubQuery:
    """`hf:NAME?key=value&...`, or the path of a folder that save_to_disk wrote.

    In values %2C is a comma, %26 is & and %25 is %. Raises DataError naming what is not understood.
    """
    if not text.startswith(SCHEME):
        return HubQuery(text, text)
    dataset, _, query = text.removeprefix(SCHEME).partition("?")
    if not dataset:
        raise DataError(f"{text}: no data set is named behind {SCHEME}, write it as in {EXAMPLE}")
    values: dict[str, list[str]] = {}
    for part in filter(None, query.split("&")):
        key, _, value = part.partition("=")
        if key not in KEYS:
            raise DataError(f"{text}: {key!r} is none of {', '.join(KEYS)}: write it as in {EXAMPLE}")
        if not value:
            raise DataError(f"{text}: {key} has no value: give it one, or leave it out")
        values.setdefault(key, []).append(unquote(value))
    files = tuple(values.pop("data_files", ()))
    if twice := [key for key, given in values.items() if len(given) > 1]:
        raise DataError(f"{text}: {twice[0]} stands there twice, only data_files may: name it once")
    settings = {key: given[0] for key, given in values.items()}
    streaming = settings.pop("streaming", "0")
    if streaming not in ("0", "1"):
        raise DataError(f"{text}: streaming={streaming} must be 0 or 1")
    query = HubQuery(text, dataset, data_files=files, streaming=streaming == "1", **settings)
    if dataset in KINDS and not (files or query.data_dir):  # the library would take whatever lies in this folder
        raise DataError(f"{text}: {dataset} is a kind of files: name them with data_files, as in {EXAMPLE}")
    return query
