"""Stand-ins for packages that a harness imports and that nothing asked of it here uses.

VLMEvalKit imports, with its first module, what every one of its data sets and models needs: dozens of packages, some of
them gigabytes. What is not installed is a stand-in while it imports, and whoever calls one later is told its name.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class StandIn:
    """Something of a package that is not there: may be called, inherited from or decorated with while importing."""

    def __init__(self, name: str):
        self.__name__ = name

    def __call__(self, *arguments: object, **named: object) -> object:
        if not _importing:
            raise ImportError(f"{self.__name__.split('.')[0]} is not installed, and this harness calls it here")
        return arguments[0] if len(arguments) == 1 and callable(arguments[0]) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(f"{self.__name__}.{name}")

    def __mro_entries__(self, bases: tuple) -> tuple:
        return ()  # a class of which it is a base has one base less

    def __getitem__(self, key: object) -> "StandIn":
        return self  # of an annotation

    def __or__(self, other: object) -> "StandIn":
        return self

    __ror__ = __or__

    def __iter__(self) -> Iterator:
        return iter(())


class StandInModule(ModuleType):
    __path__: list = []

    def __getattr__(self, name: str) -> StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(f"{self.__name__}.{name}")


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Asked last. harness: whose imports are stood in for; everybody else's fail as ever."""

    def __init__(self, harness: str):
        self.harness = harness

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        parent = sys.modules.get(name.rpartition(".")[0])
        if isinstance(parent, StandInModule) or not parent and self._asked_by_harness(name):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def _asked_by_harness(self, name: str) -> bool:
        frame = sys._getframe(2)
        while frame and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        importer = frame.f_globals.get("__name__", "").split(".")[0] if frame else ""
        return importer == self.harness and name.split(".")[0] != self.harness

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> StandInModule:
        return StandInModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


_importing: list[str] = []


@contextmanager
def stand_ins(harness: str) -> Iterator[None]:
    """While this harness is imported; afterwards nobody finds them any more."""
    finder = Finder(harness)
    sys.meta_path.append(finder)
    _importing.append(harness)
    try:
        yield
    finally:
        _importing.remove(harness)
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, StandInModule)]:
            del sys.modules[name]
