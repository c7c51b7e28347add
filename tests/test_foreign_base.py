"""Bases of other people along the whole road, in small: trained, stopped and resumed, asked, converted, shown."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import model.files
from helpers.data import make_picture, write_jsonl
from helpers.foreign_base import FAMILIES, conversations, write_base
from helpers.runs import assert_bit_equal, run_until, tiny, write_texts
from model.inference.answerer import Answerer, Options, user_turn
from model.processing import VLMProcessor
from model.tokenizer_files import read_tokenizer
from model.weights import load_model, read_weights
from scripts import convert_vlm, inspect_sample
from scripts.demo.weights import find_weights
from scripts.export.proof import compare
from scripts.export.training_proof import complaint
from trainer.config import OPEN, StageConfig
from trainer.stage import run_stage
from trainer.train_llm import LLM
from trainer.train_pretrain_vlm import PRETRAIN_VLM
from trainer.train_sft_vlm import SFT_VLM

BAR = 1e-5  # largest difference of an fp32 logit
OPEN_SIZES = {name: value for name, value in OPEN.items() if name != "dropout"}  # the base's hold


@pytest.fixture(scope="module", params=FAMILIES)
def road(request, tmp_path_factory, tower_folder) -> SimpleNamespace:
    """A base, and what both stages of seeing made of it: base, pretrain and sft, the last two as configs."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "images").mkdir()
    records = []
    for number in range(24):
        make_picture(number).save(folder / f"images/{number}.png")
        question, answer = f"<image>\nWhat is {number}?", " ".join(["A red cat."] * (1 + number % 4))
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        records.append({"image": f"{number}.png", "conversations": turns})
    write_jsonl(folder / "train.jsonl", records)
    base = write_base(folder / "base", request.param)
    settings = {**OPEN_SIZES, "max_seq_len": 256, "projector": "mlp"}
    pretrain = tiny(PRETRAIN_VLM, folder, tower_folder, **settings, from_weight=str(base))
    run_stage(pretrain)
    sft = tiny(SFT_VLM, folder, tower_folder, **settings, from_weight="pretrain_vlm", save_interval=2)
    run_stage(sft)
    return SimpleNamespace(
        family=request.param, base=base, pretrain=weight_of(pretrain), config=sft, sft=weight_of(sft)
    )


def weight_of(config: StageConfig) -> Path:
    """The file that a stage wrote; its name has the width, which the base decides."""
    (path,) = Path(config.save_dir).glob(f"{config.name}_*.safetensors")
    return path


@torch.no_grad()
def test_the_decoder_is_what_transformers_reads(road):
    ids = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = AutoModelForCausalLM.from_pretrained(road.base).eval()(ids).logits
    assert expected.std() > 0.5 and (load_model(road.base)(ids).logits - expected).abs().max() <= BAR


def test_tokenizer_and_template_travel_with_every_weights_file(road):
    theirs = VLMProcessor(read_tokenizer(road.base))
    for path in (road.pretrain, road.sft):
        ours = VLMProcessor(read_tokenizer(path))
        for talk in conversations():
            assert ours.render(talk) == theirs.render(talk)
        assert ours.end_id == AutoTokenizer.from_pretrained(road.base).eos_token_id


def test_placeholder_and_end_are_in_the_config_and_in_the_vocabulary(road):
    config, tokenizer = load_model(road.sft).config, read_tokenizer(road.sft)
    assert config.eos_token_id == VLMProcessor(tokenizer).end_id
    assert 0 <= config.image_token_id < config.vocab_size
    if road.family == "qwen3":
        assert tokenizer.convert_ids_to_tokens(config.image_token_id) == "<|image_pad|>"


def test_it_answers_about_a_picture_and_without_one(road):
    answerer = Answerer.from_weight(road.sft, device="cpu", dtype="float32")
    for pictures in ([make_picture(1)], []):
        prompt = answerer.prompt([user_turn("What is in the picture?", len(pictures))], pictures)
        span = np.array(prompt.image_mask)
        assert span.sum() == 4 * len(pictures)
        assert set(np.array(prompt.ids)[span]) <= {answerer.model.config.image_token_id}
        answer = answerer.stream(prompt, Options(max_new_tokens=8))
        assert answer.new_tokens == 8 or answer.token_ids[-1] in answerer.end_ids
        inputs = answerer.processor.prompts([([user_turn("What is in the picture?", len(pictures))], pictures)])
        slow = load_model(road.sft).generate(**inputs, max_new_tokens=8, do_sample=False)
        assert list(answer.token_ids) == slow[0, inputs["input_ids"].shape[1] :].tolist()


def test_a_stopped_run_goes_on_to_the_same_weights(road, tmp_path, monkeypatch):
    config = dataclasses.replace(road.config, save_dir=str(tmp_path), from_weight=str(road.pretrain))
    run_until(config, 2, monkeypatch)  # of three
    run_stage(dataclasses.replace(config, from_resume=1))
    assert_bit_equal(read_weights(weight_of(config))[1], read_weights(road.sft)[1])


@pytest.mark.parametrize("format_name", ["transformers", "llava", "llm"])
def test_what_is_converted_answers_the_same(road, format_name, tmp_path, monkeypatch):
    def prove_here(folder, reference, tower, trains) -> dict:  # a process of its own costs seconds
        found = compare(folder, reference, tower, trains)
        assert found["texts"] == found["expected"] and complaint(found["trained"]) == ""
        return found

    monkeypatch.setattr(convert_vlm, "prove", prove_here)
    output = tmp_path / format_name
    options = ["--weight", str(road.sft), "--to", format_name, "--output", str(output)]
    assert convert_vlm.convert(convert_vlm.parse_arguments(options))["largest_logit_difference"] <= BAR
    talk = list(conversations())[3]
    exported = AutoTokenizer.from_pretrained(output)
    expected = VLMProcessor(read_tokenizer(road.base)).render(talk).input_ids.tolist()
    assert exported.apply_chat_template(talk, return_dict=True)["input_ids"] == expected


def test_the_demo_lists_it(road, monkeypatch):
    monkeypatch.setattr(model.files, "ROOT", road.sft.parent)
    assert {weight.path for weight in find_weights([road.sft.parent])} >= {road.pretrain, road.sft}


def test_a_sample_is_shown_as_this_base_will_read_it(road, capsys):
    flags = ["--from_weight", str(road.base), "--vision_model", road.config.vision_model]
    inspect_sample.main([road.config.data_path, "1", *flags])
    record = json.loads(Path(road.config.data_path).read_text().splitlines()[0])
    processor = VLMProcessor(read_tokenizer(road.base), image_tokens=4)
    assert f"{len(processor.render(record['conversations']))} tokens" in capsys.readouterr().out


def test_its_decoder_learns_texts_alone(road, tmp_path):
    write_texts(tmp_path)
    config = tiny(LLM, tmp_path, Path(road.config.vision_model), **OPEN_SIZES, from_weight=str(road.base),
                  data_path=str(tmp_path / "texts.jsonl"))  # fmt: skip
    run_stage(config)
    talk = list(conversations())[0]
    ours, theirs = (VLMProcessor(read_tokenizer(path)) for path in (weight_of(config), road.base))
    assert ours.render(talk) == theirs.render(talk)
