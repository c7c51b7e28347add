"""mlx-vlm itself on tiny models: it says what our engine says, or refuses what docs/deploy.md says it refuses."""

import re
import subprocess

import pytest

from helpers.data import make_picture
from helpers.engines import HEADS, NO_CHARACTER, disagreements, require
from helpers.exports import make_seeing
from helpers.models import enliven
from helpers.repository import ROOT
from model.inference.answerer import Answerer, Options, user_turn
from model.messages import UserError
from model.tokenizer_files import load_tokenizer
from scripts.export.formats import Source, export_llava
from scripts.measure.apart import python_of

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


def test_the_lines_of_the_page_say_what_our_engine_says(tmp_path):
    (lines,) = re.findall(r"```python\n(from mlx_vlm.*?)```", (ROOT / "docs/deploy.md").read_text(), re.DOTALL)
    model = enliven(make_seeing(**HEADS))
    folder = tmp_path / "out/llava"
    folder.mkdir(parents=True)
    export_llava(Source(model, load_tokenizer(), "tiny", engine="mlx"), folder)
    make_picture(5).save(tmp_path / "picture.png")
    brief = lines.replace("max_tokens=100", "max_tokens=8")
    command = [python_of("mlx"), "-c", brief]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    answerer = Answerer(model)
    prompt = answerer.prompt([user_turn("What do you see?", 1)], [make_picture(5)])
    ours = answerer.stream(prompt, Options(max_new_tokens=8)).text
    assert ours.replace(NO_CHARACTER, "").strip() in said and len(ours) > 8
