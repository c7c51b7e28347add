"""The columns of a shard: what a sample has, as a row of a parquet that MiniMind's readers and others know.

conversations  text, JSON: [{"role", "content"}, ...]; null where the sample is a plain text
text           text: the plain text; only where the data set has such samples
image_bytes    list of bytes: the pictures' files as they are
extra          text, JSON: other fields that have no column of their own; only where there are any
...            other fields, under their own names
"""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow

from dataset.samples import Sample

CONVERSATIONS, TEXT, PICTURES, EXTRA = "conversations", "text", "image_bytes", "extra"
# Names by which readers know a format: a field that has one stands in `extra`.
RESERVED = {CONVERSATIONS, TEXT, PICTURES, EXTRA, "messages", "texts", "image", "images", "image_names", "data"}
MAX_FIELDS = 64  # columns for other fields; what is beyond goes to `extra`
KINDS = {str: "string", bool: "bool", int: "int64", float: "double"}  # of a field that has a column, as Arrow says
MIXED = "json"  # of one that stands in `extra`
INTEGERS = range(-(1 << 63), 1 << 63)
DIGEST = 16  # bytes


@dataclass
class Columns:
    """Which columns a data set needs.

    A field that is text, a number, or true or false, of one kind in all samples, has a column of its own; all others
    stand together in `extra`.
    """

    has_conversations: bool = False
    has_texts: bool = False
    fields: dict[str, str] = field(default_factory=dict)  # name to one of KINDS, or MIXED

    def add(self, sample: Sample) -> None:
        """Make room for a sample's fields. Null is as if a field were not there."""
        self.has_conversations |= sample.text is None
        self.has_texts |= sample.text is not None
        for name, value in sample.extra.items():
            if value is None:
                continue
            kind = _kind(name, value)
            is_new_column = name not in self.fields and len(self.fields) >= MAX_FIELDS
            self.fields[name] = MIXED if is_new_column or self.fields.get(name, kind) != kind else kind

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def schema(self, metadata: dict[bytes, str]) -> pyarrow.Schema:
        columns = [(CONVERSATIONS, pyarrow.string())] if self.has_conversations else []
        columns += [(TEXT, pyarrow.string())] if self.has_texts else []
        columns += [(PICTURES, pyarrow.list_(pyarrow.binary()))] if self.has_conversations else []
        columns += [(name, pyarrow.type_for_alias(kind)) for name, kind in self.fields.items() if kind != MIXED]
        columns += [(EXTRA, pyarrow.string())] if MIXED in self.fields.values() else []
        return pyarrow.schema(columns, metadata)

    def row(self, sample: Sample, pictures: list[bytes]) -> dict:
        """A sample as a row of the schema."""
        extra = {name: value for name, value in sample.extra.items() if value is not None}
        row = {name: extra.pop(name, None) for name, kind in self.fields.items() if kind != MIXED}
        row |= {PICTURES: pictures, EXTRA: json.dumps(extra) if extra else None}
        return row | {CONVERSATIONS if sample.text is None else TEXT: text_of(sample)}


def _kind(name: str, value: object) -> str:
    """MIXED also where Arrow cannot hold it: half of a surrogate pair, a number beyond 64 bits."""
    kind = KINDS.get(type(value), MIXED) if name not in RESERVED else MIXED
    try:
        name.encode()
        if isinstance(value, str):
            value.encode()
    except UnicodeEncodeError:
        return MIXED
    return MIXED if type(value) is int and value not in INTEGERS else kind


def text_of(sample: Sample) -> str:
    """What the column `text` or `conversations` holds."""
    return json.dumps(sample.messages, ensure_ascii=False) if sample.text is None else sample.text


def facts_of(picture: Path | bytes) -> tuple[bytes, int]:
    """sha256 and number of bytes of its file. Raises OSError."""
    with picture.open("rb") if isinstance(picture, Path) else io.BytesIO(picture) as file:
        return hashlib.file_digest(file, "sha256").digest(), file.tell()


def digest_of(text: str, pictures: Sequence[bytes]) -> bytes:
    """Of a sample, by its text and the sha256 of each picture; other fields have no part in it."""
    return hashlib.sha256(b"".join((hashlib.sha256(text.encode()).digest(), *pictures))).digest()[:DIGEST]
