"""A `llava` folder's weights as three ONNX files, laid out and named as transformers.js reads them.

onnx/vision_encoder.onnx        pictures [pictures, 3, height, width] -> image tokens [pictures, tokens, hidden]
onnx/embed_tokens.onnx          ids [batch, seq] -> embeddings, in which image tokens take the placeholders' places
onnx/decoder_model_merged.onnx  embeddings [batch, seq, hidden], attention_mask [batch, past + seq], position_ids, and a
                                layer's past keys and values [batch, heads, past, head] -> logits, and the new past
"""

import json
import warnings
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from transformers import DynamicCache, LlavaForConditionalGeneration

from model.messages import UserError
from scripts.export.writing import write_json

LARGEST = 2**31 - 2**20  # bytes of tensors in a file: protobuf's limit, less room for the rest


def check_packages() -> None:
    """Raises UserError where what writes and runs ONNX files is not installed."""
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if not find_spec(name)]:
        raise UserError(f"--to onnx needs {' and '.join(missing)}: pip install -r requirements/onnx.txt")


class Eyes(nn.Module):
    """Tower and projector."""

    def __init__(self, llava: LlavaForConditionalGeneration):
        super().__init__()
        self.tower, self.projector = llava.model.vision_tower, llava.model.multi_modal_projector
        self.first_patch = int(llava.config.vision_feature_select_strategy == "default")  # behind a class token

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self.tower(pixel_values, output_hidden_states=True).hidden_states[-1]
        return self.projector(features[:, self.first_patch :])


class Decoder(nn.Module):
    """The decoder and its head, with what it remembers among inputs and outputs."""

    def __init__(self, llava: LlavaForConditionalGeneration):
        super().__init__()
        self.model, self.lm_head = llava.model.language_model, llava.lm_head
        for module in self.model.modules():
            if hasattr(module, "gate_up_proj") and hasattr(module, "num_experts"):
                module.forward = partial(all_experts, module)

    def forward(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(keys, values, layer)
        own = torch.arange(inputs_embeds.shape[1])[:, None] + past[0].shape[2]
        visible = attention_mask[:, None, None].bool() & (torch.arange(attention_mask.shape[1]) <= own)
        hidden = self.model(
            inputs_embeds=inputs_embeds, attention_mask=visible, position_ids=position_ids, past_key_values=cache
        ).last_hidden_state
        return self.lm_head(hidden), *(part for layer in cache.layers for part in (layer.keys, layer.values))


def all_experts(experts: nn.Module, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Every expert reads every token, those not chosen for nothing: a graph cannot ask who was."""
    weights = x.new_zeros(x.shape[0], experts.num_experts).scatter(1, chosen, weights)  # [tokens, experts]
    gate, up = torch.einsum("th,eih->tei", x, experts.gate_up_proj).chunk(2, dim=-1)
    return torch.einsum("tei,ehi,te->th", experts.act_fn(gate) * up, experts.down_proj, weights)


@torch.no_grad()
def write_onnx(folder: Path) -> None:
    """Put ONNX files in the place of a `llava` folder's weights. Raises UserError where one would be too large."""
    llava = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    (folder / "model.safetensors").unlink()
    (folder / "onnx").mkdir()
    config, side = llava.config.text_config, llava.config.vision_config.image_size
    head_size = llava.model.language_model.layers[0].self_attn.head_dim
    batch, length, past = map(torch.export.Dim, ("batch_size", "sequence_length", "past_length"))
    row, ids = {0: batch, 1: length}, torch.zeros(2, 5, dtype=torch.long)
    names = [f"{layer}.{part}" for layer in range(config.num_hidden_layers) for part in ("key", "value")]
    mask, embedded = torch.ones(2, 8, dtype=torch.long), torch.zeros(2, 5, config.hidden_size)
    inputs = {"inputs_embeds": embedded, "attention_mask": mask, "position_ids": ids}
    inputs |= {f"past_key_values.{name}": torch.zeros(2, config.num_key_value_heads, 3, head_size) for name in names}
    shapes = (row, {0: batch, 1: torch.export.Dim.DYNAMIC}, row, ({0: batch, 2: past},) * len(names))
    pixels, pictures = torch.zeros(2, 3, side, side), {0: torch.export.Dim("pictures")}
    presents = [f"present.{name}" for name in names]
    _write(folder, "vision_encoder", Eyes(llava), {"pixel_values": pixels}, ["image_features"], (pictures,))
    _write(folder, "embed_tokens", llava.get_input_embeddings(), {"input_ids": ids}, ["inputs_embeds"], (row,))
    _write(folder, "decoder_model_merged", Decoder(llava), inputs, ["logits", *presents], shapes)
    # transformers.js looks for the template here only, and would count a class token as one of the text
    _change(folder / "tokenizer_config.json", chat_template=(folder / "chat_template.jinja").read_text("utf-8"))
    _change(folder / "processor_config.json", num_additional_image_tokens=0, vision_feature_select_strategy="full")


def _write(folder: Path, name: str, part: nn.Module, inputs: dict, outputs: list[str], shapes: tuple) -> None:
    if (size := sum(4 * parameter.numel() for parameter in part.parameters())) > LARGEST:
        raise UserError(f"--to onnx: {name} has {size:,} bytes and a file holds {LARGEST:,}: --to llava has no limit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch's exporter says of its own insides
        torch.onnx.export(
            part.eval(), tuple(inputs.values()), folder / f"onnx/{name}.onnx", input_names=list(inputs),
            output_names=outputs, dynamic_shapes=shapes, external_data=False, verbose=False,
        )  # fmt: skip


def _change(path: Path, **settings) -> None:
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | settings)
