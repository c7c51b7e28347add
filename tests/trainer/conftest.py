"""A stage at tiny sizes."""

import pytest

from helpers.runs import tiny
from trainer.config import StageConfig
from trainer.train_sft_vlm import SFT_VLM


@pytest.fixture
def config(data_folder, tower_folder) -> StageConfig:
    """The last stage at tiny sizes; the first bad sample stops it."""
    return tiny(SFT_VLM, data_folder, tower_folder, strict_data=1)
