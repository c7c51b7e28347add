"""Pictures at their places: the right patches, the right rows, and errors that name both numbers."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from helpers.models import IMAGE_TOKENS, SIZES, enliven_all, make_ids, make_labels, naive_losses
from model.config import IGNORE_INDEX, IMAGE_TOKEN_ID, VLMConfig
from model.processing import Rendered, collate_training
from model.vision_encoder import normalize_pixels


def render_pictures(processor, counts: list[int], text: str = "what is it?") -> Rendered:
    """A conversation whose user turns hold so many pictures each."""
    messages = [{"role": "user", "content": "<image>" * count + f"\n{text} {count}"} for count in counts]
    return processor.render(messages, add_generation_prompt=True)


def rows_of_0_1_2_pictures(processor, picture) -> list[tuple[Rendered, list[torch.Tensor]]]:
    rows = []
    for number, counts in enumerate(([0], [1], [1, 1])):
        pixels = [processor.pixels(picture(10 * number + k)) for k in range(sum(counts))]
        rows.append((render_pictures(processor, counts), pixels))
    return rows


def picture_inputs(batch: dict) -> dict:
    """What of a collated batch goes into the model where padding on the right needs no mask."""
    return {name: batch[name] for name in ("input_ids", "image_mask", "pixel_values") if name in batch}


@torch.no_grad()
@pytest.mark.parametrize("use_moe", [False, True])
def test_rows_with_0_1_and_2_pictures_equal_each_alone(make_vlm, processor, picture, use_moe):
    model = enliven_all(make_vlm(use_moe=use_moe))
    rows = rows_of_0_1_2_pictures(processor, picture)
    logits = model(**picture_inputs(collate_training(rows))).logits
    for number, row in enumerate(rows):
        alone = model(**picture_inputs(collate_training([row]))).logits
        torch.testing.assert_close(logits[number, : alone.shape[1]], alone[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_swapping_two_pictures_changes_the_logits(make_vlm, processor, picture):
    model = enliven_all(make_vlm())
    rendered = render_pictures(processor, [2])
    first, second = (processor.pixels(picture(seed)) for seed in (1, 2))
    one = model(**picture_inputs(collate_training([(rendered, [first, second])]))).logits[0, -1]
    other = model(**picture_inputs(collate_training([(rendered, [second, first])]))).logits[0, -1]
    assert (one - other).abs().max() > 0.01


@torch.no_grad()
def test_spans_hold_the_projected_patches_and_text_its_embeddings(make_vlm, processor, picture):
    model = enliven_all(make_vlm())
    rows = rows_of_0_1_2_pictures(processor, picture)
    batch = collate_training(rows)
    embeddings = model.embed(**picture_inputs(batch))
    expected = F.embedding(batch["input_ids"], model.model.embed_tokens.weight)
    weight, bias = model.vision_proj.vision_proj[0].weight, model.vision_proj.vision_proj[0].bias
    # https://huggingface.co/openai/clip-vit-base-patch16/blob/main/preprocessor_config.json
    mean, deviation = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    for number, (rendered, pictures) in enumerate(rows):
        places = [place for place, marked in enumerate(rendered.image_mask) if marked]
        assert len(places) == IMAGE_TOKENS * len(pictures)
        for index, pixels in enumerate(pictures):
            normal = (pixels.numpy().transpose(1, 2, 0) / 255 - mean) / deviation
            normal = torch.from_numpy(normal.transpose(2, 0, 1)).float()[None]
            patches = model.vision_encoder(normal).last_hidden_state[0, 1:]  # without the class token
            for patch in range(IMAGE_TOKENS):
                expected[number, places[index * IMAGE_TOKENS + patch]] = weight @ patches[patch] + bias
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-5)
    text = ~batch["image_mask"]
    assert torch.equal(embeddings[text], expected[text])


@torch.no_grad()
def test_pixels_may_come_normalized(make_vlm, processor, picture):
    model = enliven_all(make_vlm())
    batch = picture_inputs(collate_training(rows_of_0_1_2_pictures(processor, picture)))
    expected = model.embed(**batch)
    batch["pixel_values"] = normalize_pixels(batch["pixel_values"])
    torch.testing.assert_close(model.embed(**batch), expected)


@torch.no_grad()
def test_a_typed_at_sign_stays_text(make_vlm, processor, picture):
    model = enliven_all(make_vlm())
    rendered = processor.render([{"role": "user", "content": "@@@@<image>@@@@ me@home"}])
    batch = collate_training([(rendered, [processor.pixels(picture(0))])])
    ids, mask = batch["input_ids"], batch["image_mask"]
    typed = (ids == IMAGE_TOKEN_ID) & ~mask
    assert int(typed.sum()) == 9 and int(mask.sum()) == IMAGE_TOKENS
    embeddings = model.embed(**picture_inputs(batch))
    assert torch.equal(embeddings[typed], model.model.embed_tokens.weight[[34] * 9])
    without = model.embed(ids)  # no picture at all: every at sign is text
    assert torch.equal(without, model.model.embed_tokens(ids))


def inputs_with_placeholders(count: int, pictures: int) -> dict:
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[1, 1 : 1 + count] = True
    pixels = torch.zeros(2, pictures, 3, 32, 32, dtype=torch.uint8)
    return {"input_ids": torch.full((2, 16), IMAGE_TOKEN_ID), "image_mask": mask, "pixel_values": pixels}


@pytest.mark.parametrize(("count", "pictures"), [(3, 1), (5, 2), (8, 1), (12, 2)])
def test_wrong_placeholder_counts_name_both_numbers(make_vlm, count, pictures):
    with pytest.raises(ValueError, match=rf"row 1 has {count} placeholders and at most {pictures} pictures"):
        make_vlm()(**inputs_with_placeholders(count, pictures))


def test_placeholders_without_pictures_are_refused(make_vlm):
    inputs = inputs_with_placeholders(4, 1)
    del inputs["pixel_values"]
    with pytest.raises(ValueError, match="4 placeholders.*no pixel_values"):
        make_vlm()(**inputs)


def test_pictures_without_placeholders_are_refused(make_vlm):
    inputs = inputs_with_placeholders(4, 1)
    del inputs["image_mask"]
    with pytest.raises(ValueError, match="image_mask"):
        make_vlm()(**inputs)


@pytest.mark.parametrize("filling", [False, True])
def test_projector_takes_part_in_steps_without_pictures(make_vlm, filling):
    """Another rank may have pictures, and would wait for this one's gradient for ever."""
    model = enliven_all(make_vlm()).train()
    ids = make_ids(2, 8)
    pictures = {}
    if filling:  # pixel_values of which no row uses any
        pixels = torch.zeros(2, 1, 3, 32, 32, dtype=torch.uint8)
        pictures = {"image_mask": torch.zeros(2, 8, dtype=torch.bool), "pixel_values": pixels}
    output = model(ids, labels=ids, **pictures)
    output.loss.backward()
    for parameter in model.vision_proj.parameters():
        assert parameter.grad is not None and not parameter.grad.any()
    assert model.model.embed_tokens.weight.grad.any()
    with torch.no_grad():
        assert model.eval()(ids, labels=ids).loss.item() == output.loss.item()


def test_tower_stays_asleep(make_vlm, processor, picture):
    model = make_vlm()
    model.train()
    assert model.training and model.model.training and model.vision_proj.training
    assert not any(module.training for module in model.vision_encoder.modules())
    batch = collate_training(rows_of_0_1_2_pictures(processor, picture))
    before = {name: value.clone() for name, value in model.vision_encoder.state_dict().items()}
    model(**picture_inputs(batch), labels=batch["input_ids"]).loss.backward()
    assert all(not p.requires_grad and p.grad is None for p in model.vision_encoder.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.vision_encoder.state_dict().items())
    assert model.vision_proj.vision_proj[0].weight.grad.any()
    model.eval()
    assert not model.training


def test_image_tokens_follow_the_tower():
    config = VLMConfig(vision_config={"hidden_size": 16, "image_size": 48, "patch_size": 16}, **SIZES)
    assert (config.image_tokens, config.image_size, config.vision_hidden_size) == (9, 48, 16)


@torch.no_grad()
def test_loss_with_pictures_is_the_naive_one(make_vlm, processor, picture):
    model = enliven_all(make_vlm())
    rows = rows_of_0_1_2_pictures(processor, picture)
    batch = collate_training(rows)
    lengths = torch.tensor([[len(rendered)] for rendered, _ in rows])
    padding = torch.arange(batch["input_ids"].shape[1]) >= lengths
    labels = make_labels(batch["input_ids"]).masked_fill(padding, IGNORE_INDEX)
    losses = naive_losses(model(**picture_inputs(batch)).logits, labels)
    found = model(**picture_inputs(batch), labels=labels).loss
    assert float(found) == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("use_moe", [False, True])
def test_every_parameter_gets_a_gradient(make_vlm, processor, picture, use_moe):
    model = enliven_all(make_vlm(use_moe=use_moe)).train()
    batch = collate_training(rows_of_0_1_2_pictures(processor, picture))
    model(**picture_inputs(batch), labels=batch["input_ids"]).loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"model", "vision_proj"}
    assert [name for name, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()] == []
