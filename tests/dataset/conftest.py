"""A folder with pictures."""

from pathlib import Path

import pytest

from helpers.data import make_picture


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with images/a.png, b.png and c.png and one picture outside of images/."""
    (tmp_path / "images").mkdir()
    for number, name in enumerate(("a", "b", "c")):
        make_picture(number).save(tmp_path / "images" / f"{name}.png")
    make_picture(9).save(tmp_path / "outside.png")
    return tmp_path
