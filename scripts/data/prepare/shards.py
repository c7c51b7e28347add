"""A shard: one parquet with checksums of its pages, in row groups that are small enough to be read alone."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow
from pyarrow import parquet

from dataset.samples import BadSample, DataError, Sample
from model.files import written_aside
from scripts.data.prepare.columns import CONVERSATIONS, PICTURES, TEXT, Columns, digest_of, text_of
from scripts.data.prepare.first_look import Survey
from scripts.data.prepare.plan import Shard

GROUP_BYTES = 8_000_000  # of a row group, a picture counted once
GROUP_IN_MEMORY = 64_000_000  # of a row group, a picture counted with every row that shows it
GROUP_ROWS = 500
MADE_BY = b"prepared"  # in a shard's metadata: the digest of the facts that it was made by
UNREADABLE = (pyarrow.ArrowException, OSError, ValueError)  # what pyarrow raises over damage


class Shards:
    """Writes the shards of a plan into a folder, and knows those that are there already."""

    def __init__(self, folder: Path, samples: Sequence[Sample], survey: Survey, columns: Columns, made_by: str):
        """made_by: a digest of all that decides what the shards hold."""
        self.folder, self.samples, self.survey, self.made_by = folder, samples, survey, made_by
        self.columns, self.schema = columns, columns.schema({MADE_BY: made_by})

    def is_whole(self, shard: Shard) -> bool:
        """Whether it is there, made by the same facts, without damage, and holds what it should."""
        try:
            file = parquet.ParquetFile(self.folder / shard.name, page_checksum_verification=True)
            schema = file.schema_arrow
            is_ours = schema.equals(self.schema) and (schema.metadata or {}).get(MADE_BY) == self.made_by.encode()
            if not is_ours or file.metadata.num_rows != len(shard.rows):
                return False
            found = (row for group in range(file.num_row_groups) for row in _digests(file.read_row_group(group)))
            return all(
                digest == self.survey.digests[place].tobytes() for digest, place in zip(found, shard.rows, strict=True)
            )
        except UNREADABLE:
            return False

    def write(self, shard: Shard, on_row: Callable[[], None]) -> None:
        """on_row: called after each.

        Raises:
            OSError: nothing of it is left behind.
            DataError: a sample is no longer what was looked at.
        """
        with written_aside(self.folder / shard.name) as aside, pyarrow.OSFile(str(aside), "wb") as file:
            writer = parquet.ParquetWriter(file, self.schema, **self._storage())
            try:
                for group in self._groups(shard, on_row):
                    writer.write_table(pyarrow.Table.from_pylist(group, self.schema), row_group_size=len(group))
                writer.close()
            finally:
                writer.is_open = False  # or it would try to end the file once more, when that is gone

    def _storage(self) -> dict:
        """Pictures are compressed already. A picture that rows of a group share is stored once, in a dictionary."""
        texts = [name for name in self.schema.names if name != PICTURES]
        pictures = [f"{PICTURES}.list.element"] if PICTURES in self.schema.names else []
        return {
            "compression": {leaf: "none" if leaf in pictures else "zstd" for leaf in texts + pictures},
            "use_dictionary": texts + pictures,
            "dictionary_pagesize_limit": GROUP_IN_MEMORY,
            "write_statistics": texts,  # of pictures the footer would hold two of each group
            "write_page_checksum": True,
        }

    def _groups(self, shard: Shard, on_row: Callable[[], None]) -> Iterator[list[dict]]:
        """Rows of one row group each."""
        group, stored, in_memory, unit = [], 0, 0, None
        for place in shard.rows.tolist():
            text, pictures = self.survey.sizes[place].tolist()
            new = text + (pictures if self.survey.units[place] != unit else 0)
            is_full = len(group) >= GROUP_ROWS or stored + new > GROUP_BYTES
            if group and (is_full or in_memory + text + pictures > GROUP_IN_MEMORY):
                yield group
                group, stored, in_memory, new = [], 0, 0, text + pictures
            group.append(self._row(place))
            stored, in_memory, unit = stored + new, in_memory + text + pictures, self.survey.units[place]
            on_row()
        yield group

    def _row(self, place: int) -> dict:
        """Raises DataError where the sample is no longer what was looked at."""
        number = int(self.survey.numbers[place])
        try:
            sample = self.samples[number]
            pictures = [picture.read_bytes() if isinstance(picture, Path) else picture for picture in sample.pictures]
            digest = digest_of(text_of(sample), [hashlib.sha256(picture).digest() for picture in pictures])
        except (BadSample, FileNotFoundError):
            digest = None
        if digest != self.survey.digests[place].tobytes():
            where = self.samples.where(number)
            raise DataError(f"{where} has changed since it was looked at: start again with --replace when it is whole")
        return self.columns.row(sample, pictures)


def _digests(table: pyarrow.Table) -> Iterator[bytes]:
    for row in table.to_pylist():
        text = row[CONVERSATIONS] if row.get(TEXT) is None else row[TEXT]
        yield digest_of(text, [hashlib.sha256(picture).digest() for picture in row.get(PICTURES) or ()])
