"""Models to convert, of every tower and decoder, and what a converted folder answers beside them."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from helpers.models import SIZES, enliven_all
from helpers.repository import ROOT
from model.config import MiniMindConfig, VLMConfig
from model.model_minimind import MiniMindForCausalLM
from model.model_vlm import MiniMindVLM
from model.tokenizer_files import load_tokenizer
from model.weights import decoder_arguments
from scripts.export import proof
from scripts.export.formats import FORMATS, Source
from scripts.export.proof import compare, write_reference

VIT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
       "patch_size": 8}  # fmt: skip
TOWERS = {  # each sees a picture of 32 pixels a side as 16 patches, or 4
    "clip_vision_model": VIT,
    "siglip_vision_model": {**VIT, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2},
    "dinov2": {**VIT, "mlp_ratio": 2, "image_mean": [0.4] * 3, "image_std": [0.2] * 3},
    "dinov2_with_registers": {**VIT, "mlp_ratio": 2, "num_register_tokens": 2},
    "efficientnet_lite": {
        "image_size": 32, "patch_size": 16, "hidden_size": 24, "stem_channels": 4, "head_channels": 16,
        "stages": [[1, 3, 1, 1, 4], [1, 3, 2, 2, 4], [1, 5, 2, 2, 4], [1, 3, 2, 2, 8], [1, 5, 1, 2, 8], [1, 5, 2, 2, 8],
                   [1, 3, 1, 2, 8]],
    },
}  # fmt: skip
# Runs in a process of its own, where nothing of this project can be imported but what lies in the folders.
PROVE_ALL = """
import json, sys
from pathlib import Path
from scripts.export import proof
from scripts.export.proof import compare
for package in ("model", "scripts", "dataset", "trainer"):
    sys.modules[package] = None
found = {name: compare(Path(name), Path(reference), None) for name, reference in json.loads(sys.argv[1]).items()}
print(json.dumps(found))
"""


def make_seeing(tower: str = "clip_vision_model", seed: int = 3, **changes) -> MiniMindVLM:
    """A model around a random tower that came from nowhere, whose logits and answers vary as a trained one's do."""
    torch.manual_seed(seed)
    vision = {"model_type": tower, **TOWERS[tower]}
    model = enliven_all(MiniMindVLM(VLMConfig(vision_config=vision, **{**SIZES, **changes})), seed)
    with torch.no_grad():
        for parameter in model.vision_encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def bare_decoder(model: MiniMindForCausalLM) -> MiniMindForCausalLM:
    """The decoder of a model that may see, with the same tensors."""
    decoder = MiniMindForCausalLM(MiniMindConfig(**decoder_arguments(model.config.to_dict())))
    decoder.model, decoder.lm_head = model.model, model.lm_head
    return decoder.eval()


def export(model, format_name: str, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, **settings) -> Path:
    """An exported folder of a model in memory, without a weight file, a proof or a swap."""
    folder.mkdir()
    FORMATS[format_name](Source(model, tokenizer or load_tokenizer(), "tiny", **settings), folder)
    return folder


def refer(model, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """What the project's own model answers, in a folder as the proof wants it."""
    folder.mkdir(exist_ok=True)
    write_reference(model, tokenizer or load_tokenizer(), folder, isinstance(model, MiniMindVLM))
    assert load_file(folder / "logits.safetensors")["0"].std() > 0.3  # logits near zero would be equal to anything
    return folder


def differences(model, folder: Path, reference: Path, tower: str | None = None, tokenizer=None) -> dict:
    """What the proof finds, in this process."""
    return compare(folder, refer(model, reference, tokenizer), tower)


def fresh_differences(references: Mapping[Path, Path], modules: Path) -> dict[str, dict]:
    """What the proof finds of several folders, in one fresh process for all, without this project.

    references: by converted folder; modules: where transformers may put the folders' code.
    """
    environment = {**os.environ, "HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    named = json.dumps({str(folder): str(reference) for folder, reference in references.items()})
    command = [sys.executable, "-c", PROVE_ALL, named]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=modules)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


def prove_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof's process in this one: starting one costs seconds."""

    def run(command, **_):
        (folder, reference), further = map(Path, command[2:4]), command[4:]
        trains = "--no_training" not in further
        tower = next((word for word in further if not word.startswith("--")), None)
        (reference / "result.json").write_text(json.dumps(compare(folder, reference, tower, trains)))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(proof.subprocess, "run", run)
