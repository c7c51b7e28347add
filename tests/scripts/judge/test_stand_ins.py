"""What a harness imports and is not installed stands in while it imports, and for nobody else."""

import importlib
import sys

import pytest

from scripts.judge.stand_ins import stand_ins

HARNESS = """
import nowhere_at_all.deep.inside as deep
from nowhere_at_all import Thing, decorate, Base

NUMBERS = [number for number in Thing.numbers()]
HINT = Thing[int] | None

class Mine(Base):
    value = 3

@decorate
def add(a: Thing, b):
    return a + b

@decorate(retries=3)
def later():
    return deep.function()
"""


@pytest.fixture
def harness(tmp_path, monkeypatch):
    (tmp_path / "a_harness.py").write_text(HARNESS)
    (tmp_path / "another.py").write_text("import nowhere_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("a_harness", "another"):
        sys.modules.pop(name, None)


def test_a_harness_imports_without_its_packages(harness):
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("a_harness")
    with stand_ins("a_harness"):
        module = importlib.import_module("a_harness")
        with pytest.raises(ModuleNotFoundError, match="nowhere_again"):
            import nowhere_again  # noqa: F401  not asked by the harness
    assert module.add(1, 2) == 3 and module.Mine().value == 3 and module.NUMBERS == []
    with pytest.raises(ImportError, match="nowhere_at_all is not installed"):
        module.deep.function()


def test_nobody_finds_them_afterwards(harness):
    finders = list(sys.meta_path)
    with stand_ins("a_harness"):
        importlib.import_module("a_harness")
    assert "nowhere_at_all" not in sys.modules and sys.meta_path == finders
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("another")
