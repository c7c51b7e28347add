"""Real runs, tiny, with every kind of tower, projector and number of tokens: trained, resumed from, answered with."""

import dataclasses

import pytest

from helpers.data import make_picture
from helpers.models import SIZES
from helpers.runs import losses, refusal, tiny
from helpers.towers import make_tower
from model.inference.answerer import Answerer, user_turn
from model.inference.attention_map import look
from model.weights import build_vlm, load_model, save_weights
from trainer.build import build_model
from trainer.checkpoint.fingerprint import binding_flags
from trainer.stage import run_stage
from trainer.train_pretrain_vlm import PRETRAIN_VLM
from trainer.train_sft_vlm import SFT_VLM


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2_with_registers", "efficientnet_lite"])
def test_every_tower_trains_the_same_from_cached_features(kind, data_folder, tmp_path):
    make_tower(kind, tmp_path / "tower")
    config = tiny(PRETRAIN_VLM, data_folder, tmp_path / "tower")
    run_stage(config)
    cached = dataclasses.replace(config, save_dir=str(tmp_path / "cached"), cache_features="float16")
    run_stage(cached)
    assert losses(cached) == pytest.approx(losses(config), abs=2e-3) and len(losses(config)) == 3


@pytest.mark.parametrize(
    "projector, tokens, grid", [("linear", 1, (1, 1)), ("mlp", 2, (2, 1)), ("norm_mlp", 4, (2, 2))]
)
def test_projector_and_tokens_go_from_stage_to_stage_and_into_answers(
    projector, tokens, grid, data_folder, tower_folder
):
    first = tiny(PRETRAIN_VLM, data_folder, tower_folder, projector=projector, image_tokens=tokens)
    run_stage(first)
    second = tiny(SFT_VLM, data_folder, tower_folder, from_weight=str(first.weight_path))
    run_stage(second)
    model = load_model(second.weight_path)
    assert (model.config.projector, model.config.image_tokens) == (projector, tokens)
    answerer = Answerer(model)
    prompts = [answerer.prompt([user_turn("What is it?", 1)], [make_picture(number)]) for number in (1, 2)]
    assert [sum(prompt.image_mask) for prompt in prompts] == [tokens, tokens]
    answers = answerer.batch(prompts)
    assert all(answer.token_ids for answer in answers)
    assert look(model, prompts[0], answers[0].token_ids).maps().shape == (1, *grid)


@pytest.mark.parametrize(
    "flag, value, trained", [("projector", "mlp", "linear"), ("image_tokens", 4, 1), ("image_tokens", 2, 1)]
)
def test_flags_that_disagree_with_the_weights_are_refused_with_both_values(
    flag, value, trained, data_folder, tower_folder, tokenizer, tmp_path
):
    path = tmp_path / "first.safetensors"
    save_weights(build_vlm(SIZES, tower_folder, {"image_tokens": 1}), path)
    config = tiny(SFT_VLM, data_folder, tower_folder, from_weight=str(path), **{flag: value})
    refusal(config, f"--{flag} {value} is not what {path} was trained with, {trained}: leave --{flag} out")
    agreeing = dataclasses.replace(config, **{flag: trained})
    assert build_model(agreeing, tokenizer).config.image_tokens == 1


def test_tokens_that_a_tower_cannot_give_are_refused(data_folder, tower_folder):
    config = tiny(PRETRAIN_VLM, data_folder, tower_folder, image_tokens=3)
    refusal(config, "image_tokens 3 cannot be made of 2 x 2 patches: 4, 2, 1 can")


def test_a_run_from_before_these_flags_goes_on_where_they_are_open():
    assert not {"projector", "image_tokens"} & binding_flags(SFT_VLM).keys()
    given = binding_flags(dataclasses.replace(SFT_VLM, projector="linear", image_tokens=49))
    assert (given["projector"], given["image_tokens"]) == ("linear", 49)
