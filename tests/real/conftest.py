"""SmolLM2-135M-Instruct as its package brings it, read by us and by transformers, each once."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from model.model_minimind import MiniMindForCausalLM
from model.weights import load_model
from scripts.hub.packages import PACKAGED, SMOLLM2_FILE, installed_at


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return installed_at(PACKAGED["smollm2"].module) / SMOLLM2_FILE


@pytest.fixture(scope="session")
def theirs(smollm2) -> PreTrainedModel:
    """transformers' own LlamaForCausalLM, float32."""
    return AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32, local_files_only=True
    ).eval()


@pytest.fixture(scope="session")
def their_tokenizer(smollm2) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name, local_files_only=True)


@pytest.fixture(scope="session")
def ours(smollm2) -> MiniMindForCausalLM:
    return load_model(smollm2)


@pytest.fixture(scope="session")
def base_folder(theirs, their_tokenizer, tmp_path_factory) -> Path:
    """The same base as a folder, as a hub has it."""
    folder = tmp_path_factory.mktemp("smollm2")
    config = copy.deepcopy(theirs.config)
    del config.quantization_config  # or transformers would not save what it has read
    saved = LlamaForCausalLM(config)
    saved.load_state_dict(theirs.state_dict())
    saved.save_pretrained(folder)
    their_tokenizer.save_pretrained(folder)
    return folder
