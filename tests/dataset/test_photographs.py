"""Photographs that scikit-image brings, and what is said where it is not installed."""

import sys

import pytest

from dataset.photographs import NAMES, photographs


def test_without_scikit_image_there_are_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ImportError, match="skimage"):
        photographs()


def test_they_are_of_the_pictures_size():
    pytest.importorskip("skimage.data", reason="needs scikit-image: pip install .[real]")
    pictures = photographs()
    assert tuple(pictures) == NAMES and len({picture.tobytes() for picture in pictures.values()}) == 4
    for picture in pictures.values():
        assert (picture.mode, picture.size) == ("RGB", (224, 224))
        assert (
            len(set(picture.get_flattened_data() if hasattr(picture, "get_flattened_data") else picture.getdata()))
            > 500
        )
