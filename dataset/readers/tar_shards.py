"""WebDataset: .tar files whose neighbouring members of one name are a record, `000.jpg`, `000.txt`, `000.json`."""

import os
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from dataset.formats import EMBEDDED_PICTURES, PICTURE_FIELDS
from dataset.options import ReadOptions
from dataset.readers.archives import STORED, Member, file_state, read_member, tar_members, why_not
from dataset.readers.image_folder import ENDINGS
from dataset.readers.reader import Reader
from dataset.samples import BadSample, DataError, parse, shown

PICTURES = tuple(ending.removeprefix(".") for ending in ENDINGS)
TEXTS = ("txt", "caption", "text")
READ = ("json", *TEXTS, *PICTURES)


class Part(NamedTuple):
    """A member of a record. kind: index into READ."""

    kind: int
    offset: int  # bytes
    size: int


class TarShards(Reader):
    """Where the members of each record lie, so that records are read in any order and nothing is unpacked."""

    stored_as = "WebDataset's tar files"

    def __init__(self, path: Path, shards: Sequence[Path], options: ReadOptions):
        super().__init__(path, options)
        self.shards = list(shards)
        self.states = [file_state(shard) for shard in self.shards]
        self.keys: list[bytes] = []
        self.refused: dict[int, str] = {}  # by record: why it cannot be used
        parts, starts, shard_of = array("q"), array("q", [0]), array("q")
        records = ((number, *record) for number, shard in enumerate(self.shards) for record in _records(shard))
        for number, key, members, reason in islice(records, options.max_samples or None):
            if reason:
                self.refused[len(self.keys)] = reason
            for part in members:
                parts.extend(part)
            self.keys.append(os.fsencode(key))
            starts.append(len(parts) // len(Part._fields))
            shard_of.append(number)
        self.parts = np.array(parts, np.int64).reshape(-1, len(Part._fields))
        self.starts, self.shard_of = np.array(starts), np.array(shard_of)
        self.keys = np.array(self.keys, np.bytes_)

    def __len__(self) -> int:
        return len(self.keys)

    def where(self, index: int) -> str:
        return f"{self.shards[self.shard_of[index]]}:{os.fsdecode(self.keys[index])}"

    def facts(self) -> list:
        return [[str(shard), *state] for shard, state in zip(self.shards, self.states, strict=True)]

    def record(self, index: int) -> dict:
        where = self.where(index)
        if index in self.refused:
            raise BadSample(where, self.refused[index])
        shard = self.shards[self.shard_of[index]]
        if file_state(shard) != self.states[self.shard_of[index]]:
            raise DataError(f"{shard} has changed since it was opened: start again when it is whole")
        record, pictures = {}, []
        for part in map(Part._make, self.parts[self.starts[index] : self.starts[index + 1]].tolist()):
            try:
                content = read_member(shard, Member(part.offset, part.size, part.size, STORED))
            except (OSError, ValueError) as error:
                raise BadSample(where, f"its .{READ[part.kind]} cannot be read ({error})") from error
            kind = READ[part.kind]
            if kind in PICTURES:
                pictures.append(content)
            else:
                record |= _read_text(where, kind, content)
        # What a .json names stands beside it.
        fields = {name: value for name, value in record.items() if name not in PICTURE_FIELDS}
        return fields | {EMBEDDED_PICTURES: pictures}


def _read_text(where: str, kind: str, content: bytes) -> dict:
    """The fields of a .json, or the caption of a .txt. Raises BadSample."""
    try:
        said = content.decode("utf-8-sig")
        if kind in TEXTS:
            return {"text": said.strip()}
        fields = parse(said)
    except (ValueError, RecursionError) as error:
        raise BadSample(where, f"its .{kind} cannot be read ({str(error)[:120]}): mend or delete it") from error
    if not isinstance(fields, dict):
        raise BadSample(where, f"its .json is {shown(fields)}, it must be an object {{...}}")
    return fields


def _records(shard: Path) -> Iterator[tuple[str, list[Part], str]]:
    """(key, members, reason to refuse it) of each record; a shard that is cut short ends with a refused one."""
    key, parts, endings, refused, seen = None, [], set(), "", set()
    try:
        for name, member, reason in tar_members(shard):
            place, _, ending = PurePosixPath(name).name.partition(".")  # `1.png` of `000.1.png`
            its_key = (PurePosixPath(name).parent / place).as_posix()
            if key is not None and its_key != key:
                yield key, parts, refused
                parts, endings, refused = [], set(), ""
            if its_key != key:
                refused = "another record before it has this name" if its_key in seen else ""
                seen.add(its_key)
            key, kind = its_key, ending.lower().rpartition(".")[2]
            reason = reason or why_not(name, member)
            if ending in endings:
                reason = "two members have this name"
            endings.add(ending)
            if reason:
                refused = refused or f"{shown(name)}: {reason}"
            elif kind in READ:
                parts.append(Part(READ.index(kind), member.offset, member.size))
    except DataError as error:
        if key is None:
            raise
        refused = str(error)
    if key is not None:
        yield key, parts, refused
