"""A model to ask."""

import pytest

from helpers.models import enliven


@pytest.fixture
def model(make_vlm):
    """A tiny model that makes varied sentences."""
    return enliven(make_vlm())
