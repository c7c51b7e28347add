"""Weights are known by what they compute at the next start; what is new to them is told and learnt, never refused."""

import dataclasses
import json
import math
import re

import pytest
import torch

from helpers.models import SIZES, enliven
from helpers.runs import losses, refusal, stopped_run, tiny, untrained_weights, write_texts
from model.config import MiniMindConfig
from model.model_minimind import MiniMindForCausalLM
from model.processing import VLMProcessor
from model.weights import load_model, read_facts, save_weights
from trainer.checkpoint.probe import PROBE, TEXTS, TOLERANCE, check_probe, probe_facts
from trainer.config import StageConfig
from trainer.stage import run_stage
from trainer.train_llm import LLM


@pytest.fixture
def base(data_folder, tower_folder) -> StageConfig:
    """A decoder that has learnt a little, and its file."""
    base = tiny(
        LLM,
        data_folder,
        tower_folder,
        data_path=str(write_texts(data_folder)),
        epochs=6,
        save_dir=str(data_folder / "base"),
    )
    run_stage(base)
    return base


def test_new_words_are_told_and_learnt(config, data_folder, capsys):
    path = untrained_weights(data_folder / "untrained.safetensors")
    config = dataclasses.replace(config, from_weight=path)
    run_stage(config)
    said = capsys.readouterr().out
    assert "text loss before training, pictures left out: 8." in said
    assert re.search(
        r"these words are new to this decoder: text loss 8.\d \(a uniform guess has 8.8\); it will learn", said
    )
    assert losses(config)[-1] < losses(config)[0]


def test_weights_that_know_the_words_start_without_a_remark(base, config, capsys):
    run_stage(dataclasses.replace(config, from_weight=str(base.weight_path)))
    assert "are new to this decoder" not in capsys.readouterr().out
    assert len(losses(config)) == 3 and losses(config)[0] < 7


def test_a_file_holds_a_probe_of_the_project_s_own_sentences(base):
    known = json.loads(read_facts(base.weight_path)[PROBE])
    assert known["texts"] == list(TEXTS) and 0 < known["loss"] < 20
    model = load_model(base.weight_path)
    processor = VLMProcessor.for_config(model.config)
    assert json.loads(probe_facts(model, processor)[PROBE])["loss"] == pytest.approx(known["loss"], rel=1e-4)


@pytest.mark.parametrize("theta", [0.0, 100.0])
def test_other_heads_than_the_file_s_fit_every_shape_and_are_refused(config, data_folder, tiny_config, theta):
    path, model = data_folder / "lively.safetensors", enliven(MiniMindForCausalLM(tiny_config))
    save_weights(model, path, probe_facts(model, VLMProcessor.for_config(model.config)))
    other = {"num_attention_heads": SIZES["num_attention_heads"] // 2, "num_key_value_heads": 1, "rope_theta": theta}
    refusal(
        dataclasses.replace(config, from_weight=str(path), **other), str(path), "does not compute", "--num_attention_h"
    )


def test_another_theta_is_no_damage(data_folder, tiny_config):
    """The probe is computed with the angles of the file, and the model keeps its own."""
    path, model = data_folder / "lively.safetensors", enliven(MiniMindForCausalLM(tiny_config))
    processor = VLMProcessor.for_config(model.config)
    save_weights(model, path, probe_facts(model, processor))
    raised = MiniMindForCausalLM(MiniMindConfig(**SIZES, rope_theta=100.0))
    raised.load_state_dict(model.state_dict())
    theirs, known = json.loads(probe_facts(raised, processor)[PROBE]), json.loads(read_facts(path)[PROBE])
    assert abs(theirs["loss"] - known["loss"]) > TOLERANCE * known["loss"]  # else the check would pass by itself
    own = raised.model.rotary.frequencies.clone()
    check_probe(raised, processor, path)
    assert torch.equal(raised.model.rotary.frequencies, own)


def test_numbers_changed_since_the_save_are_refused(base, config):
    model, facts = load_model(base.weight_path), read_facts(base.weight_path)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-5)
    save_weights(model, base.weight_path, facts)
    refusal(dataclasses.replace(config, from_weight=str(base.weight_path)), str(base.weight_path), "it is damaged")


def test_another_tokenizer_is_refused_by_name(base, config, monkeypatch):
    encode = VLMProcessor.encode
    monkeypatch.setattr(VLMProcessor, "encode", lambda self, text: tuple(id ^ 1 for id in encode(self, text)))
    refusal(dataclasses.replace(config, from_weight=str(base.weight_path)), "another tokenizer", "model/tokenizer.json")


def test_a_resumed_run_asks_its_checkpoint_and_not_the_file_that_it_started_from(
    base, data_folder, tower_folder, monkeypatch
):
    config = stopped_run(data_folder, tower_folder, monkeypatch, from_weight=str(base.weight_path))
    model, facts = load_model(base.weight_path), read_facts(base.weight_path)
    facts[PROBE] = json.dumps({**json.loads(facts[PROBE]), "loss": 1.0})
    save_weights(model, base.weight_path, facts)
    run_stage(config)
    assert config.weight_path.is_file()


def test_more_experts_a_token_are_a_choice(data_folder, tower_folder):
    base = tiny(LLM, data_folder, tower_folder, data_path=str(write_texts(data_folder)), use_moe=1)
    run_stage(base)
    run_stage(dataclasses.replace(base, name="again", from_weight=str(base.weight_path), num_experts_per_tok=1))
    again = dataclasses.replace(base, name="again")
    assert json.loads(read_facts(again.weight_path)[PROBE])["num_experts_per_tok"] == 1


def test_a_loss_that_is_no_number_is_no_probe(make_vlm, processor):
    model = make_vlm()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    assert probe_facts(model, processor) == {}
