"""What transformers passes to forward(): a `transformers` folder is trained as its Trainer does it, without ours."""

import inspect

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor

from helpers.models import SIZES, enliven
from model.config import IGNORE_INDEX, MiniMindConfig
from model.messages import UserError
from model.model_minimind import MiniMindForCausalLM


@pytest.fixture
def model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture
def batch(folder, picture):
    """Two conversations as a collator would make them with the folder's processor, and their labels."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    talks = [
        [{"role": "user", "content": [{"type": "image", "image": picture(number)}, {"type": "text", "text": "What?"}]},
         {"role": "assistant", "content": answer}]
        for number, answer in enumerate(("a cat", "a dog and another cat"))
    ]  # fmt: skip
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    inputs = processor.apply_chat_template(talks, **options)
    answers = inputs.pop("assistant_masks").bool()
    return {**inputs, "labels": inputs["input_ids"].masked_fill(~answers, IGNORE_INDEX)}


def compute_loss(model, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
    """Trainer.compute_loss of transformers 5.24, from which nothing is left out but other losses."""
    takes_more = any(p.kind == p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())
    assert takes_more  # how Trainer finds out whether to pass num_items_in_batch
    if num_items_in_batch is not None:
        inputs = {**inputs, "num_items_in_batch": num_items_in_batch}
    outputs = model(**inputs)
    loss = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
    return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("return_dict", [True, False])
def test_trained_as_transformers_trainer_does(model, batch, return_dict, tmp_path):
    """Two steps of two micro-batches; HF Trainer itself needs accelerate, which no lock of this project holds."""
    model.config.return_dict, model.config.use_cache = return_dict, False  # the latter as Trainer sets it
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    count = (batch["labels"][:, 1:] != IGNORE_INDEX).sum() / 1  # a tensor of floats, as 5.24 makes it
    losses, frozen = [], model.vision_encoder.state_dict()["embeddings.class_embedding"].clone()
    for _ in range(2):
        model.train()
        whole = compute_loss(model, batch, num_items_in_batch=count)
        parts = [{name: value[row : row + 1] for name, value in batch.items()} for row in range(2)]
        found = [compute_loss(model, part, num_items_in_batch=count) for part in parts]
        assert sum(found).item() == pytest.approx(whole.item(), rel=1e-5)
        sum(found).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(whole.item())
    model.eval()
    with torch.no_grad():  # as Trainer.prediction_step
        loss, outputs = compute_loss(model, batch, return_outputs=True, num_items_in_batch=count)
    assert isinstance(outputs, tuple) != return_dict
    assert losses[0] > losses[1] > float(loss)
    assert torch.equal(model.vision_encoder.state_dict()["embeddings.class_embedding"], frozen)
    model.config.return_dict = True
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(again(**batch).loss, model(**batch).loss)


def test_trainer_keeps_the_columns_that_show_pictures(model, batch):
    """It drops what forward() does not name, and finds the labels in the same way."""
    assert set(batch) <= set(inspect.signature(model.forward).parameters)


def make_decoder(**changes) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    return enliven(MiniMindForCausalLM(MiniMindConfig(**SIZES, **changes))).eval()


IDS = torch.randint(40, 6400, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("use_moe", [False, True])
@torch.no_grad()
def test_hidden_states(use_moe):
    """What enters each layer and then the head, with labels too, where else the last layer runs at some places only."""
    model = make_decoder(use_moe=use_moe)
    output = model(IDS, output_hidden_states=True)
    assert [state.shape for state in output.hidden_states] == [(2, 9, 32)] * 3
    assert torch.equal(output.hidden_states[0], model.model.embed_tokens(IDS))
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    assert model(IDS).hidden_states is None
    labelled = model(IDS, labels=IDS, output_hidden_states=True)
    assert all(torch.equal(*pair) for pair in zip(labelled.hidden_states, output.hidden_states, strict=True))
    assert float(labelled.loss) == pytest.approx(float(model(IDS, labels=IDS).loss), rel=1e-6)
    model.config.output_hidden_states = True
    assert len(model(IDS).hidden_states) == 3


def test_hidden_states_of_generate(model, batch):
    prompt = {name: value for name, value in batch.items() if name != "labels"}
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    found = model.generate(**prompt, **options, output_hidden_states=True)
    length = prompt["input_ids"].shape[1]
    assert [step[-1].shape for step in found.hidden_states] == [(2, length, 32), (2, 1, 32), (2, 1, 32)]
    assert torch.equal(found.sequences, model.generate(**prompt, **options).sequences)


@torch.no_grad()
def test_tuple_instead_of_names():
    model = make_decoder()
    loss, *rest = model(IDS, labels=IDS, logits_to_keep=0, return_dict=False)
    assert torch.equal(rest[0], model(IDS).logits)
    assert float(loss) == pytest.approx(float(F.cross_entropy(rest[0][:, :-1].flatten(0, 1), IDS[:, 1:].flatten())))
    model.config.return_dict = False
    assert isinstance(model(IDS), tuple) and not isinstance(model(IDS, return_dict=True), tuple)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"output_attentions": True}, "output_attentions is not offered by this model: attention keeps no weights"),
        ({"inputs_embeds": torch.zeros(2, 9, 32)}, "inputs_embeds is not offered .* takes input_ids"),
        ({"output_router_logits": True}, "output_router_logits is not offered .* aux_loss"),
        ({"tokn_type_ids": IDS}, "tokn_type_ids is not offered .* does not know it"),
    ],
)
def test_what_is_not_offered_is_refused_by_name(given, message):
    model = make_decoder()
    with pytest.raises(UserError, match=message):
        model(IDS, **given)
    assert model(IDS, **dict.fromkeys(given, False)).logits is not None
    assert model(IDS, **dict.fromkeys(given)).logits is not None


def test_parts_on_several_devices(make_vlm, processor, picture):
    """Decoder on one, tower and projector on another, as device_map="auto" may place them."""
    model = make_vlm()
    inputs = processor.prompts([([{"role": "user", "content": "<image>what?"}], [picture(1)])])
    ids = inputs.pop("input_ids").to("meta")
    model.model.to("meta")
    assert model.embed(ids, inputs["image_mask"], inputs["pixel_values"]).device.type == "meta"
    assert model.train().embed(ids).device.type == "meta"
    assert {"DecoderLayer", "CLIPEncoderLayer"} <= set(model._no_split_modules)
