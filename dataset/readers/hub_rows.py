"""Whatever the library `datasets` opens: of the hub, of local files of any kind, or what save_to_disk wrote.

Rows are read out of the library's own Arrow files, which it maps into memory: nothing is copied. What is streamed has
no random access, and is written down first: dataset.readers.hub_stream.
"""

import pickle
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from dataset.formats import EMBEDDED_PICTURES, NESTED_FIELDS, PICTURE_FIELDS, RATINGS, TEXT_FIELDS, check_columns
from dataset.options import ReadOptions
from dataset.readers.hub_query import SPLIT, HubQuery, parse_query
from dataset.readers.pictures import PictureFolder, Pictures, pictures_of
from dataset.readers.reader import Reader
from dataset.samples import BadSample, DataError, parse
from model.messages import UserError, plain

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, IterableDataset

KNOWN = (*TEXT_FIELDS, *RATINGS, *PICTURE_FIELDS, EMBEDDED_PICTURES)
MISSING = "is opened by the package `datasets`, which is not installed: pip install -r requirements/hub.txt"
ONE_VALUE = re.compile(r"bool|u?int\d+|float\d+|(large_)?string")
KEPT_MAPPED = 500  # rows that are read before the files are mapped anew
ROWS_A_FILE = 20  # at least, where there are many files, which take a millisecond each
READ_BUFFER = 8 << 20  # bytes of a parquet that are asked for together
MOST_SAID = 300  # letters of what the library says


def open_hub(path: str, options: ReadOptions, copies: Path, say: Callable) -> Reader:
    """path: `hf:...`, or a folder that save_to_disk wrote. copies: the folder where what is streamed is kept.

    Raises DataError where the package is absent, the hub cannot be reached, or nothing there has this name.
    """
    query = parse_query(path)
    library(path)
    pictures = hub_pictures(query, options)
    if query.is_saved or not query.streaming:
        return HubRows(query, options, pictures)
    from dataset.readers.hub_stream import kept_stream
    from dataset.readers.parquet_rows import ParquetRows

    return ParquetRows(kept_stream(query, options, copies, say), options, pictures, copies, say)


def library(path: str) -> ModuleType:
    """The package, which few runs need and which takes seconds to load. Raises DataError where it is absent."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise DataError(f"{path} {MISSING}") from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # thousands of carriage returns in a file
    return datasets


class HubRows(Reader):
    """Rows of an Arrow table that the library keeps."""

    stored_as = "a table of the library datasets"

    def __init__(self, query: HubQuery, options: ReadOptions, pictures: Pictures | None):
        """Raises DataError."""
        super().__init__(query.text, options, pictures)
        table = load(query)
        self.fingerprint = table._fingerprint  # the library's, of files and of all that was done with them
        if options.max_samples:
            table = table.select(range(min(options.max_samples, len(table))))
        # As Arrow, pictures stay the bytes that they are, and nothing is made of any other column.
        kept = kept_columns(table.features, query.text)
        self.table = table.select_columns(kept).with_format("arrow")
        self.kinds = {name: table.features[name] for name in kept}
        self._kept_mapped = max(KEPT_MAPPED, ROWS_A_FILE * len(self.table.cache_files))
        self._read = 0  # rows, since the files were mapped

    def __len__(self) -> int:
        return len(self.table)

    def where(self, index: int) -> str:
        return f"{self.path}:{index + 1}"

    def facts(self) -> list:
        return [self.fingerprint, len(self)]

    def record(self, index: int) -> dict:
        where = self.where(index)
        self._read += 1
        if self._read > self._kept_mapped:
            # A copy names the files, and maps them anew: what was read would count as memory of this process.
            self.table, self._read = pickle.loads(pickle.dumps(self.table)), 1
        try:
            (row,) = self.table[int(index)].to_pylist()
            record = record_of(row, self.kinds)
            record |= {name: parse(record[name]) for name in NESTED_FIELDS if isinstance(record.get(name), str)}
        except (ValueError, RecursionError) as error:
            raise BadSample(where, f"it holds what cannot be read ({str(error)[:120]}): mend or delete it") from error
        stored = next((name for name in PICTURE_FIELDS if stored_pictures(record.get(name))), None)
        if stored:
            record[EMBEDDED_PICTURES] = stored_pictures(record.pop(stored))
        return record


def stored_pictures(value: object) -> list[dict | bytes]:
    """Pictures that a field holds, rather than names of them."""
    values = value if isinstance(value, list) else [value]
    return [one for one in values if isinstance(one, (dict, bytes))]


def record_of(row: dict, kinds: dict) -> dict:
    """A row of a table as the record that was put into it. kinds: the library's, of its columns. Raises ValueError."""
    record = {name: decoded(row[name], kind) for name, kind in kinds.items() if row.get(name) is not None}
    for name in NESTED_FIELDS:
        fields = record.get(name)  # a list of objects, as older versions of the library kept it: field by field
        if isinstance(fields, dict) and _are_columns(list(fields.values())):
            record[name] = [dict(zip(fields, one, strict=True)) for one in zip(*fields.values(), strict=True)]
    return record


def _are_columns(values: list) -> bool:
    return all(isinstance(value, list) for value in values) and len(set(map(len, values))) == 1


def decoded(value: object, kind: object) -> object:
    """With JSON text, which the library keeps values of several types as, as what it says."""
    if value is None:
        return None
    if type(kind).__name__ == "Json":
        return parse(value)
    if isinstance(kind, dict):
        return {name: decoded(value[name], inner) for name, inner in kind.items()}
    inner = kind[0] if isinstance(kind, list) else getattr(kind, "feature", None)
    return [decoded(one, inner) for one in value] if inner is not None and isinstance(value, list) else value


def load(query: HubQuery) -> "Dataset | IterableDataset":
    """The rows of one split. Raises DataError with what the library says."""
    datasets = library(query.text)
    with told(query):
        if query.is_saved:
            return _saved(datasets, query)
        settings = {
            "name": query.name, "revision": query.revision, "data_files": list(query.data_files) or None,
            "data_dir": query.data_dir,
        }  # fmt: skip
        builder = datasets.load_dataset_builder(query.dataset, **settings)
        if query.revision and type(builder).__name__ == "Cache":
            raise DataError(  # it would take what it has kept, of whatever revision
                f"{query.text}: the hub does not answer, so that nobody knows which revision is kept here: start again "
                "with a connection, or leave revision out"
            )
        if query.streaming:
            return _streamed(builder, query.split or SPLIT)
        return datasets.load_dataset(query.dataset, split=query.split or SPLIT, keep_in_memory=False, **settings)


def _streamed(builder: "DatasetBuilder", split: str) -> "IterableDataset":
    """What load_dataset does, but for parquets, of which pyarrow would hold all that was read of a file."""
    if hasattr(builder.config, "fragment_scan_options"):
        from pyarrow.dataset import ParquetFragmentScanOptions

        builder.config.fragment_scan_options = ParquetFragmentScanOptions(
            pre_buffer=False, use_buffered_stream=True, buffer_size=READ_BUFFER
        )
    return builder.as_streaming_dataset(split=split)


def _saved(datasets: ModuleType, query: HubQuery) -> "Dataset":
    useless = ("name", "revision", "data_files", "data_dir", "streaming")
    if given := [key for key in useless if getattr(query, key)]:
        raise DataError(f"{query.text}: {given[0]} says nothing of a folder that save_to_disk wrote: leave it out")
    found = datasets.load_from_disk(query.dataset, keep_in_memory=False)
    if not isinstance(found, dict):
        if query.split:
            raise DataError(f"{query.text}: the folder holds one split, leave split={query.split} out")
        return found
    split = query.split or SPLIT
    if split not in found:
        raise DataError(f"{query.text}: it has no split {split!r}, choose from {', '.join(found)} with ?split=")
    return found[split]


@contextmanager
def told(query: HubQuery) -> Iterator[None]:
    """Whatever the library raises, as a sentence: it, and the dozen packages below it, have no common exception."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
        said = plain(" ".join(f"{type(cause).__name__}: {cause}".split()))[:MOST_SAID]
        raise DataError(
            f"{query.text}: datasets cannot read it ({said}): check what is asked for, its files and the connection"
        ) from error


def kept_columns(features: dict, path: str) -> list[str]:
    """What a format knows, and what is one number or text; bytes of sound or of video are never read.

    Raises DataError where no format knows any.
    """
    check_columns(path, features)
    return [name for name, kind in features.items() if name in KNOWN or ONE_VALUE.fullmatch(_type_name(kind))]


def _type_name(kind: object) -> str:
    return str(getattr(kind, "dtype", "")) if type(kind).__name__ in ("Value", "ClassLabel") else ""


# ---- pictures that lie in files


class OwnFiles:
    """Pictures by name in `folder`, or by an absolute path as the library names them, inside the data set's own."""

    def __init__(self, folder: Pictures | None, own: list[Path]):
        self.folder, self.own = folder, [PictureFolder(place) for place in own]

    def identity(self) -> list:
        return self.folder.identity() if self.folder else []

    def find(self, where: str, name: str) -> Path | bytes:
        """Raises BadSample."""
        path = Path(name)
        if path.is_absolute():
            for place in self.own:
                if path.is_relative_to(place.folder) or path.resolve().is_relative_to(place.folder):
                    return place.find(where, name)
            raise BadSample(where, f"picture {name[:80]!r} lies outside the data set's own folders: it is not read")
        if self.folder is None:
            raise BadSample(where, f"picture {name[:80]!r} is named, and no folder is: give --images_path")
        return self.folder.find(where, name)


def hub_pictures(query: HubQuery, options: ReadOptions) -> OwnFiles:
    """Relative names lie in --images_path, by default in `images` beside local files."""
    folders = query.folders()
    beside = folders[-1] / "data" if folders else None
    named = pictures_of(beside or Path(), options) if beside or options.images_path else None
    return OwnFiles(named, [*folders, *_downloads(query)])


def _downloads(query: HubQuery) -> list[Path]:
    """Where the library keeps the files of this data set of the hub, and archives that it has unpacked."""
    from datasets import config
    from huggingface_hub import constants

    own = Path(constants.HF_HUB_CACHE) / f"datasets--{query.dataset.replace('/', '--')}"
    return [own, Path(config.EXTRACTED_DATASETS_PATH)]
