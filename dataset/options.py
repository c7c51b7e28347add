"""How data is to be read: the flags of whatever reads any, safe by default."""

import argparse
from dataclasses import dataclass

from model.messages import UserError
from model.pictures import MAX_PIXELS

MEGA = 1_000_000
MOST_MEGAPIXELS = 89  # Pillow takes more for an attack, whatever is asked of it
AUTO = "auto"
FORMATS = ("minimind", "llava", "messages", "finevision", "choices", "questions", "captions",
           "text")  # fmt: skip  # see dataset.formats
DATA_FORMAT = f"what a record looks like: auto, which looks at the first ones, or one of {', '.join(FORMATS)}"
IMAGES_PATH = "folder, .zip or .tar of the pictures that the data names; empty: `images` beside it"
MAX_SAMPLES = "read the first so many samples of each source, and no more; 0: all"
MIN_RATING = "leave out turns that FineVision rates lower, of 1 to 5, in any of its four ratings; 0: none"
FOLLOW_LINKS = "1: pictures may be links that lead out of the folder of pictures, as in the hub's cache"
MAX_MEGAPIXELS = f"pictures of more are refused by their header; at most {MOST_MEGAPIXELS}"


@dataclass(frozen=True)
class ReadOptions:
    """The meaning of each field is its flag's: the constants above."""

    images_path: str = ""
    data_format: str = AUTO
    max_samples: int = 0
    min_rating: int = 0
    follow_links: bool = False
    max_megapixels: int = MAX_PIXELS // MEGA

    def __post_init__(self) -> None:
        if self.data_format not in (AUTO, *FORMATS):
            raise UserError(f"--data_format {self.data_format}: choose from {', '.join((AUTO, *FORMATS))}")
        if self.max_samples < 0:
            raise UserError(f"--max_samples {self.max_samples} must not be below 0")
        if not 0 <= self.min_rating <= 5:
            raise UserError(f"--min_rating {self.min_rating} must lie within 0 and 5")
        if not 1 <= self.max_megapixels <= MOST_MEGAPIXELS:
            raise UserError(f"--max_megapixels {self.max_megapixels} must lie within 1 and {MOST_MEGAPIXELS}")

    @property
    def max_pixels(self) -> int:
        return self.max_megapixels * MEGA

    @classmethod
    def from_flags(cls, flags: argparse.Namespace) -> "ReadOptions":
        """flags: as add_read_flags has them parsed."""
        return cls(
            flags.images_path or "", flags.data_format, flags.max_samples, flags.min_rating,
            bool(flags.follow_links), flags.max_megapixels,
        )  # fmt: skip


def add_read_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that ReadOptions.from_flags takes."""
    parser.add_argument("--images_path", default="", help=IMAGES_PATH)
    parser.add_argument("--data_format", choices=(AUTO, *FORMATS), default=AUTO, help=DATA_FORMAT)
    parser.add_argument("--max_samples", type=int, default=0, help=MAX_SAMPLES)
    parser.add_argument("--min_rating", type=int, default=0, help=MIN_RATING)
    parser.add_argument("--follow_links", type=int, choices=(0, 1), default=0, help=FOLLOW_LINKS)
    parser.add_argument("--max_megapixels", type=int, default=MAX_PIXELS // MEGA, help=MAX_MEGAPIXELS)
