"""What pictures a data file may bring: the flags of whatever reads one, safe by default."""

import argparse
from dataclasses import dataclass

from model.messages import UserError
from model.processing import MAX_PIXELS

MEGA = 1_000_000
MOST_MEGAPIXELS = 89  # Pillow takes more for an attack, whatever is asked of it
FOLLOW_LINKS = "1: pictures may be links that lead out of the folder of a .jsonl's pictures, as in the hub's cache"
MAX_MEGAPIXELS = f"pictures of more are refused by their header; at most {MOST_MEGAPIXELS}"


@dataclass(frozen=True)
class PictureLimits:
    """max_megapixels: of a picture; follow_links: names stay inside the folder, links there may lead anywhere."""

    follow_links: bool = False
    max_megapixels: int = MAX_PIXELS // MEGA

    def __post_init__(self) -> None:
        if not 1 <= self.max_megapixels <= MOST_MEGAPIXELS:
            raise UserError(f"--max_megapixels {self.max_megapixels} must lie within 1 and {MOST_MEGAPIXELS}")

    @property
    def max_pixels(self) -> int:
        return self.max_megapixels * MEGA


def add_limits(parser: argparse.ArgumentParser) -> None:
    """The flags that limits_of reads."""
    parser.add_argument("--follow_links", type=int, choices=(0, 1), default=0, help=FOLLOW_LINKS)
    parser.add_argument("--max_megapixels", type=int, default=MAX_PIXELS // MEGA, help=MAX_MEGAPIXELS)


def limits_of(options: argparse.Namespace) -> PictureLimits:
    return PictureLimits(bool(options.follow_links), options.max_megapixels)
