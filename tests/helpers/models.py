"""Tiny models and what is asked of them: sizes, weights that show every mistake, losses from slow loops."""

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from model.config import END_ID, IGNORE_INDEX, MiniMindConfig
from model.files import file_sha256
from model.inference.answerer import Answer
from model.model_minimind import MiniMindForCausalLM
from scripts.export.folder import MANIFEST

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
IMAGE_SIZE = 32  # pixels; with patches of 16 a picture is 4 tokens
IMAGE_TOKENS = 4

VISION_SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": IMAGE_SIZE, "patch_size": 16,
}  # fmt: skip

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
# originals this short make YaRN stretch some of the few pairs of a tiny head, keep some and blend some
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}


def enliven(model, seed: int = 3):
    """Random weights that make varied sentences; at their usual size a model only repeats its last token."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("vision_encoder.") and "norm" not in name:
                scale = 0.4 if "embed_tokens" in name else 2 / math.sqrt(parameter.shape[-1])
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def enliven_all(model, seed: int = 1):
    """Random weights large enough that every position, expert and picture shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("vision_encoder."):
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(0.4 * noise)
            else:
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
    return model


def make_decoder(seed: int = 1, **changes) -> MiniMindForCausalLM:
    """With large weights, which show every mistake."""
    return enliven_all(MiniMindForCausalLM(MiniMindConfig(**{**SIZES, **changes})), seed).eval()


def untrained_decoder(seed: int = 0, **changes) -> MiniMindForCausalLM:
    """With the small weights that training starts from."""
    torch.manual_seed(seed)
    return MiniMindForCausalLM(MiniMindConfig(**{**SIZES, **changes})).eval()


def make_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Ids without the special ones, so that nothing is padding by chance."""
    return torch.randint(40, 6400, (rows, length), generator=torch.Generator().manual_seed(seed))


def make_labels(ids: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """About half of the tokens are to be learnt, in no order."""
    learnt = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return ids.masked_fill(~learnt, IGNORE_INDEX)


def naive_losses(logits: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """The loss of every labelled token from the full logits, one at a time."""
    losses = []
    for row in range(len(labels)):
        for position in range(1, labels.shape[1]):
            target = int(labels[row, position])
            if target != IGNORE_INDEX:
                scores = logits[row, position - 1].double()
                losses.append(float(scores.exp().sum().log() - scores[target]))
    return losses


def count_tower_calls(model) -> list[int]:
    """Pictures of each call of the tower, filled while the model runs."""
    calls = []
    model.vision_encoder.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    return calls


class Encoder:
    """The model's tower, counting what it sees."""

    def __init__(self, model):
        self.model, self.seen = model, 0

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen += len(pixels)
        return self.model.encode_pictures(pixels)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def rewrite(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The same file with other tensors."""
    save_file(tensors, path, metadata_of(path))
    return path


def minimind_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What MiniMind's trainers save: fp16, the tied head too, no tower, no word about sizes."""
    return {name: value.half() for name, value in model.state_dict().items() if not name.startswith("vision_encoder.")}


def broken_files(folder: Path) -> list[str]:
    """Names in a converted folder whose content is not what its manifest says: missing, changed, or added."""
    expected = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    return sorted(n for n in names | set(expected) if n not in names or file_sha256(folder / n) != expected.get(n))


def answered(text: str) -> Answer:
    """The answer of a model that nobody asked."""
    return Answer(text, (300, END_ID), 5, 2, 0.1, 10.0)
