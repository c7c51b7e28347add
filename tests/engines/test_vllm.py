"""vLLM itself, its build for CPUs, on tiny models: it says what our engine says."""

import pytest

from helpers.engines import HEADS, disagreements, require
from helpers.exports import make_seeing
from helpers.models import enliven

require("vllm")

TAKEN = {
    "linear": {},
    "mlp": {"projector": "mlp"},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "qwen2_moe": {"use_moe": True},
}


@pytest.mark.parametrize("name", TAKEN)
def test_it_says_what_ours_says(name, tmp_path):
    assert not disagreements("vllm", enliven(make_seeing(**HEADS, **TAKEN[name])), tmp_path / name)
