"""Where the model looked: the recomputed weights are those that scaled_dot_product_attention mixed values with."""

import pytest
import torch
from PIL import Image

from helpers.models import IMAGE_TOKENS, enliven_all
from model.attention import rotate
from model.inference.answerer import Answerer
from model.inference.attention_map import attention_weights, heat_picture, look, watch_attention, words
from model.pictures import SampleError


def asked(text: str = "\nwhat is it?", pictures: int = 1) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}]


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_moe": True}, {"qk_norm": True, "head_dim": 16, "qkv_bias": True, "output_bias": True}],
    ids=str,
)
def test_weights_times_values_is_what_attention_gave(make_vlm, processor, picture, changes):
    model = enliven_all(make_vlm(**changes))
    inputs = processor.prompts([(asked(), [picture(1)])])
    entered, left = [], []
    hooks = [layer.self_attn.register_forward_hook(lambda *a: left.append(a[2])) for layer in model.model.layers]
    with torch.no_grad(), watch_attention(model, lambda *arguments: entered.append(arguments)):
        model(inputs["input_ids"], image_mask=inputs["image_mask"], pixel_values=inputs["pixel_values"])
    for hook in hooks:
        hook.remove()
    length = inputs["input_ids"].shape[1]
    rows = torch.tensor([0, 3, length - 1])
    assert len(entered) == len(left) == len(model.model.layers)
    for (attention, (x, rotary, *_)), output in zip(entered, left, strict=True):
        with torch.no_grad():
            weights = attention_weights(attention, x, rotary, rows)
            value = attention.v_proj(x).view(length, -1, attention.head_dim).transpose(0, 1)
            mixed = weights @ value.repeat_interleave(attention.groups, dim=0)  # [heads, rows, head_dim]
            mine = attention.o_proj(mixed.transpose(0, 1).reshape(len(rows), -1))
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
        torch.testing.assert_close(mine, output[0, rows], atol=1e-5, rtol=1e-4)
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.model.layers)


def test_look_is_a_slow_loop_over_rows(make_vlm, processor, picture):
    """Token by token, head by head, from the position before the token."""
    answerer, tokens = Answerer(make_vlm()), (300, 400, 2)
    model, pictures = answerer.model, [picture(1), picture(2)]
    looked = look(model, answerer.prompt(asked(pictures=2), pictures), tokens)
    assert looked.patches.shape == (3, 2, 2, IMAGE_TOKENS)

    inputs = processor.prompts([(asked(pictures=2), pictures)])
    prompt = inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], torch.tensor([tokens])], 1)
    mask = torch.cat([inputs["image_mask"], torch.zeros(1, 3, dtype=torch.bool)], 1)
    entered = []
    with torch.no_grad(), watch_attention(model, lambda *arguments: entered.append(arguments)):
        model(ids, image_mask=mask, pixel_values=inputs["pixel_values"])
    for layer, (attention, (x, rotary, *_)) in enumerate(entered):
        with torch.no_grad():
            query = rotate(attention.q_proj(x).view(1, -1, 4, 8).transpose(1, 2), *rotary)[0]
            key = rotate(attention.k_proj(x).view(1, -1, 2, 8).transpose(1, 2), *rotary)[0]
        for token in range(3):
            row = prompt + token - 1
            shares = torch.zeros(row + 1)
            for head in range(4):
                shares += (key[head // 2, : row + 1] @ query[head, row] / 8**0.5).softmax(0) / 4
            expected = shares[mask[0, : row + 1]].view(2, IMAGE_TOKENS)
            torch.testing.assert_close(looked.patches[token, layer].float(), expected, atol=1e-3, rtol=2e-3)


def test_maps_are_means(make_vlm, picture):
    answerer = Answerer(make_vlm())
    looked = look(answerer.model, answerer.prompt(asked(), [picture(1)]), (300, 400, 2))
    patches = looked.patches.float()
    torch.testing.assert_close(looked.maps(), patches.mean((0, 1)).view(1, 2, 2))
    torch.testing.assert_close(looked.maps(slice(1, 3), layer=1), patches[1:3, 1].mean(0).view(1, 2, 2))
    assert 0 < float(looked.maps().sum()) < 1


def test_a_typed_run_of_at_signs_is_no_picture(make_vlm, picture):
    answerer = Answerer(make_vlm())
    looked = look(answerer.model, answerer.prompt(asked("@" * 50), [picture(1)]), (300, 2))
    assert looked.patches.shape[2:] == (1, IMAGE_TOKENS)


def test_nothing_to_look_at(make_vlm, picture):
    answerer = Answerer(make_vlm())
    with pytest.raises(ValueError, match="0 pictures and 1 tokens"):
        look(answerer.model, answerer.prompt(asked(pictures=0)), (300,))
    with pytest.raises(ValueError, match="1 pictures and 0 tokens"):
        look(answerer.model, answerer.prompt(asked(), [picture(1)]), ())
    with pytest.raises(SampleError, match="holds 2 <image> but there is 1"):
        answerer.prompt(asked(pictures=2), [picture(1)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a fire engine at the top", ["a", "fire", "engine", "at", "the", "top"]),
        ("yes", ["yes"]),
        ("antidisestablishmentarianism, no", ["antidisestablishmentarianism", ",", "no"]),
        ("", []),
        ("🦤🦤", ["🦤", "🦤"]),  # several tokens each
    ],
)
def test_words_are_whole(tokenizer, text, expected):
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], 2]
    found = words(tokenizer, ids)
    assert [word for word, _ in found] == expected
    assert [tokenizer.decode(ids[tokens]).strip() for _, tokens in found] == expected
    assert all(tokens.stop <= len(ids) - 1 for _, tokens in found)


def test_chinese_words_make_up_the_answer(tokenizer):
    ids = tokenizer("红色背景上有两样东西", add_special_tokens=False)["input_ids"]
    assert "".join(word for word, _ in words(tokenizer, ids)) == "红色背景上有两样东西"


def test_heat_is_light_where_it_was_looked_at():
    heat = torch.zeros(2, 2)
    heat[0, 1] = 0.5
    drawn = heat_picture(Image.new("RGB", (40, 20), "grey"), heat, most=0.5).convert("L")
    assert drawn.size == (40, 20)
    assert drawn.getpixel((38, 1)) > drawn.getpixel((1, 1)) + 60 and drawn.getpixel((38, 18)) < drawn.getpixel((38, 1))
    heat_picture(Image.new("RGB", (4, 4)), torch.zeros(2, 2), most=0.0)  # no division by nothing
