"""Folders that a conversion wrote, asked by our own engine: every format, every dtype, with the tower and without."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from helpers.data import make_picture
from helpers.exports import export, make_seeing
from helpers.models import IMAGE_SIZE, make_decoder
from model.inference.answerer import Answerer, Options, user_turn
from model.messages import UserError
from model.pictures import open_picture
from model.processing import VLMProcessor
from model.tokenizer_files import load_tokenizer
from scripts.export.formats import FORMATS, Source

SHORT = Options(8)
ASKED = [user_turn("What is it?", 1)], [make_picture(1)]


@pytest.fixture
def converted(model, tmp_path):
    """converted(format, settings): a folder, without the proof."""

    def convert(name: str, **settings):
        folder = tmp_path / name
        folder.mkdir()
        FORMATS[name](Source(model, load_tokenizer(), "tiny", **settings), folder)
        return folder

    return convert


def ask(folder, dtype: str = "float32", **options) -> tuple[int, ...]:
    answerer = Answerer.from_weight(folder, device="cpu", dtype=dtype, **options)
    return answerer.stream(answerer.prompt(*ASKED), SHORT).token_ids


def rewrite(path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("changes", [{"qk_norm": True, "head_dim": 16}, {"qkv_bias": True}], ids=str)
def test_a_decoder_in_a_class_of_its_own(changes, tmp_path):
    model, question = make_decoder(**changes), [user_turn("What is it?", 0)]
    FORMATS["llm"](Source(model, load_tokenizer(), "tiny"), tmp_path)
    stock, ours = Answerer.from_weight(tmp_path, device="cpu", dtype="float32"), Answerer(model)
    assert type(stock.model).__name__ == ("Qwen3ForCausalLM" if "qk_norm" in changes else "Qwen2ForCausalLM")
    expected, found = (answerer.stream(answerer.prompt(question), SHORT).token_ids for answerer in (ours, stock))
    assert len(expected) > 1 and found == expected


@pytest.fixture
def expected(model):
    answerer = Answerer(model)
    return answerer.stream(answerer.prompt(*ASKED), SHORT).token_ids


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_llava_folder_in_every_dtype(model, converted, dtype):
    """The projector's 2^-40 is no number of float16."""
    folder, prompt = converted("llava"), Answerer(model).prompt(*ASKED)
    found, _ = Answerer.from_weight(folder, device="cpu", dtype=dtype).reader.start([prompt])
    exact, _ = Answerer(model).reader.start([prompt])
    share = {"float32": 1e-5, "float16": 0.01, "bfloat16": 0.1}[dtype]
    assert (found[:, :6400] - exact).abs().max() < share * exact.abs().max()


def test_no_vision_with_its_tower_named_or_inside(converted, tower_folder, expected, tmp_path):
    folder = converted("transformers", with_vision=False)
    assert ask(folder, vision_model=str(tower_folder)) == expected
    shutil.copytree(tower_folder, folder / "vision_model")
    assert ask(folder) == expected


def test_no_vision_without_its_tower_says_so(converted, tower_folder, make_vlm, tmp_path):
    folder = converted("transformers", with_vision=False)
    with pytest.raises(UserError, match="comes without its vision tower .* name its folder with --vision_model DIR"):
        ask(folder)
    with pytest.raises(UserError, match="nowhere: name its folder with --vision_model"):
        ask(folder, vision_model="nowhere")
    other = shutil.copytree(tower_folder, tmp_path / "other")
    tower = make_vlm().vision_encoder
    with torch.no_grad():
        tower.post_layernorm.bias += 1
    tower.save_pretrained(other)
    with pytest.raises(UserError, match="other is another tower .* than the one"):
        ask(folder, vision_model=str(other))


def test_other_control_tokens_are_refused(converted):
    folder = converted("llava")
    text = (folder / "tokenizer.json").read_text(encoding="utf-8").replace("<|im_end|>", "<|eot|>")
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    rewrite(folder / "tokenizer_config.json", eos_token="<|eot|>")
    with pytest.raises(UserError, match=r"closes answers with '<\|im_end\|>', which ends with none of its control"):
        ask(folder)


@pytest.mark.parametrize("place", ["config.json", "generation_config.json"])
def test_any_of_several_end_tokens_ends_the_answer(converted, expected, place):
    folder = converted("llava")
    ends = [2, expected[3]]
    if place == "config.json":
        (folder / "generation_config.json").unlink()
        text_config = json.loads((folder / place).read_text())["text_config"]
        rewrite(folder / place, text_config={**text_config, "eos_token_id": ends})
    else:
        rewrite(folder / place, eos_token_id=ends)
    assert ask(folder) == expected[: expected.index(expected[3]) + 1]


def test_stock_processors_clip_16_bits_to_white_as_the_docs_say(converted, processor, tmp_path):
    """Nothing in a preprocessor's config turns that off; after open_picture they see what ours sees."""
    grey = np.random.default_rng(0).integers(0, 65536, (IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    stock = CLIPImageProcessor.from_pretrained(converted("llava"))
    ours = processor.pixels(open_picture(tmp_path / "grey.png"))

    def seen(picture: Image.Image) -> torch.Tensor:
        pixels = stock(picture, return_tensors="pt")["pixel_values"][0]
        mean, deviation = (torch.tensor(values)[:, None, None] for values in (stock.image_mean, stock.image_std))
        return ((pixels * deviation + mean) * 255).round()

    with Image.open(tmp_path / "grey.png") as picture:
        assert (seen(picture) == 255).float().mean() > 0.95 > 0.1 > (ours == 255).float().mean()
    assert torch.equal(seen(open_picture(tmp_path / "grey.png")), ours.float())


@pytest.mark.parametrize("tower", ["clip_vision_model", "siglip_vision_model"])
def test_pictures_enter_as_the_folder_says(tower, tmp_path):
    """Mean, deviation and filter are the tower's; answers are those of the model that was converted."""
    model = make_seeing(tower, projector="mlp", qk_norm=True)
    tokenizer = load_tokenizer()
    stock = Answerer.from_weight(export(model, "llava", tmp_path / "llava"), device="cpu", dtype="float32")
    own = Answerer(model, processor=VLMProcessor.for_config(model.config, tokenizer))
    assert stock.processor.resample == model.config.resample
    question, pictures = [user_turn("What is it?", 2)], [make_picture(1), make_picture(2).resize((90, 30))]
    answers = [
        answerer.stream(answerer.prompt(question, pictures), Options(max_new_tokens=8, temperature=0))
        for answerer in (own, stock)
    ]
    assert answers[0].token_ids == answers[1].token_ids and len(answers[0].token_ids) > 1
