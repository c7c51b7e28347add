"""Pictures in a .zip or .tar, read where they lie: nothing is ever unpacked, and each process reads for itself."""

import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from dataset.samples import BadSample, DataError, shown
from model.messages import plain

MAX_MEMBER = 64 * 1024 * 1024  # bytes of a picture; what is larger is never read into memory
STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
LOCAL_HEADER, LOCAL_MARK = 30, b"PK\x03\x04"  # of a zip's member: bytes before its name, and the first of them
ENCRYPTED = 1  # flag of a zip's member


class Member(NamedTuple):
    """Where a file lies in an archive."""

    offset: int  # bytes; of a zip's local header, of a tar's content
    stored: int  # bytes in the archive
    size: int  # bytes unpacked
    method: int  # STORED or DEFLATED
    crc: int = -1  # of the content; -1: not known


class Archive:
    """A .zip or an uncompressed .tar; see dataset.readers.pictures.Pictures."""

    def __init__(self, path: Path):
        """Raises DataError where it cannot be read in place."""
        self.path, self.facts = path, file_state(path)
        self.numbers: dict[str, int] = {}  # of the members that may be read, by name
        self.refused: dict[str, str] = {}  # name: reason
        places = []
        for name, member, reason in zip_members(path) if _is_zip(path) else tar_members(path):
            reason = reason or why_not(name, member)
            if name in self.numbers or name in self.refused:
                reason = "two members have this name"
                self.numbers.pop(name, None)
            if reason:
                self.refused[name] = reason
            else:
                self.numbers[name] = len(places)
                places.append(member)
        self.places = np.array(places, np.int64).reshape(-1, len(Member._fields))
        self._last: tuple[str, bytes] = ("", b"")  # questions about one picture stand together

    def identity(self) -> list:
        return [str(self.path), *self.facts]

    def find(self, where: str, name: str) -> bytes:
        """The content of a picture. Raises BadSample."""
        plain_name = _name(name)
        if plain_name != self._last[0]:
            if plain_name not in self.numbers:
                raise BadSample(where, f"picture {shown(name)} {self._why_absent(plain_name)}")
            if file_state(self.path) != self.facts:
                raise DataError(f"{self.path} has changed since it was opened: start again when it is whole")
            try:
                content = read_member(self.path, Member(*self.places[self.numbers[plain_name]].tolist()))
            except (OSError, ValueError, zlib.error) as error:
                raise BadSample(where, f"picture {shown(name)} in {self.path} cannot be read ({error})") from error
            self._last = plain_name, content
        return self._last[1]

    def _why_absent(self, name: str) -> str:
        if reason := self.refused.get(name):
            return f"in {self.path} cannot be used: {reason}"
        base = PurePosixPath(name).name
        alike = next((other for other in self.numbers if PurePosixPath(other).name == base), None)
        return f"is not in {self.path}" + (f"; it has {plain(alike)}" if alike else ": check --images_path")


def why_not(name: str, member: Member) -> str:
    """Why nothing of this name and size is read from an archive; empty where it is."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return "its name leads out of the archive"
    if member.size > MAX_MEMBER:
        return f"it has {member.size:,} bytes, more than {MAX_MEMBER:,}"
    return ""


def tar_members(path: Path) -> Iterator[tuple[str, Member, str]]:
    """(name, place, reason to refuse) of everything in a tar but its folders. Raises DataError."""
    try:
        with tarfile.open(path, "r:") as tar:
            while info := tar.next():
                tar.members.clear()  # which would grow by a kilobyte a member
                if not info.isdir():
                    regular = info.isreg() and not info.issparse()
                    reason = "" if regular else "it is no regular file, but a link, a device or full of holes"
                    yield _name(info.name), Member(info.offset_data, info.size, info.size, STORED), reason
            with path.open("rb") as file:
                file.seek(tar.offset)
                if any(file.read(tarfile.BLOCKSIZE)):  # tarfile takes what it does not understand for the end
                    raise tarfile.ReadError(f"no header at byte {tar.offset}")
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        packed = "; one that is compressed (.tar.gz) cannot be read in any order: gunzip it"
        raise DataError(f"{path}: cannot be read as a tar ({plain(str(error)[:120])}){packed}") from error


def zip_members(path: Path) -> Iterator[tuple[str, Member, str]]:
    """(name, place, reason to refuse) of everything in a zip but its folders. Raises DataError."""
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                member = Member(info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC)
                reason = "it is encrypted" if info.flag_bits & ENCRYPTED else ""
                if info.compress_type not in (STORED, DEFLATED):
                    reason = f"its compression, number {info.compress_type}, is none of a zip's two common ones"
                if info.external_attr >> 28 == 0o12:  # Unix's mark of a link
                    reason = "it is a link"
                if not info.is_dir():
                    yield _name(info.filename), member, reason
    except (zipfile.BadZipFile, OSError, ValueError, UnicodeDecodeError, NotImplementedError) as error:
        reason = f"cannot be read as a zip ({plain(str(error)[:120])}): download it again"
        raise DataError(f"{path}: {reason}") from error


def read_member(path: Path, member: Member) -> bytes:
    """The content of a member, never more than its stated size. Raises OSError, ValueError, zlib.error."""
    with path.open("rb") as file:  # each time: processes that share an open file share its position
        file.seek(member.offset)
        if member.crc >= 0:
            header = file.read(LOCAL_HEADER)
            if header[:4] != LOCAL_MARK:
                raise ValueError("no member begins where it should")
            file.seek(sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28)), os.SEEK_CUR)
        content = file.read(min(member.stored, 2 * MAX_MEMBER))
    if member.method == DEFLATED:
        content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, member.size + 1)
    if len(content) != member.size:
        raise ValueError(f"it has {len(content):,} bytes or more instead of {member.size:,}")
    if member.crc >= 0 and zlib.crc32(content) != member.crc:
        raise ValueError("it differs from its checksum")
    return content


def _name(name: str) -> str:
    """Without a leading `./`; what is not Unicode as Python holds it."""
    return PurePosixPath(name).as_posix()


def _is_zip(path: Path) -> bool:
    return path.suffix.lower() == ".zip"


def file_state(path: Path) -> tuple[int, int]:
    """Size and time of change, which tell whether an archive is still what was opened."""
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns
