"""ONNX files answer in onnxruntime what the model answers, whatever its decoder, tower and projector."""

import json

import pytest

pytest.importorskip("onnxscript", reason="ONNX is tried where requirements/onnx.txt is installed")
pytest.importorskip("onnxruntime", reason="ONNX is tried where requirements/onnx.txt is installed")

import torch

from helpers.exports import export, make_seeing, refer
from model.tokenizer_files import load_tokenizer
from scripts.export.formats import ONNX_TOLERANCE, Source, export_onnx
from scripts.export.onnx_files import all_experts
from scripts.export.onnx_model import OnnxModel
from scripts.export.proof import compare, prove
from scripts.upload import files_to_send

SHAPES = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "output_bias": False},
    "qwen3, mlp, siglip": {"qk_norm": True, "projector": "mlp", "tower": "siglip_vision_model"},
    "qwen2_moe": {"use_moe": True},
    "qwen3_moe": {"use_moe": True, "qk_norm": True, "shared_expert_intermediate_size": 0},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The model, and its folder."""
    model = make_seeing()
    return model, export(model, "onnx", tmp_path_factory.mktemp("onnx") / "folder")


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_answers_as_the_model(shape, llama, tmp_path):
    model, folder = llama
    if shape != "llama":
        model = make_seeing(**SHAPES[shape])
        folder = export(model, "onnx", tmp_path / "folder")
    found = compare(folder, refer(model, tmp_path / "reference"), None, trains=False)
    assert found["largest_logit_difference"] < 1e-4 < ONNX_TOLERANCE
    assert found["texts"] == found["expected"]


def test_a_fresh_process_proves_it_by_what_is_in_the_folder(llama, tmp_path):
    model, folder = llama
    assert "the same greedy text" in prove(folder, refer(model, tmp_path / "reference"), None, trains=False)["proved"]
    assert {path.name for path in folder.glob("**/*") if path.suffix in (".safetensors", ".py")} == set()
    assert "onnx/decoder_model_merged.onnx" in files_to_send(folder)


def test_rows_of_a_batch_do_not_see_each_other_nor_padding(llama):
    ours = OnnxModel(llama[1])
    rows = [torch.arange(40, 49)[None], torch.arange(80, 85)[None]]
    alone = [ours(row, torch.ones_like(row)).logits for row in rows]
    padded = torch.cat([rows[0], torch.nn.functional.pad(rows[1], (4, 0))])
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    together = ours(padded, mask)
    assert torch.allclose(together.logits[0], alone[0][0], atol=1e-5)
    assert torch.allclose(together.logits[1, 4:], alone[1][0], atol=1e-5)
    longer = ours(torch.tensor([[50], [60]]), torch.nn.functional.pad(mask, (0, 1), value=1), past=together.past)
    for row, token, logits in zip(rows, (50, 60), longer.logits, strict=True):
        ids = torch.cat([row, torch.tensor([[token]])], 1)
        assert torch.allclose(logits[-1], ours(ids, torch.ones_like(ids)).logits[0, -1], atol=1e-5)


def test_transformers_js_finds_what_it_asks_for(llama):
    """By the names and sizes that its Llava code uses: see docs/onnx.md."""
    model, folder = llama
    decoder = OnnxModel(folder).decoder
    inputs = {given.name: given.shape for given in decoder.get_inputs()}
    config = json.loads((folder / "config.json").read_text())["text_config"]
    pasts = [f"{layer}.{part}" for layer in range(config["num_hidden_layers"]) for part in ("key", "value")]
    assert list(inputs) == ["inputs_embeds", "attention_mask", "position_ids", *(f"past_key_values.{p}" for p in pasts)]
    assert [given.name for given in decoder.get_outputs()] == ["logits", *(f"present.{part}" for part in pasts)]
    assert inputs["past_key_values.0.key"] == ["batch_size", config["num_key_value_heads"], "past_length", 8]
    processor = json.loads((folder / "processor_config.json").read_text())
    side = model.config.image_size // processor["patch_size"]
    assert side**2 + processor["num_additional_image_tokens"] == model.config.image_tokens
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["chat_template"] == (folder / "chat_template.jinja").read_text()


def test_all_experts_are_what_the_loop_over_them_gives():
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

    torch.manual_seed(1)
    experts = Qwen2MoeExperts(Qwen2MoeConfig(num_experts=5, hidden_size=12, moe_intermediate_size=7))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x, chosen, weights = torch.randn(9, 12), torch.rand(9, 5).topk(2).indices, torch.rand(9, 2)
    assert torch.allclose(all_experts(experts, x, chosen, weights), experts(x, chosen, weights), atol=1e-5)


def test_a_wrong_folder_is_not_proved(llama, tmp_path):
    """The proof sees what an exporter gets wrong: here the tower's last layer."""
    model, folder = llama
    reference = refer(make_seeing(seed=4), tmp_path / "reference")
    assert compare(folder, reference, None, trains=False)["largest_logit_difference"] > 0.1


def test_too_large_a_part_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.export.onnx_files.LARGEST", 1000)
    with pytest.raises(Exception, match="--to llava has no limit"):
        export_onnx(Source(make_seeing(), load_tokenizer(), "tiny"), tmp_path)
