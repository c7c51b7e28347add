"""The commands of a page: what a reader would copy, held to the scripts that are there without running any."""

import os
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from helpers.repository import ROOT
from model.command_line import CommandLine


def commands_of(page: Path) -> list[list[str]]:
    """Every line of the page's shell blocks in words: continued ones joined, without comments and variables before."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                found.append(words)
    return found


class Parsed(Exception):
    """A script has read its flags, and would now begin."""


def parse(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """Let the script of `python SCRIPT FLAGS` read these flags, and stop it there. Raises AssertionError."""
    script = ROOT / words[1]
    assert script.is_file(), f"{shlex.join(words)}: there is no {words[1]}"
    original = CommandLine.parse_args

    def read_and_stop(self: CommandLine, *arguments: object, **options: object) -> None:
        original(self, *arguments, **options)
        raise Parsed

    with patch.context() as inner:
        inner.setattr(CommandLine, "parse_args", read_and_stop)
        inner.setattr(sys, "argv", [str(script), *words[2:]])
        inner.setattr(os, "environ", dict(os.environ))
        with pytest.raises(Parsed):
            runpy.run_path(str(script), run_name="__main__")
