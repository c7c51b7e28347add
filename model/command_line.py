"""What every command has in common: flags as people type them."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import NoReturn


class CommandLine(argparse.ArgumentParser):
    """argparse, where `--learning-rate` is `--learning_rate` and a mistake is one line that names the flag meant."""

    def __init__(self, description: str | None = None, **settings: object):
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=description, **settings)

    @property
    def flags(self) -> list[str]:
        """Of all groups."""
        return [name for action in self._actions for name in action.option_strings if name.startswith("--")]

    def parse_args(
        self, arguments: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        typed = [self._as_named(str(part)) for part in (sys.argv[1:] if arguments is None else arguments)]
        flags = [part for part in typed[: typed.index("--") if "--" in typed else None] if part.startswith("--")]
        # Before argparse looks: it would first miss the required flag that was mistyped.
        if unknown := [part for part in flags if " " not in part and not self._is_known(part)]:
            self.error("; ".join(map(self._no_flag, unknown)))
        options, rest = self.parse_known_args(typed, namespace)
        if rest:
            self.error(f"{' '.join(rest)!r} belongs to no flag")
        return options

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.removesuffix('.py')}: {message} (--help lists the flags)\n")

    def _is_known(self, argument: str) -> bool:
        """Also where it is shortened: argparse takes the beginning of a flag for the flag."""
        return any(flag.startswith(argument.partition("=")[0]) for flag in self.flags)

    def _as_named(self, argument: str) -> str:
        """A flag with the underscores that its name has, everything else as it is."""
        name, equals, value = argument.partition("=")
        spelt = f"--{name[2:].replace('-', '_')}"
        return f"{spelt}{equals}{value}" if name[:2] == "--" and len(name) > 2 and self._is_known(spelt) else argument

    def _no_flag(self, argument: str) -> str:
        name = argument.partition("=")[0]
        close = difflib.get_close_matches(name.replace("-", "_"), [flag.replace("-", "_") for flag in self.flags], n=1)
        return f"there is no {name}" + (f": did you mean --{close[0][2:]}?" if close else "")
