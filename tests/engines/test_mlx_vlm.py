"""mlx-vlm itself on tiny models: it says what our engine says, or refuses what docs/deploy.md says it refuses."""

import pytest

from helpers.engines import HEADS, disagreements, require
from helpers.exports import make_seeing
from helpers.models import enliven
from model.messages import UserError

require("mlx")

TAKEN = {
    "linear": {},
    "mlp": {"projector": "mlp"},
    "qwen2": {"qkv_bias": True},
}
REFUSED = {
    "qwen3": ({"qk_norm": True}, "qwen3"),
    "qwen2_moe": ({"use_moe": True}, "qwen2_moe"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_it_says_what_ours_says(name, tmp_path):
    assert not disagreements("mlx", enliven(make_seeing(**HEADS, **TAKEN[name])), tmp_path / name)


@pytest.mark.parametrize("name", REFUSED)
def test_other_decoders_are_refused(name, tmp_path):
    changes, said = REFUSED[name]
    with pytest.raises(UserError, match=f"Model type {said} not supported"):
        disagreements("mlx", enliven(make_seeing(**HEADS, **changes)), tmp_path / name, ["none"])
