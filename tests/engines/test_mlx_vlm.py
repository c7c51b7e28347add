"""mlx-vlm itself on tiny models: it says what our engine says, or refuses what docs/deploy.md says it refuses."""

import pytest

from helpers.engines import HEADS, disagreements, require
from helpers.exports import make_seeing
from helpers.models import enliven
from model.messages import UserError

require("mlx")

TAKEN = {"linear": {}, "mlp": {"projector": "mlp"}, "qwen2": {"qkv_bias": True}}
REFUSED = {
    "qwen3": {"qk_norm": True},
    "qwen2_moe": {"use_moe": True},
    "qwen3_moe": {"use_moe": True, "qk_norm": True, "shared_expert_intermediate_size": 0},
}


def test_it_says_what_ours_says(tmp_path):
    models = {name: enliven(make_seeing(**HEADS, **changes)) for name, changes in TAKEN.items()}
    assert not disagreements("mlx", models, tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_other_decoders_are_refused(name, tmp_path):
    model = enliven(make_seeing(**HEADS, **REFUSED[name]))
    with pytest.raises(UserError, match=f"Model type {name} not supported"):
        disagreements("mlx", {name: model}, tmp_path)
