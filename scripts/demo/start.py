"""What the browser demo is started with; what is wrong with it is told on the page, as few look at the terminal."""

import argparse
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from model.messages import UserError


class WrongStart(UserError):
    """A flag that is wrong, or a wish for help. The message is the sentence ("" for help), `usage` the flags."""

    def __init__(self, sentence: str, usage: str):
        super().__init__(sentence)
        self.usage = usage


class _Flags(argparse.ArgumentParser):
    """argparse ends the process, which in a page is an empty one; here it raises WrongStart."""

    def error(self, message: str) -> NoReturn:
        raise WrongStart(message, self.format_help())

    def print_help(self, file: object = None) -> NoReturn:
        raise WrongStart("", self.format_help())


def parse_arguments(description: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """arguments: by default what stands after the `--` of the command line. Raises WrongStart."""
    parser = _Flags(prog="streamlit run web_demo.py --", description=description, allow_abbrev=False)
    parser.add_argument("folders", type=Path, nargs="*", help="folders with .safetensors, beside out/")
    parser.add_argument("--vision_model", help="folder of the CLIP tower; by default the one trained with")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        near = get_close_matches(unknown[0].split("=")[0].replace("-", "_"), ["__vision_model", "__device"], 1)
        meant = f"; did you mean --{near[0][2:]}?" if near else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
    return known


def no_folders(folders: Sequence[Path]) -> list[Path]:
    """Those that are none."""
    return [folder for folder in folders if not folder.is_dir()]
