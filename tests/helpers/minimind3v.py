"""A tiny MiniMind-3V checkpoint as today's MiniMind-V publishes them, and what it answers, by its description alone.

The layout (MiniMind-V of 2026): a Qwen3-like decoder whose names are MiniMind's, MoE without a shared expert and with
one expert a token, a SigLIP2 tower that lies in a folder of its own, and `vision_proj.mlp.{0,1,3}`, which is LayerNorm,
Linear, GELU and Linear. A picture is a run of `<|image_pad|>`, token 12. Nothing here uses model/: it is the other side
of a comparison.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel

IMAGE_PAD = 12
IMAGE_SIZE, PATCH_SIZE, IMAGE_TOKENS = 64, 8, 64  # published: 256 pixels and patches of 32, 64 tokens as well
LAYERS, HIDDEN, HEADS, KEY_VALUE_HEADS, HEAD_DIM = 3, 32, 4, 2, 8
INTERMEDIATE = math.ceil(HIDDEN * math.pi / 64) * 64
EXPERTS = 4
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE,
}  # fmt: skip
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>", "<tts_pad>",
    "<tts_text_bos>", "<tts_text_eod>", "<tts_text_bos_single>",
]  # fmt: skip
PLAIN = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
BUFFERS = [f"<|buffer{number}|>" for number in range(1, 10)]  # so that ordinary text begins at 36
VOCABULARY = len(SPECIAL) + len(PLAIN) + len(BUFFERS) + 256
THOUGHT = "<think>\n\n</think>\n\n"  # what an answer opens with when nobody asked for thoughts
# In our words: an answer carries its thoughts, empty ones where it has none, and a question ends with an empty one.
TEMPLATE = (
    "{%- for message in messages %}"
    "{%- set content = message.content if message.content is string else '' %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.role == 'assistant' %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{{- content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{{- '<think>\\n' if open_thinking else '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
)


@dataclass(frozen=True)
class MiniMind3V:
    """Where a checkpoint lies, and its tensors as fp32 numbers."""

    pth: Path  # tokenizer.json stands beside it
    tower: Path
    tensors: dict[str, torch.Tensor]
    use_moe: bool

    def logits(self, input_ids: list[int], pictures: list[Image.Image] = ()) -> torch.Tensor:
        """[tokens, vocabulary]; each run of IMAGE_TOKENS placeholders shows the next picture."""
        with torch.no_grad():
            return decode(self.tensors, splice(self.tensors, input_ids, [self.see(p) for p in pictures]), self.use_moe)

    def see(self, picture: Image.Image) -> torch.Tensor:
        """[IMAGE_TOKENS, width of the tower]: its last hidden state, behind its last norm."""
        tower = SiglipVisionModel.from_pretrained(self.tower, dtype=torch.float32).eval()
        square = picture.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.asarray(square).transpose(2, 0, 1) / 255.0).float()
        return tower(((pixels - 0.5) / 0.5)[None]).last_hidden_state[0]

    def prompt(self, question: str, pictures: int = 1) -> list[int]:
        """Ids of a question about pictures, as their own scripts write them."""
        spans = "".join(["<|image_pad|>" * IMAGE_TOKENS + "\n"] * pictures)
        text = f"<|im_start|>user\n{spans}{question}<|im_end|>\n<|im_start|>assistant\n{THOUGHT}"
        return Tokenizer.from_file(str(self.pth.parent / "tokenizer.json")).encode(text).ids

    def write_folder(self, folder: Path) -> Path:
        """The same as their conversion writes it: config.json, pytorch_model.bin without a tower, the tokenizer."""
        folder.mkdir(parents=True)
        write_tokenizer(folder)
        config = {
            "architectures": ["MiniMindVLM"], "model_type": "minimind-v",
            "auto_map": {"AutoConfig": "model_vlm.VLMConfig", "AutoModelForCausalLM": "model_vlm.MiniMindVLM"},
            "image_ids": [IMAGE_PAD], "image_special_token": "<|image_pad|>", "image_token_len": IMAGE_TOKENS,
            "image_hidden_size": VISION["hidden_size"], "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS, "num_key_value_heads": KEY_VALUE_HEADS, "head_dim": HEAD_DIM,
            "intermediate_size": INTERMEDIATE, "moe_intermediate_size": INTERMEDIATE, "hidden_act": "silu",
            "vocab_size": VOCABULARY, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
            "rope_scaling": None, "inference_rope_scaling": False, "tie_word_embeddings": True, "dropout": 0.0,
            "flash_attn": True, "bos_token_id": 1, "eos_token_id": 2, "use_moe": self.use_moe,
            "num_experts": EXPERTS, "num_experts_per_tok": 1, "norm_topk_prob": True, "router_aux_loss_coef": 5e-4,
            "torch_dtype": "bfloat16", "transformers_version": "4.57.6",
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        torch.save({name: value.half() for name, value in self.tensors.items()}, folder / "pytorch_model.bin")
        return folder


def write_minimind3v(folder: Path, use_moe: bool = False, seed: int = 4) -> MiniMind3V:
    """folder/out/sft_vlm_32[_moe].pth with its tokenizer beside it, and the tower in folder/siglip2."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: draw(name, shape, generator).half() for name, shape in sorted(decoder_shapes(use_moe).items())} | {
        name: draw(name, shape, generator).half() for name, shape in sorted(projector_shapes().items())
    }
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    out = folder / "out"
    out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(out)
    pth = out / f"sft_vlm_{HIDDEN}{'_moe' if use_moe else ''}.pth"
    torch.save(tensors, pth)
    tower = write_siglip(folder / "siglip2")
    return MiniMind3V(pth, tower, {name: value.float() for name, value in tensors.items()}, use_moe)


def decoder_shapes(use_moe: bool) -> dict[str, tuple[int, ...]]:
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    blocks = [f"experts.{number}." for number in range(EXPERTS)] if use_moe else [""]
    for layer in (f"model.layers.{number}" for number in range(LAYERS)):
        for projection, heads in (("q", HEADS), ("k", KEY_VALUE_HEADS), ("v", KEY_VALUE_HEADS)):
            shapes[f"{layer}.self_attn.{projection}_proj.weight"] = (heads * HEAD_DIM, HIDDEN)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD_DIM)
        shapes |= {f"{layer}.self_attn.{name}_norm.weight": (HEAD_DIM,) for name in "qk"}
        shapes |= {f"{layer}.{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
        for block in blocks:
            shapes |= {f"{layer}.mlp.{block}{name}_proj.weight": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
            shapes[f"{layer}.mlp.{block}down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        if use_moe:
            shapes[f"{layer}.mlp.gate.weight"] = (EXPERTS, HIDDEN)
    return shapes


def projector_shapes() -> dict[str, tuple[int, ...]]:
    width = VISION["hidden_size"]
    return {
        "vision_proj.mlp.0.weight": (width,), "vision_proj.mlp.0.bias": (width,),
        "vision_proj.mlp.1.weight": (HIDDEN, width), "vision_proj.mlp.1.bias": (HIDDEN,),
        "vision_proj.mlp.3.weight": (HIDDEN, HIDDEN), "vision_proj.mlp.3.bias": (HIDDEN,),
    }  # fmt: skip


def draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Large enough that every norm, expert and picture shows in the logits."""
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 0.2 * noise + (0 if name.endswith("bias") else 1)
    return 0.4 * noise if "embed_tokens" in name else 1.5 * noise / math.sqrt(shape[-1])


def write_siglip(folder: Path, seed: int = 5) -> Path:
    """A SigLIP tower as theirs: SiglipVisionModel with its pooling head, and how pictures enter it."""
    tower = SiglipVisionModel(SiglipVisionConfig(**VISION))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(tower.named_parameters(), key=lambda named: named[0].removeprefix("vision_model.")):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    tower.save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    preprocessing = {
        "image_processor_type": "SiglipImageProcessor", "do_resize": True, "size": size, "resample": 2,  # bilinear
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": None,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


def write_tokenizer(folder: Path) -> None:
    """MiniMind's special tokens at their ids, and a token for every byte; its chat template."""
    names = [*SPECIAL, *PLAIN, *BUFFERS]
    vocabulary = {text: number for number, text in enumerate([*names, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("\\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([*PLAIN, *BUFFERS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "image_token": "<|image_pad|>",
        "add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False,
        "model_max_length": 131072, "chat_template": TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def splice(tensors: dict, input_ids: list[int], pictures: list[torch.Tensor]) -> torch.Tensor:
    """Token embeddings [tokens, hidden] in which projected pictures stand at the placeholders."""
    x = tensors["model.embed_tokens.weight"][input_ids].clone()
    places = [place for place, token in enumerate(input_ids) if token == IMAGE_PAD]
    assert len(places) == IMAGE_TOKENS * len(pictures)
    for number, features in enumerate(pictures):
        weights = [tensors[f"vision_proj.mlp.{part}.{kind}"] for part in (0, 1, 3) for kind in ("weight", "bias")]
        normed = F.layer_norm(features, features.shape[-1:], weights[0], weights[1], 1e-5)
        tokens = F.linear(F.gelu(F.linear(normed, weights[2], weights[3])), weights[4], weights[5])
        x[places[number * IMAGE_TOKENS : (number + 1) * IMAGE_TOKENS]] = tokens
    return x


def decode(tensors: dict, x: torch.Tensor, use_moe: bool) -> torch.Tensor:
    """Embeddings [tokens, hidden] -> logits [tokens, vocabulary]."""
    for number in range(LAYERS):
        layer = {n.split(".", 3)[3]: v for n, v in tensors.items() if n.startswith(f"model.layers.{number}.")}
        x = x + attend(layer, rms_norm(x, layer["input_layernorm.weight"]))
        normed = rms_norm(x, layer["post_attention_layernorm.weight"])
        x = x + (route(layer, normed) if use_moe else swiglu(layer, "mlp.", normed))
    return rms_norm(x, tensors["model.norm.weight"]) @ tensors["model.embed_tokens.weight"].T


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def attend(layer: dict, x: torch.Tensor) -> torch.Tensor:
    """Heads are normed, then turned; each pair of query heads shares a head of keys and values."""
    tokens = len(x)

    def heads(name: str) -> torch.Tensor:  # [heads, tokens, head_dim]
        return (x @ layer[f"self_attn.{name}_proj.weight"].T).view(tokens, -1, HEAD_DIM).transpose(0, 1)

    queries = turn(rms_norm(heads("q"), layer["self_attn.q_norm.weight"]))
    keys = turn(rms_norm(heads("k"), layer["self_attn.k_norm.weight"]))
    keys, values = (part.repeat_interleave(HEADS // KEY_VALUE_HEADS, 0) for part in (keys, heads("v")))
    scores = queries @ keys.transpose(1, 2) / math.sqrt(HEAD_DIM)
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(later, -math.inf).softmax(-1) @ values
    return mixed.transpose(0, 1).reshape(tokens, -1) @ layer["self_attn.o_proj.weight"].T


def turn(x: torch.Tensor) -> torch.Tensor:
    """RoPE over halves: element i is paired with element i + head_dim / 2, base 1e6."""
    half = HEAD_DIM // 2
    angles = torch.arange(x.shape[1])[:, None] / 1e6 ** (torch.arange(half) / half)
    cos, sin, first, second = angles.cos(), angles.sin(), x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def swiglu(layer: dict, block: str, x: torch.Tensor) -> torch.Tensor:
    gate, up, down = (layer[f"{block}{name}_proj.weight"] for name in ("gate", "up", "down"))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def route(layer: dict, x: torch.Tensor) -> torch.Tensor:
    """One expert a token, the likeliest; its weight, divided by the sum of the chosen ones, is 1."""
    chosen = (x @ layer["mlp.gate.weight"].T).argmax(-1)
    return torch.stack([swiglu(layer, f"mlp.experts.{e}.", row[None])[0] for row, e in zip(x, chosen, strict=True)])
