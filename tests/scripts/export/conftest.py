"""A converted folder."""

import pytest
import torch

from helpers.models import SIZES
from model.tokenizer_files import load_tokenizer
from model.weights import build_vlm
from scripts.export.formats import Source, export_transformers


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tower_folder):
    """A tiny model, converted into a folder that transformers reads."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("converted")
    export_transformers(Source(build_vlm(SIZES, tower_folder).eval(), load_tokenizer(), "tiny"), folder)
    return folder
