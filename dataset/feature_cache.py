"""What a frozen tower makes of every picture, or its pixels at the tower's size, computed once, in mapped files.

One folder a cache, named by a hash of the tower (none where pixels are kept), the pixels' size, the number format and
the pictures' content: anything that changes makes another cache. Ranks fill it together, a killed run's part of it is
kept, workers share its pages. That a later start need not read every picture, the folder keeps their sha256 under a
hash of their paths, sizes and times of change.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from dataset.check import CheckedData, stamp_of
from dataset.samples import BadSample, DataError, Sample
from dataset.vlm_dataset import ConversationDataset
from model.config import BICUBIC
from model.messages import counted
from model.progress import progress_over
from model.views import FRAMES

PIXELS = "pixels"
FORMATS = {"float16": np.float16, "int8": np.int8, PIXELS: np.uint8}
CHUNK = 32  # pictures encoded together
MEASURED = 128  # pictures that give int8 its scale a channel: CLIP has channels far larger than the others
FULLEST = 0.95  # of the free disk space
DIGEST = 32  # bytes of a sha256
DONE, DAMAGED = 1, 2  # of a picture, in the file `done`; a damaged one is grey, and tried again at the next start


class FeatureCache:
    """[views, tokens, width], or [views, 3, height, width] of PIXELS, on disk.

    checked: whose shown pictures have their places here, in the order of their numbers: one for each of their views.
    """

    def __init__(self, folder: Path, kind: str, shape: tuple[int, ...], checked: CheckedData):
        self.folder, self.kind, self.shape, self.checked = folder, kind, shape, checked
        folder.mkdir(parents=True, exist_ok=True)
        for name, size in (("patches", self.bytes_needed(kind, shape)), ("done", shape[0])):
            with (folder / name).open("ab") as file:  # no rank truncates what another has begun
                if file.tell() < size:
                    file.truncate(size)
        self.scales = np.load(folder / "scales.npy") if (folder / "scales.npy").is_file() else None

    @staticmethod
    def bytes_needed(kind: str, shape: tuple[int, ...]) -> int:
        return int(np.prod(shape)) * np.dtype(FORMATS[kind]).itemsize

    @cached_property
    def maps(self) -> tuple[np.memmap, np.memmap]:
        """The values, and for each view whether they are there."""
        patches = np.memmap(self.folder / "patches", FORMATS[self.kind], "r+", shape=self.shape)
        return patches, np.memmap(self.folder / "done", np.uint8, "r+", shape=self.shape[:1])

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """See places_of; mapped files have no room for what a process can count again."""
        return places_of(self.checked)

    def __getstate__(self) -> dict:
        """Each worker maps the files itself."""
        return {name: value for name, value in vars(self).items() if name not in ("maps", "_places")}

    def of_row(self, row: int) -> list[torch.Tensor]:
        """float16 [tokens, width], or uint8 [3, height, width], of each view of a row's pictures."""
        stored = [torch.from_numpy(np.array(self.maps[0][number])) for number in self.numbers_of(row)]
        return stored if self.scales is None else [patches * torch.from_numpy(self.scales) for patches in stored]

    def is_damaged(self, row: int) -> bool:
        return any(self.maps[1][number] == DAMAGED for number in self.numbers_of(row))

    def numbers_of(self, row: int) -> np.ndarray:
        """The places of the views of a row's pictures."""
        numbers, starts = self._places
        return views_of(np.searchsorted(numbers, self.checked.shown_in(row)), starts)

    def check_whole(self) -> None:
        """Once all ranks have stored their parts. Raises DataError where some of them wrote to another disk."""
        if missing := int((self.maps[1] == 0).sum()):
            raise DataError(
                f"{missing:,} of {len(self.maps[1]):,} views have no features in {self.folder} although every rank "
                "has stored its share: give a --save_dir on a disk that all machines share"
            )

    def set_scales(self, patches: torch.Tensor) -> None:
        """patches [some views, tokens, width] that show how large each channel gets; every rank finds the same."""
        if self.kind == "int8" and self.scales is None:
            self.scales = (patches.abs().amax((0, 1)).clamp(min=1e-5) / 127).half().numpy()
            temporary = self.folder / f"scales.{id(self)}.tmp.npy"
            np.save(temporary, self.scales)
            temporary.replace(self.folder / "scales.npy")

    def store(self, numbers: Sequence[int], patches: torch.Tensor, marks: Sequence[int]) -> None:
        """Marked as done, or damaged, only when the values are on the disk."""
        stored, done = self.maps
        if self.scales is not None:
            patches = (patches / torch.from_numpy(self.scales).float()).round().clamp(-127, 127)
        stored[numbers] = patches.numpy().astype(stored.dtype)
        stored.flush()
        done[numbers] = marks


def places_of(checked: CheckedData) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the pictures that rows show, each once, and where the views of each begin [pictures + 1]."""
    numbers = np.unique(checked.shown)
    return numbers, np.append(0, checked.views[numbers].cumsum(dtype=np.int64))


def views_of(pictures: Sequence[int], starts: np.ndarray) -> np.ndarray:
    """int64, the places of all views of these pictures. starts: as places_of gives them."""
    ranges = [np.arange(starts[picture], starts[picture + 1]) for picture in pictures]
    return np.concatenate([np.zeros(0, np.int64), *ranges])


def cache_features(
    data: ConversationDataset,
    encode: Callable[[torch.Tensor], torch.Tensor],
    tower: str,
    kind: str,
    folder: Path,
    rank: int = 0,
    world_size: int = 1,
    say: Callable = print,
) -> None:
    """Give the data set its pictures' embeddings, or pixels, from files; this rank adds its part of what is missing.

    encode: uint8 [pictures, 3, height, width] -> [pictures, tokens, width]; tower: what identifies it; kind: of
    FORMATS, PIXELS has no use for the two. All ranks call and then wait for each other.

    Raises:
        DataError: the disk is too small, with what is needed and what is free.
    """
    if not len(data.checked.shown):
        return
    if kind == PIXELS:
        encode, tower = torch.as_tensor, PIXELS  # they are kept as they are
    pictures = Pictures(data, folder)
    sources, hashes = pictures.sources, pictures.hashes
    shape = (int(pictures.starts[-1]), *encode(pictures.pixels([0])[0][:1]).shape[1:])
    facts = [tower, data.processor.image_size, kind, hashes]
    if data.processor.resample != BICUBIC:
        facts.append(data.processor.resample)
    if shape[0] != len(sources):
        facts.append({"tiles": data.processor.sight.tiles})
    if data.processor.sight.frames != FRAMES:
        facts.append({"frames": data.processor.sight.frames})
    folder = folder / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]
    needed, free = FeatureCache.bytes_needed(kind, shape), shutil.disk_usage(_existing(folder)).free
    cut = f", cut into {shape[0]:,} views" if shape[0] != len(sources) else ""
    what, smaller = ("pixels", "") if kind == PIXELS else ("features", ", choose int8")
    if not (folder / "patches").is_file() and needed > FULLEST * free:
        raise DataError(
            f"--cache_features {kind} needs {needed / 1e9:.2f} GB in {folder.parent} for {len(sources):,} pictures and "
            f"{free / 1e9:.2f} GB are free: make room{smaller}, or --cache_features none"
        )
    say(f"{what} of {counted(len(sources), 'pictures')}{cut}: {needed / 1e9:.2f} GB of {kind} in {folder}")
    cache = FeatureCache(folder, kind, shape, data.checked)
    pictures.keep_hashes(folder)
    if kind == "int8" and cache.scales is None:
        chunks = _chunks(range(min(MEASURED, len(sources))))
        cache.set_scales(torch.cat([_in_parts(encode, pictures.pixels(chunk)[0]) for chunk in chunks]))
    done = np.logical_and.reduceat(cache.maps[1] == DONE, pictures.starts[:-1])
    missing = [n for n in range(rank, len(sources), world_size) if not done[n]]
    for chunk in progress_over(_chunks(missing), "encoding", f"x{CHUNK}", silent=rank != 0):
        pixels, marks = pictures.pixels(chunk)
        cache.store(pictures.places(chunk), _in_parts(encode, pixels), marks)
    data.features = cache


def _in_parts(encode: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """[views, ...], CHUNK of them at once: the pictures of a chunk may have many more."""
    return torch.cat([encode(part).cpu() for part in pixels.split(CHUNK)])


def _chunks(numbers: Sequence[int]) -> list[Sequence[int]]:
    return [numbers[start : start + CHUNK] for start in range(0, len(numbers), CHUNK)]


class Pictures:
    """The distinct pictures that a data set shows, by their place in a cache, each with the sha256 of its bytes."""

    def __init__(self, data: ConversationDataset, folder: Path):
        """folder: of the caches. Raises DataError where a picture has changed since it was checked."""
        self.data, self.checked = data, data.checked
        self.sources = np.unique(data.checked.shown, return_index=True)[1]  # places in `shown`
        self.numbers, self.starts = places_of(data.checked)
        names = [self.checked.name(number) for number in self.numbers]
        stamps = self.checked.stamps[self.numbers]
        key = hashlib.sha256(json.dumps([names, stamps.tolist()]).encode()).hexdigest()[:20]
        self.file = f"{key}.hashes"
        self.hashes = self._kept(folder) or [self._hash(place) for place in range(len(names))]

    def _kept(self, folder: Path) -> list[str] | None:
        """What keep_hashes left in any cache there."""
        for path in sorted(folder.glob(f"*/{self.file}")):
            raw, size = path.read_bytes(), DIGEST * len(self.numbers)
            if len(raw) == size + DIGEST and hashlib.sha256(raw[:size]).digest() == raw[size:]:
                return [raw[start : start + DIGEST].hex() for start in range(0, size, DIGEST)]
        return None

    def keep_hashes(self, folder: Path) -> None:
        """For later starts, unless a picture could not be read."""
        if all(self.hashes) and not (folder / self.file).is_file():
            content = bytes.fromhex("".join(self.hashes))
            temporary = folder / f"{self.file}.{os.getpid()}.{id(self)}.tmp"
            temporary.write_bytes(content + hashlib.sha256(content).digest())
            temporary.replace(folder / self.file)

    def _hash(self, place: int) -> str:
        """Empty where the file cannot be read."""
        number = int(self.numbers[place])
        name = self.checked.name(number)
        if self.checked.is_embedded(number):
            return name
        try:
            with open(name, "rb") as file:
                if stamp_of(file.fileno()) != tuple(self.checked.stamps[number].tolist()):
                    raise self._changed(place)
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return ""

    def _changed(self, place: int) -> DataError:
        where = self.data.where(self._row(place))
        name = self.checked.name(self.numbers[place])
        return DataError(f"{where}: picture {name} has changed since it was checked: start again")

    def _row(self, place: int) -> int:
        return int(np.searchsorted(self.checked.starts, self.sources[place], "right")) - 1

    def places(self, numbers: Sequence[int]) -> np.ndarray:
        """In the cache, of all views of these pictures."""
        return views_of(numbers, self.starts)

    def pixels(self, places: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        """The views of pictures [n, 3, height, width], and whether each could be decoded.

        Raises:
            DataError: one is not what its hash says.
        """
        pixels, marks = [], []
        for place in places:
            row, views = self._row(place), int(self.starts[place + 1] - self.starts[place])
            sample = self.data.pictured(row)
            try:
                pixels += self._open(sample, int(self.sources[place] - self.checked.starts[row]), place)
                marks += [DONE] * views
            except (BadSample, OSError):
                pixels += [self.data.grey()] * views
                marks += [DAMAGED] * views
        return torch.stack(pixels), marks

    def _open(self, sample: Sample, number: int, place: int) -> list[torch.Tensor]:
        source = sample.pictures[number]
        if not self.hashes[place]:
            raise BadSample(sample.where, f"{source} could not be read")
        content = source.read_bytes() if isinstance(source, Path) else source
        if hashlib.sha256(content).hexdigest() != self.hashes[place]:
            raise self._changed(place)
        return replace(sample, pictures=(content,)).open_views(0, self.data.processor)


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())
