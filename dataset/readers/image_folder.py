"""A folder of pictures, with a metadata file, a .txt beside each picture, or names that say what it shows."""

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from dataset.options import ReadOptions
from dataset.readers.pictures import PictureFolder, Pictures
from dataset.readers.reader import Reader
from dataset.samples import BadSample, DataError
from model.messages import plain

DATA = (".json", ".jsonl", ".csv")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
BY_CAMERA = re.compile(r"(img|dsc|dscn|dcim|pict?|photo|image|screenshot|p|wa|mvi)?[\W_\d]*", re.IGNORECASE)
NOT_SAID = re.compile(r"[_\-.\s]+")  # what stands for spaces in a name
NUMBERED = re.compile(r"[\s_\-(]*\d+\)?$")
MAX_CAPTION = 1_000_000  # bytes of a .txt


def image_folder(folder: Path, options: ReadOptions, read: Callable[[Path, ReadOptions, Pictures], Reader]) -> Reader:
    """read: of a metadata file. Raises DataError where the folder holds neither that nor pictures."""
    pictures = PictureFolder(folder, options.follow_links)
    for name in METADATA:
        if (folder / name).is_file():
            return read(folder / name, options, pictures)
    return CaptionedPictures(folder, options, pictures)


class CaptionedPictures(Reader):
    """Pictures in the order of their names; where any has a .txt beside it, all captions stand in those."""

    def __init__(self, folder: Path, options: ReadOptions, pictures: PictureFolder):
        super().__init__(folder, options, pictures)
        found, texts = _files(folder, options.follow_links)
        self.names = found[: options.max_samples or None]
        folders = {os.path.dirname(name) for name in found}
        beside = sorted(path.name for path in folder.iterdir() if path.suffix in DATA)
        if beside and "" not in folders:  # the pictures, if any, are a data file's
            raise DataError(f"{folder} holds {', '.join(map(plain, beside))}: name the data file itself")
        if not self.names:
            raise DataError(
                f"{folder}: no picture ({', '.join(ENDINGS)}) and no data file lies in this folder: check the name"
            )
        self.has_texts = bool(texts)
        self.by_folder = not self.has_texts and "" not in folders and len(folders) > 1
        captions = "folders' names" if self.by_folder else "names"
        self.stored_as = f"a folder of pictures, by {'the .txt beside each' if self.has_texts else f'their {captions}'}"

    def __len__(self) -> int:
        return len(self.names)

    def where(self, index: int) -> str:
        return str(self.path / self.names[index])

    def facts(self) -> list:
        digest = hashlib.sha256()
        for index, name in enumerate(self.names):
            digest.update(os.fsencode(name) + b"\0")
            if self.has_texts:
                digest.update(self._text(index) or b"\1")
        return [digest.hexdigest()]

    def record(self, index: int) -> dict:
        name = self.names[index]
        if not self.has_texts:
            return {"file_name": [name], "text": self._named(index)}
        content = self._text(index)
        if content is None:
            beside = Path(name).with_suffix(".txt").name
            raise BadSample(self.where(index), f"no caption stands beside it: write {beside}")
        try:
            return {"file_name": [name], "text": content.decode("utf-8-sig").strip()}
        except UnicodeDecodeError as error:
            raise BadSample(self.where(index), f"its .txt is no UTF-8 ({error}): save it as UTF-8") from error

    def _text(self, index: int) -> bytes | None:
        path = (self.path / self.names[index]).with_suffix(".txt")
        try:
            with path.open("rb") as file:
                return file.read(MAX_CAPTION)
        except OSError:
            return None

    def _named(self, index: int) -> str:
        """What the name of the picture, or of its folder, says."""
        name = Path(self.names[index])
        said = name.parent.name if self.by_folder or BY_CAMERA.fullmatch(name.stem) else NUMBERED.sub("", name.stem)
        said = NOT_SAID.sub(" ", said).strip()
        if not said:
            raise BadSample(
                self.where(index), f"the name {plain(name.name)!r} says nothing: rename it to what it shows, write a "
                ".txt beside it, or a metadata.csv"
            )  # fmt: skip
        return said


def _files(folder: Path, follow_links: bool) -> tuple[list[str], set[str]]:
    """Names of pictures, relative to the folder and sorted, and those of them that a .txt stands beside."""
    pictures, texts = [], set()
    for place, folders, names in os.walk(folder, followlinks=follow_links):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        within = Path(place).relative_to(folder)
        for name in names:
            stem, ending = os.path.splitext(name)
            if ending.lower() in ENDINGS and not name.startswith("."):
                pictures.append((within / name).as_posix())
            elif ending == ".txt":
                texts.add((within / stem).as_posix())
    return sorted(pictures), {name for name in pictures if os.path.splitext(name)[0] in texts}
