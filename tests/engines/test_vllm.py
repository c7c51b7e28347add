"""vLLM itself, its build for CPUs, on tiny models of every decoder and projector: it says what our engine says."""

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
    "qwen3_moe": {"use_moe": True, "qk_norm": True, "shared_expert_intermediate_size": 0},
    "siglip": {"tower": "siglip_vision_model"},
    "siglip, mlp": {"tower": "siglip_vision_model", "projector": "mlp"},
}


def test_it_says_what_ours_says(tmp_path):
    models = {name: enliven(make_seeing(**HEADS, **changes)) for name, changes in TAKEN.items()}
    assert not disagreements("vllm", models, tmp_path)
