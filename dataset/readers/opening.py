"""read_samples: a file, a folder, or several of one kind, to samples that are read when they are asked for."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dataset.options import ReadOptions
from dataset.readers.csv_rows import CsvRows
from dataset.readers.hub_query import is_hub
from dataset.readers.image_folder import METADATA, image_folder
from dataset.readers.joined import Joined
from dataset.readers.json_lines import JsonLines
from dataset.readers.pictures import Pictures, pictures_of
from dataset.readers.plain_text import PlainText
from dataset.readers.reader import Reader
from dataset.readers.tar_shards import TarShards
from dataset.readers.tsv_rows import TsvRows
from dataset.samples import DataError, Sample
from dataset.sources import open_sources
from model.files import ROOT
from model.messages import UserError, counted, did_you_mean

ENDINGS = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt", ".tar")
TABLES = {".csv": CsvRows, ".tsv": TsvRows}
CURES = {
    ".gz": ": unpack it, with gunzip or as an archive's own program does",
    ".xlsx": ": save the table as .csv, in UTF-8",
    ".zip": ": a .zip holds pictures and is named by --images_path, --data_path names what is said of them",
}  # of what is not read
COPIES = ROOT / "out" / "rows"
REASONS_SHOWN = 3  # of samples that were left out, in a line
UNFINISHED, COMPLETE = "survey.npz", "index.json"  # in a folder of scripts/prepare_data.py, before its end and at it
SEVERAL = re.compile(r"\{(\d+)\.\.(\d+)\}")  # shards: data/{000..011}.tar


def read_samples(
    path: str | Path, options: ReadOptions | None = None, copies: Path = COPIES, say: Callable = print
) -> Reader | Joined:
    """Open a data file, a folder of them, or `hf:...` (hub_rows); samples are parsed when they are asked for.

    copies: where a parquet's copy goes if the folder that it lies in takes none.

    Raises:
        DataError: nothing there can be read, with the reason and a cure.
    """
    options = options or ReadOptions()
    if is_hub(path):
        from dataset.readers.hub_rows import open_hub  # here, as it loads pyarrow and the package `datasets`

        reader = open_hub(str(path), options, copies, say)
        if not len(reader):
            raise DataError(f"{path} holds no sample")
        return reader.recognise()
    path = Path(path)

    def read(file: Path, options: ReadOptions = options, pictures: Pictures | None = None) -> Reader:
        return _open(file, options, pictures, copies, say)

    shards = _shards(path)
    if shards and shards[0].suffix == ".tar":
        reader = TarShards(path, shards, options)
    elif shards:
        reader = _in_turn(shards, options, read)
    else:
        reader = image_folder(path, options, read) if _is_folder(path) else read(path)
    if not len(reader):
        raise DataError(f"{path} holds no sample")
    return reader.recognise()


def _open(path: Path, options: ReadOptions, pictures: Pictures | None, copies: Path, say: Callable) -> Reader:
    """One file, by its ending. pictures: those that it names, where options do not say."""
    if not path.is_file():
        make = ", or make Emoji World: python scripts/build_emoji_world.py" if "emoji" in str(path).lower() else ""
        meant = did_you_mean(path).replace(": did", "; did", 1)
        raise DataError(f"{path} does not exist: check --data_path and --val_path{make}{meant}")
    if path.suffix not in ENDINGS:
        cure = CURES.get(path.suffix.lower(), "")
        raise DataError(f"{path}: the ending {path.suffix!r} is none of {', '.join(ENDINGS)}{cure}")
    if path.suffix == ".tar":
        return TarShards(path, [path], options)
    if path.suffix == ".txt":
        return PlainText(path, options)
    pictures = pictures or pictures_of(path, options)
    if path.suffix == ".parquet":
        from dataset.readers.parquet_rows import ParquetRows  # here, as it loads pyarrow, which few runs need

        return ParquetRows(path, options, pictures, copies, say)
    return TABLES.get(path.suffix, JsonLines)(path, options, pictures)


def _in_turn(shards: Sequence[Path], options: ReadOptions, read: Callable[..., Reader]) -> Joined:
    """Shards one after the other, no more of them than --max_samples needs."""
    readers, left = [], options.max_samples
    for shard in shards:
        readers.append(read(shard, replace(options, max_samples=left)))
        if options.max_samples:
            left -= len(readers[-1])
            if not left:
                break
    return Joined(readers)


def is_there(path: str) -> bool:
    """Whether something that read_samples opens has this name, as far as can be told at once."""
    return os.path.exists(path) or is_hub(path) or bool(SEVERAL.search(path)) or "*" in os.path.basename(path)


def _shards(path: Path) -> list[Path]:
    """The .tar or .parquet files that a folder or a pattern stands for; none where it stands for itself.

    Patterns are `data/{000..011}.tar` and `data/train-*.parquet`. Of a folder that has files called train the others
    are left: they are held out. Raises DataError where one of a row is missing, or no file has such a name.
    """
    if several := SEVERAL.search(str(path)):
        first, last = several.groups()
        names = (f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1))
        shards = [Path(SEVERAL.sub(name, str(path), count=1)) for name in names]
        if missing := [shard for shard in shards if not shard.is_file()]:
            raise DataError(f"{missing[0]} does not exist, one of {counted(len(shards), 'files')} of {path}")
        return shards
    if "*" in path.name and not path.exists():
        found = sorted(path.parent.glob(path.name))
        if not found:
            raise DataError(f"{path}: no file has such a name")
        return found
    if not _is_folder(path) or any((path / name).is_file() for name in METADATA):
        return []
    if (path / UNFINISHED).is_file() and not (path / COMPLETE).is_file():
        raise DataError(f"{path} is not complete: give the same scripts/prepare_data.py command again, which goes on")
    for ending in (".parquet", ".tar"):
        for folder in (path, path / "data"):  # the hub's repositories keep theirs in the second
            if found := sorted(file for file in folder.glob(f"*{ending}") if file.is_file()):
                return [file for file in found if file.name.startswith("train")] or found
    return []


def _is_folder(path: Path) -> bool:
    return path.is_dir() and path.suffix not in ENDINGS


def open_data(path: str | Path, options: ReadOptions | None = None) -> Sequence[Sample]:
    """The data that a command was given, as --data_path takes them; weights, which decide nothing here, do no harm.

    Raises UserError where they cannot be used.
    """
    images_path = options.images_path if options else ""

    def read(one: str) -> Sequence[Sample]:
        if Path(one).suffix and not is_there(one):
            raise UserError(f"{one} does not exist{did_you_mean(one) or ': check --data'}")
        return read_samples(one, options)

    if images_path and not Path(images_path).exists():
        raise UserError(f"--images_path {images_path} does not exist{did_you_mean(images_path)}")
    return open_sources(str(path), read)


def left_out(reasons: Sequence[object], count: int, things: str) -> str:
    """One line about what could not be used, of so many. Raises UserError where that is all of them."""
    first = "; ".join(map(str, reasons[:REASONS_SHOWN])) + ("; ..." if len(reasons) > REASONS_SHOWN else "")
    if len(reasons) == count:
        raise UserError(first if count == 1 else f"none of {counted(count, things)} can be used: {first}")
    return f"left out {len(reasons):,} of {counted(count, things)}: {first}"
