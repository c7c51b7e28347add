"""Today's MiniMind-V, MiniMind-3V, loads and answers as its published layout says, from a .pth and from a folder."""

import re

import pytest
import torch

from helpers.data import make_picture
from helpers.minimind3v import IMAGE_PAD, IMAGE_TOKENS, MiniMind3V, write_minimind3v
from model.inference.answerer import Answerer, Options, user_turn
from model.messages import UserError
from model.processing import VLMProcessor
from model.tokenizer_files import read_tokenizer
from model.weights import load_model

BAR = 1e-4  # largest difference of an fp32 logit
QUESTION = "What is in it? 12 things"


@pytest.fixture(scope="module", params=["dense", "moe"])
def published(request, tmp_path_factory) -> MiniMind3V:
    return write_minimind3v(tmp_path_factory.mktemp(request.param), use_moe=request.param == "moe")


@pytest.fixture(scope="module", params=["pth", "folder"])
def path(request, published, tmp_path_factory):
    """Of the same weights: the trainer's file, or the folder that their conversion makes of it."""
    if request.param == "pth":
        return published.pth
    return published.write_folder(tmp_path_factory.mktemp("converted") / "minimind-3v")


@torch.no_grad()
def test_logits_are_those_of_its_description(published, path):
    model = load_model(path, published.tower)
    assert model.config.image_token_id == IMAGE_PAD and model.config.image_tokens == IMAGE_TOKENS
    assert (model.config.projector, model.config.rms_norm_eps, model.config.qk_norm) == ("norm_mlp", 1e-6, True)
    processor = VLMProcessor.for_config(model.config, read_tokenizer(path))
    pictures = [make_picture(1).resize((90, 40)), make_picture(2)]
    inputs = processor.prompts([([user_turn(QUESTION, 1)], pictures[:1]), ([user_turn(QUESTION, 0)], [])])
    for row, shown in ((0, pictures[:1]), (1, [])):
        real = inputs["attention_mask"][row].bool()
        ids = inputs["input_ids"][row][real].tolist()
        assert ids == prompt_of(published, len(shown))
        expected = published.logits(ids, shown)
        assert expected.std() > 1  # logits near zero would be equal to anything
        found = model(**inputs).logits[row][real]
        assert (found - expected).abs().max() < BAR
    other = published.logits(prompt_of(published, 1), pictures[1:])
    assert (other - published.logits(prompt_of(published, 1), pictures[:1])).abs().max() > 0.1  # the picture counts


def prompt_of(published: MiniMind3V, pictures: int) -> list[int]:
    return published.prompt(QUESTION, pictures)


@torch.no_grad()
def test_the_engine_answers_what_the_description_says(published, path):
    """Greedy tokens of the fast decoder, each the likeliest by the slow forward."""
    answerer = Answerer.from_weight(path, str(published.tower), "cpu", "float32")
    picture = make_picture(3)
    prompt = answerer.prompt([user_turn(QUESTION, 1)], [picture])
    answer = answerer.stream(prompt, Options(max_new_tokens=8, temperature=0))
    ids = published.prompt(QUESTION)
    for token in answer.token_ids:
        assert token == int(published.logits(ids, [picture])[-1].argmax())
        ids.append(token)
    assert len(answer.token_ids) > 1


def test_without_its_tower_it_says_so(published, path):
    with pytest.raises(UserError, match=re.escape("name it with --vision_model")):
        load_model(path)
