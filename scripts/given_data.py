"""The file that a command was given with --data: opened or refused in that command's words, and what is left out."""

from collections.abc import Sequence
from pathlib import Path

from dataset.formats import Sample, read_samples
from dataset.limits import PictureLimits
from model.messages import UserError, counted, did_you_mean

SHOWN = 3  # reasons that a line names


def open_data(
    path: str | Path, images_path: str | Path | None = None, limits: PictureLimits | None = None
) -> Sequence[Sample]:
    """The samples of --data, with the folder of --images_path. Raises UserError where there are none."""
    if Path(path).suffix and not Path(path).exists():
        raise UserError(f"{path} does not exist{did_you_mean(path) or ': check --data'}")
    if images_path and not Path(images_path).is_dir():
        raise UserError(f"--images_path {images_path} is no folder{did_you_mean(images_path)}")
    return read_samples(path, images_path, limits=limits)


def left_out(reasons: Sequence[object], count: int, things: str) -> str:
    """One line about what could not be used, of so many. Raises UserError where that is all of them."""
    first = "; ".join(map(str, reasons[:SHOWN])) + ("; ..." if len(reasons) > SHOWN else "")
    if len(reasons) == count:
        raise UserError(first if count == 1 else f"none of {counted(count, things)} can be used: {first}")
    return f"left out {len(reasons):,} of {counted(count, things)}: {first}"
