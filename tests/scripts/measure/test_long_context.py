"""What a longer conversation costs is measured apart, length by length."""

import json

import pytest

from helpers.models import SIZES, enliven, make_decoder
from model.inference.answerer import Answerer
from model.messages import UserError
from model.weights import save_weights
from scripts.measure import long_context


def test_each_length_in_a_process_of_its_own(tmp_path, capsys):
    save_weights(enliven(make_decoder(vocab_size=6400)), tmp_path / "llm_32.safetensors")
    path = tmp_path / "new/figures.json"
    flags = ["--weight", tmp_path / "llm_32.safetensors", "--device", "cpu", "--dtype", "float32", "--new_tokens", "2"]
    long_context.main([*map(str, flags), "--lengths", "8", "32", "--json", str(path)])
    found = json.loads(path.read_text())
    assert set(found) == {"8", "32"} and all(found["8"][name] >= 0 for name in long_context.FIGURES)
    assert "prefill, s" in capsys.readouterr().out


def test_the_cache_is_counted_to_the_byte():
    answerer = Answerer(make_decoder())
    head = SIZES["hidden_size"] // SIZES["num_attention_heads"]
    position = SIZES["num_hidden_layers"] * 2 * SIZES["num_key_value_heads"] * head * 4
    assert long_context.measure_one(answerer, 20, 3)["cache_bytes"] == (20 + 3) * position
    answerer.max_length = 24
    with pytest.raises(UserError, match="--lengths 21 with 3 new tokens: the model reads 24"):
        long_context.measure_one(answerer, 21, 3)


def test_a_length_that_fails_is_named(tmp_path):
    with pytest.raises(SystemExit, match="long_context: --lengths 8: .*none.safetensors"):
        long_context.main(["--weight", str(tmp_path / "none.safetensors"), "--lengths", "8"])
