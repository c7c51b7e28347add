"""Readers: each turns one public format into the same Sample. A new format is one function and its line in READERS.

*.jsonl     MiniMind's: {"conversations": [{"role", "content"}, ...], "image": "a.jpg, b.jpg"} beside a folder of
            images, or {"text": "..."} for the base decoder
*.parquet   MiniMind's: columns conversations (JSON text) and image_bytes (one picture or a list of them)
"""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from model.processing import SampleError, open_picture


class DataError(ValueError):
    """Data that cannot be trained on; the message names file, line, reason and cure."""


@dataclass(frozen=True)
class Sample:
    """One conversation with its pictures, or one plain text."""

    where: str  # file:line, for messages
    messages: list[dict]
    pictures: tuple[Path | bytes, ...] = ()
    text: str | None = None  # then there are no messages
    extra: dict = field(default_factory=dict, compare=False)  # the record's other fields

    def open_pictures(self, decode: bool = True) -> list[Image.Image]:
        """RGB pictures in order. Raises DataError naming the line and the file."""
        opened = []
        for number, source in enumerate(self.pictures, 1):
            name = str(source) if isinstance(source, Path) else f"picture {number}"
            try:
                opened.append(open_picture(source if isinstance(source, Path) else io.BytesIO(source), decode))
            except SampleError as error:
                raise DataError(f"{self.where}: {name}: {error}") from error
        return opened


def read_samples(path: str | Path, images_path: str | Path | None = None) -> Sequence[Sample]:
    """Open a data file by its ending; samples are parsed when they are asked for.

    images_path: the folder of a JSONL's pictures; by default `images` beside the file.
    """
    path = Path(path)
    if path.suffix not in READERS:
        raise DataError(f"{path}: the ending {path.suffix!r} is none of {', '.join(READERS)}")
    if not path.is_file():
        raise DataError(
            f"{path} does not exist: check --data_path and --val_path, or make Emoji World: "
            "python scripts/build_emoji_world.py"
        )
    samples = READERS[path.suffix](path, Path(images_path) if images_path else path.parent / "images")
    if not len(samples):
        raise DataError(f"{path} holds no sample")
    return samples


class JsonLines(Sequence):
    """Byte offsets of the lines; a line is parsed when it is asked for, so that a large file costs little memory."""

    def __init__(self, path: Path, images_path: Path):
        self.path, self.images_path = path, images_path.resolve()
        self.lines: list[tuple[int, int, int]] = []  # line number, offset, bytes
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    self.lines.append((number, offset, len(line)))
                offset += len(line)

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Sample:
        number, offset, size = self.lines[index]
        with self.path.open("rb") as file:
            file.seek(offset)
            line = file.read(size)
        where = f"{self.path}:{number}"
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: this line is no JSON ({str(error)[:120]}): mend or delete it") from error
        if not isinstance(record, dict):
            raise DataError(f"{where}: this line is {type(record).__name__}, it must be an object {{...}}")
        return make_sample(where, record, [self._locate(where, name) for name in self._names(where, record)])

    @staticmethod
    def _names(where: str, record: dict) -> list[str]:
        names = record.get("image") or []
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise DataError(f"{where}: 'image' is {names!r:.80}: it must be a file name or a list of them")
        return names

    def _locate(self, where: str, name: str) -> Path:
        try:
            path = (self.images_path / name).resolve()
            exists = path.exists()
        except (OSError, ValueError, RuntimeError) as error:  # too long, NUL, half a surrogate pair, a loop of links
            raise DataError(f"{where}: no file can be called {name[:80]!r} ({str(error)[:80]})") from error
        if not path.is_relative_to(self.images_path):
            raise DataError(
                f"{where}: picture {name!r} lies outside {self.images_path}: use names inside --images_path"
            )
        if exists and not path.is_file():
            raise DataError(f"{where}: picture {name!r} is no regular file")
        return path


def read_parquet(path: Path, images_path: Path) -> Sequence[Sample]:
    return ParquetRows(path)


class ParquetRows(Sequence):
    """Rows of a parquet, through an uncompressed Arrow copy beside it that is mapped into memory.

    Parquet can only be read a row group at a time, in whole; training asks for rows in any order. The copy is written
    once, a row group at a time, and shared by all ranks and workers without taking their memory.
    """

    def __init__(self, path: Path):
        self.path = path
        self.arrow = path.with_name(f"{path.name}.{path.stat().st_size}-{path.stat().st_mtime_ns}.arrow")
        if not self.arrow.is_file():
            self._copy()
        self._table = None
        self._rows = self._open().num_rows

    def _copy(self) -> None:
        import os

        import pyarrow
        from pyarrow import parquet

        temporary = self.arrow.with_name(f".{self.arrow.name}.{os.getpid()}.tmp")
        try:
            file = parquet.ParquetFile(self.path, memory_map=True)
            absent = {"conversations", "image_bytes"} - set(file.schema_arrow.names)
            if absent:
                raise DataError(f"{self.path}: column {absent.pop()!r} is missing; it has {file.schema_arrow.names}")
            schema = pyarrow.schema([file.schema_arrow.field(name) for name in ("conversations", "image_bytes")])
            with pyarrow.OSFile(str(temporary), "wb") as sink, pyarrow.ipc.new_file(sink, schema) as writer:
                for group in range(file.num_row_groups):
                    writer.write_table(file.read_row_group(group, columns=schema.names).cast(schema))
            os.replace(temporary, self.arrow)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"{self.path}: cannot be read as parquet ({str(error)[:200]}): download it again"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _open(self):
        if self._table is None:
            import pyarrow

            self._table = pyarrow.ipc.open_file(pyarrow.memory_map(str(self.arrow))).read_all()
        return self._table

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_table": None}  # each worker maps the file itself

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> Sample:
        row = {name: self._open()[name][index].as_py() for name in ("conversations", "image_bytes")}
        where = f"{self.path}:{index + 1}"
        try:
            conversations = (
                json.loads(row["conversations"]) if isinstance(row["conversations"], str) else row["conversations"]
            )
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: 'conversations' is no JSON ({str(error)[:120]})") from error
        pictures = row["image_bytes"] if isinstance(row["image_bytes"], list) else [row["image_bytes"]]
        pictures = [picture for picture in pictures if picture]
        if not all(isinstance(picture, bytes) for picture in pictures):
            kinds = ", ".join(sorted({type(picture).__name__ for picture in pictures}))
            raise DataError(f"{where}: 'image_bytes' must be bytes or a list of them, it is {kinds}")
        return make_sample(where, {"conversations": conversations}, pictures)


def make_sample(where: str, record: dict, pictures: list[Path] | list[bytes]) -> Sample:
    """Check what can be checked without the tokenizer. Raises DataError."""
    if "text" in record:
        if not isinstance(record["text"], str) or not record["text"]:
            raise DataError(f"{where}: 'text' must be text that is not empty")
        return Sample(where, [], (), record["text"])
    messages = record.get("conversations")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise DataError(f'{where}: \'conversations\' must be a list of {{"role", "content"}}, it is {messages!r:.80}')
    for message in messages:
        if not isinstance(message.get("content"), str):
            raise DataError(f"{where}: a message's 'content' must be text, it is {message.get('content')!r:.80}")
    tags = sum(message["content"].count("<image>") for message in messages)
    if tags != len(pictures):
        raise DataError(
            f"{where}: the text holds {tags} <image> but the sample has {len(pictures)} pictures: make them equal"
        )
    extra = {name: value for name, value in record.items() if name not in ("conversations", "image")}
    return Sample(where, messages, tuple(pictures), extra=extra)


READERS: dict[str, Callable[[Path, Path], Sequence[Sample]]] = {".jsonl": JsonLines, ".parquet": read_parquet}
