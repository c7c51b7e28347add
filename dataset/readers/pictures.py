"""Where the pictures lie that records name: in a folder, or in an archive that is read in place."""

import os
from pathlib import Path
from typing import Protocol

from dataset.options import ReadOptions
from dataset.readers.archives import Archive
from dataset.samples import BadSample, DataError, shown
from model.messages import did_you_mean
from model.pictures import NO_FILE, UnreadableFile

ARCHIVES = (".zip", ".tar")


class Pictures(Protocol):
    """What a reader asks for the pictures that its records name."""

    def find(self, where: str, name: str) -> Path | bytes:
        """The picture, or where it lies. Raises BadSample."""

    def identity(self) -> list:
        """What tells these pictures from others, as far as the data file does not: see TokenCache."""


def pictures_of(path: Path, options: ReadOptions) -> Pictures:
    """The pictures of a data file: those of --images_path, by default the folder `images` beside it."""
    place = Path(options.images_path) if options.images_path else path.parent / "images"
    if place.suffix.lower() in ARCHIVES and not place.is_dir():
        if not place.is_file():
            raise DataError(f"--images_path {place} does not exist{did_you_mean(place)}")
        return Archive(place)
    if place.is_file():
        raise DataError(
            f"--images_path {place} is no folder, no .zip and no uncompressed .tar: unpack it, or make it one of these"
        )
    return PictureFolder(place, options.follow_links)


class PictureFolder:
    """A folder that pictures may not lie outside of."""

    def __init__(self, folder: Path, follow_links: bool = False):
        self.folder, self.follow_links = folder.resolve(), follow_links

    def identity(self) -> list:
        return [str(self.folder), self.follow_links]  # the check keeps the pictures' sizes and times of change

    def find(self, where: str, name: str) -> Path:
        """Where a picture lies, found without opening it: a regular file inside the folder, whatever links lead to.

        With follow_links the name must lie inside, and links there may lead anywhere.

        The path is the one that was named, so that a link that leads elsewhere tomorrow shows in the file's facts.
        """
        if "://" in name:
            raise BadSample(where, f"picture {shown(name)} is an address: download it, and give its file's name")
        try:
            named = self.folder / name
            path = named.resolve()
            exists = path.exists()
        except (OSError, ValueError, RuntimeError) as error:  # too long, NUL, half a surrogate pair, a loop of links
            if isinstance(error, OSError) and error.errno not in NO_FILE:
                raise BadSample(where, f"picture {shown(name)}: {UnreadableFile(error)}") from error
            raise BadSample(where, f"no file can be called {name[:80]!r} ({str(error)[:80]})") from error
        is_inside = not os.path.isabs(name) and ".." not in Path(name).parts
        if not (is_inside if self.follow_links else path.is_relative_to(self.folder)):
            cure = "use names inside --images_path"
            if is_inside:
                cure += ", or --follow_links 1 where links may lead out of it"
            raise BadSample(where, f"picture {name[:80]!r} lies outside {self.folder}: {cure}")
        if exists and not path.is_file():
            raise BadSample(where, f"picture {name[:80]!r} is no regular file")
        return named
