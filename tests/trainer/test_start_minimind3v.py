"""MiniMind-3V is trained on from its .pth, with what its second freezing learns."""

import torch

from helpers.minimind3v import write_minimind3v
from helpers.runs import tiny, watched_run
from model.tokenizer_files import read_tokenizer
from model.weights import load_model
from trainer.train_sft_vlm import SFT_VLM

OPEN = {"hidden_size": 0, "num_hidden_layers": 0, "num_attention_heads": 0, "num_key_value_heads": 0}
LEARNT = ("vision_proj.", "model.layers.0.", "model.layers.2.")


def test_projector_first_and_last_layer_learn(data_folder, tmp_path, monkeypatch):
    published = write_minimind3v(tmp_path / "published", use_moe=True)
    config = tiny(
        SFT_VLM, data_folder, published.tower, **OPEN, from_weight=str(published.pth), max_seq_len=256, epochs=1,
        trainable=("projector", "first_layer", "last_layer"),
    )  # fmt: skip
    before, model = watched_run(config, monkeypatch)
    assert torch.equal(before["vision_proj.mlp.1.weight"], published.tensors["vision_proj.mlp.1.weight"])
    after = model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert {name for name in changed if not name.startswith(LEARNT)} == set()
    assert all(any(name.startswith(part) for name in changed) for part in LEARNT)
    path = tmp_path / "out" / "sft_vlm_32_moe.safetensors"  # named by the sizes that the file says
    saved = load_model(path)
    assert (saved.config.projector, saved.config.image_token_id, saved.config.image_tokens) == ("norm_mlp", 12, 64)
    assert read_tokenizer(path).get_vocab() == read_tokenizer(published.pth).get_vocab()
