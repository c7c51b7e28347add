"""Messages to exact ids and labels, typed `@` against pictures, truncation, prompts, batches and pixels."""

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers.data import make_picture
from helpers.models import IMAGE_SIZE, IMAGE_TOKENS
from model.config import IGNORE_INDEX, VLMConfig
from model.pictures import SampleError
from model.processing import Rendered, VLMProcessor, collate_training, content_parts
from model.tokenizer_files import load_tokenizer

PICTURE = {"type": "image"}
OPENING, CLOSING = "<|im_start|> us er Ċ", "<|im_end|> Ċ"
ANSWERING = "<|im_start|> ass ist ant Ċ"
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def user(content) -> dict:
    return {"role": "user", "content": content}


def assistant(content) -> dict:
    return {"role": "assistant", "content": content}


def written(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


@functools.cache
def vocabulary() -> dict[str, int]:
    return load_tokenizer().get_vocab()


def check_rows(rendered: Rendered, pieces: list[tuple[str, str]]) -> None:
    """pieces: (kind, tokens as written in the vocabulary); kind is "" for context, "learnt" or "image"."""
    ids = [(kind, vocabulary()[token]) for kind, tokens in pieces for token in tokens.split()]
    assert rendered.input_ids.tolist() == [number for _, number in ids]
    assert rendered.labels.tolist() == [number if kind == "learnt" else IGNORE_INDEX for kind, number in ids]
    assert rendered.trained.tolist() == [kind == "learnt" for kind, _ in ids]
    assert rendered.image_mask.tolist() == [kind == "image" for kind, _ in ids]


# Exact rows


def test_one_turn(processor):
    rendered = processor.render([user("<image>\nWhat is it?"), assistant("a cat")])
    check_rows(
        rendered,
        [
            ("", OPENING), ("image", "@ @ @ @"), ("", "Ċ What Ġis Ġit ?"), ("", CLOSING),
            ("", ANSWERING), ("learnt", "a Ġcat <|im_end|>"), ("", "Ċ"),
        ],
    )  # fmt: skip
    assert rendered.labels.tolist() == [-100] * 20 + rendered.input_ids[20:23].tolist() + [-100]
    assert rendered.input_ids[22] == 2


def test_several_turns_after_a_system_prompt(processor):
    messages = [
        {"role": "system", "content": "Be brief."}, user("What is it?"), assistant("a cat"), user("And now?"),
        assistant("No."),
    ]  # fmt: skip
    pieces = [
        ("", "<|im_start|> sy st em Ċ Be Ġbrief . <|im_end|> Ċ"), ("", f"{OPENING} What Ġis Ġit ? {CLOSING}"),
        ("", ANSWERING), ("learnt", "a Ġcat <|im_end|>"), ("", "Ċ"), ("", f"{OPENING} And Ġnow ? {CLOSING}"),
        ("", ANSWERING), ("learnt", "No . <|im_end|>"), ("", "Ċ"),
    ]  # fmt: skip
    check_rows(processor.render(messages), pieces)
    check_rows(processor.render(messages, add_generation_prompt=True), [*pieces, ("", ANSWERING)])


def test_a_picture_in_the_second_turn(processor):
    messages = [user("What is it?"), assistant("a cat"), user("<image>And now?<image>"), assistant("No.")]
    check_rows(
        processor.render(messages),
        [
            ("", f"{OPENING} What Ġis Ġit ? {CLOSING} {ANSWERING}"), ("learnt", "a Ġcat <|im_end|>"),
            ("", f"Ċ {OPENING}"), ("image", "@ @ @ @"), ("", "And Ġnow ?"), ("image", "@ @ @ @"), ("", CLOSING),
            ("", ANSWERING), ("learnt", "No . <|im_end|>"), ("", "Ċ"),
        ],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("max_length", "learnt", "after"),
    [(20, "a Ġcat <|im_end|>", "Ċ"), (19, "a Ġcat <|im_end|>", ""), (18, "a Ġcat", ""), (17, "a", ""), (16, "", "")],
)
def test_an_answer_cut_short_loses_its_end(processor, max_length, learnt, after):
    rendered = processor.render([user("<image> it"), assistant("a cat")]).truncated(max_length)
    before = [("", OPENING), ("image", "@ @ @ @"), ("", f"Ġit {CLOSING} {ANSWERING}")]
    check_rows(rendered, [*before, ("learnt", learnt), ("", after)])
    assert (2 in rendered.labels) == (max_length >= 19)  # what is cut never learns to end


def test_a_picture_in_an_answer_is_not_learnt(processor):
    check_rows(
        processor.render([assistant("a<image> cat")]),
        [("", ANSWERING), ("learnt", "a"), ("image", "@ @ @ @"), ("learnt", "Ġcat <|im_end|>"), ("", "Ċ")],
    )


def test_at_signs_in_an_answer_are_learnt(processor):
    check_rows(processor.render([assistant("a@@")]), [("", ANSWERING), ("learnt", "a @ @ <|im_end|>"), ("", "Ċ")])


def test_plain_text_is_learnt_whole(processor):
    check_rows(processor.render_text("a cat"), [("", "<|im_start|>"), ("learnt", "a Ġcat <|im_end|>")])
    check_rows(processor.render_text("a cat").truncated(2), [("", "<|im_start|>"), ("learnt", "a")])
    check_rows(
        processor.render_text("<image>@"), [("", "<|im_start|>"), ("learnt", "< im age > @ <|im_end|>")]
    )  # plain text has no pictures


def test_nothing_said(processor):
    assert len(processor.render([])) == 0
    assert processor.render([]) == Rendered.of([])
    check_rows(processor.render([], add_generation_prompt=True), [("", ANSWERING)])
    check_rows(
        processor.render([user(""), assistant("")]),
        [("", f"{OPENING} {CLOSING} {ANSWERING}"), ("learnt", "<|im_end|>"), ("", "Ċ")],
    )


# Typed @ against pictures


@pytest.mark.parametrize("count", [1, 195, 196, 197, 500])
@pytest.mark.parametrize("image_tokens", [196, IMAGE_TOKENS, 1])
@pytest.mark.parametrize("layout", ["t", "ti", "it", "iti", "itti", "titit", "ii"])
def test_a_typed_run_is_never_a_picture(tokenizer, image_tokens, count, layout):
    processor = VLMProcessor(tokenizer, image_tokens, IMAGE_SIZE)
    run = "@" * count
    parts = [PICTURE if letter == "i" else {"type": "text", "text": run} for letter in layout]
    wanted, place = [], 4  # after the four tokens of the header
    for letter in layout:
        size = image_tokens if letter == "i" else count
        wanted += range(place, place + size) if letter == "i" else []
        place += size
    for content in (parts, "".join("<image>" if letter == "i" else run for letter in layout)):
        rendered = processor.render([user(content)])
        assert [number for number, image in enumerate(rendered.image_mask) if image] == wanted
        assert rendered.input_ids.tolist() == [1, 328, 260, 201] + [34] * (place - 4) + [2, 201]
        assert sum(rendered.image_mask) == layout.count("i") * image_tokens


PIECES = st.one_of(
    st.none(),  # a picture
    st.sampled_from((1, 3, 4, 5, 8, 195, 196, 197)).map(lambda count: "@" * count),
    st.sampled_from((*CONTROL_TOKENS, "<image>", "<", "image>", "\n", " ")),
    st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=6),
)
CONVERSATIONS = st.lists(
    st.tuples(st.sampled_from(("system", "user", "assistant")), st.lists(PIECES, max_size=6)), min_size=1, max_size=3
)


def as_messages(conversation) -> list[dict]:
    return [
        {"role": role, "content": [PICTURE if piece is None else {"type": "text", "text": piece} for piece in pieces]}
        for role, pieces in conversation
    ]


def test_any_mixture_of_text_and_pictures(tokenizer):
    """Read back from the ids: between pictures stands exactly what was written, and pictures stand where they were."""

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(CONVERSATIONS, st.sampled_from((1, IMAGE_TOKENS, 196)))
    def check(conversation, image_tokens):
        rendered = VLMProcessor(tokenizer, image_tokens, IMAGE_SIZE).render(as_messages(conversation))
        pieces = []
        for role, content in conversation:
            pieces += [f"<|im_start|>{role}\n", *content, "<|im_end|>\n"]
        wanted = [
            (image, sum(1 for _ in group) * image_tokens if image else "".join(group))
            for image, group in itertools.groupby(pieces, key=lambda piece: piece is None)
        ]
        found = []
        for image, group in itertools.groupby(range(len(rendered.input_ids)), key=lambda n: rendered.image_mask[n]):
            ids = [rendered.input_ids[number] for number in group]
            found.append((image, len(ids) if image else tokenizer.decode(ids)))
            assert not image or set(ids) == {34}
        assert found == wanted
        ids = rendered.input_ids.tolist()
        assert ids.count(1) == ids.count(2) == len(conversation)
        assert ids.count(0) == 0

    check()


def test_any_length_keeps_pictures_whole(processor):
    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(CONVERSATIONS)
    def check(conversation):
        messages = as_messages(conversation)
        full = processor.render(messages)
        end_of_pictures = max((number + 1 for number, image in enumerate(full.image_mask) if image), default=0)
        lengths = {0, 1, len(full.input_ids) // 2, len(full.input_ids), len(full.input_ids) + 1}
        for max_length in sorted(lengths | set(range(max(0, end_of_pictures - 9), end_of_pictures + 3))):
            if max_length < end_of_pictures:
                with pytest.raises(SampleError, match=f"token {end_of_pictures} .* above {max_length}$"):
                    full.truncated(max_length)
                continue
            cut = full.truncated(max_length)
            assert np.array_equal(cut.input_ids, full.input_ids[:max_length])
            assert np.array_equal(cut.trained, full.trained[:max_length])
            assert np.array_equal(cut.image_mask, full.image_mask[:max_length])
            assert sum(cut.image_mask) == sum(full.image_mask)

    check()


def test_the_tag_is_a_picture_in_a_string_and_text_in_a_part(processor):
    assert content_parts("a<image><image>\nb") == [("text", "a"), ("image", ""), ("image", ""), ("text", "\nb")]
    assert content_parts("") == []
    assert content_parts(written("<image>")) == [("text", "<image>")]
    literal = processor.render([user(written("<image>"))])
    assert not any(literal.image_mask)
    check_rows(literal, [("", f"{OPENING} < im age > {CLOSING}")])
    for near in ("< image>", "<Image>", "<image", "<|image|>", "&lt;image>"):
        assert not any(processor.render([user(near)]).image_mask)


# What is refused


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "x"}, {"role": None, "content": "x"}, {"content": "x"}, "user", None, 3,
        {"role": ["user"], "content": "x"}, {"role": "User", "content": "x"}, {"from": "human", "value": "x"},
    ],
)  # fmt: skip
def test_roles_that_are_refused(processor, message):
    with pytest.raises(SampleError, match="needs a role, one of system, user, assistant"):
        processor.render([user("hello"), message])


@pytest.mark.parametrize(
    "content",
    [
        None, 3, {"type": "text", "text": "x"}, ["x"], [None], b"x", ("x",), [PICTURE, "x"],
        [{"type": "audio", "text": "x"}], [{"type": "image_url", "image_url": "x"}], [{"text": "x"}],
        [{"type": "text", "text": None}], [{"type": "text", "text": 3}], [{"type": ["text"], "text": "x"}],
    ],
)  # fmt: skip
def test_contents_that_are_refused(processor, content):
    with pytest.raises(SampleError, match="content"):
        processor.render([user(content)])


def test_a_text_part_without_text_is_refused(processor):
    """Otherwise a mistyped key loses what the person wrote without a word."""
    with pytest.raises(SampleError, match="content"):
        processor.render([user([{"type": "text", "content": "What is it?"}])])


def test_a_message_without_content_is_refused(processor):
    with pytest.raises(SampleError, match="content is None"):
        processor.render([{"role": "user"}])


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\ud83d\ude00"])
def test_lone_surrogates_are_refused(processor, text):
    for render in (processor.render_text, lambda text: processor.render([user(text)])):
        with pytest.raises(SampleError, match="surrogate"):
            render(text)


def test_a_row_is_cut_and_joined_in_all_columns(processor):
    row = processor.render([user("<image> it"), assistant("a cat")])
    assert Rendered.concatenate([row[:7], row[7:]]) == row != row[:7]
    words = row[~row.image_mask]
    assert len(words) == len(row) - IMAGE_TOKENS and not words.image_mask.any()
    assert words.trained.sum() == row.trained.sum() and words != row[: len(words)]


# Prompts and batches


def test_prompts_are_padded_on_the_left(processor):
    first, second = make_picture(1), make_picture(2)
    batch = processor.prompts([([user("<image><image>it")], [first, second]), ([user("@ it")], [])])
    header = [1, 328, 260, 201]
    answering = [2, 201, 1, 969, 723, 443, 201]
    it, spaced = processor.encode("it"), processor.encode(" it")
    assert len(it) == len(spaced) == 1
    long, short = header + [34] * 8 + [*it] + answering, header + [34] + [*spaced] + answering
    assert batch["input_ids"].tolist() == [long, [0] * 7 + short]
    assert batch["attention_mask"].tolist() == [[1] * 20, [0] * 7 + [1] * 13]
    assert batch["image_mask"].tolist() == [[False] * 4 + [True] * 8 + [False] * 8, [False] * 20]
    assert {name: values.dtype for name, values in batch.items()} == {
        "input_ids": torch.int64, "attention_mask": torch.int64, "image_mask": torch.bool, "pixel_values": torch.uint8,
    }  # fmt: skip
    assert batch["pixel_values"].shape == (2, 2, 3, 32, 32)
    for number, picture in enumerate((first, second)):  # of the processor's size, so they are as they were
        assert np.array_equal(batch["pixel_values"][0, number].permute(1, 2, 0).numpy(), np.asarray(picture))
    assert not batch["pixel_values"][1].any()


def test_prompts_without_pictures_have_no_pixels(processor):
    assert sorted(processor.prompts([([user("it")], [])])) == ["attention_mask", "image_mask", "input_ids"]


@pytest.mark.parametrize(("tags", "pictures"), [(1, 0), (0, 1), (2, 1), (1, 3)])
def test_prompts_count_pictures(processor, tags, pictures):
    content = "<image>" * tags + "@" * IMAGE_TOKENS + "What?"
    there = "is 1 picture$" if pictures == 1 else f"are {pictures} pictures$"
    with pytest.raises(SampleError, match=f"holds {tags} <image> but there {there}"):
        processor.prompts([([user(content)], [make_picture(n) for n in range(pictures)])])


def test_collate_shapes_with_different_numbers_of_pictures(processor):
    rows = []
    for count in (0, 2, 1, 3):
        messages = [user("<image>" * count + "What?"), assistant("a cat" * count)]
        rows.append(
            (processor.render(messages), [processor.pixels(make_picture(10 * count + k)) for k in range(count)])
        )
    batch = collate_training(rows)
    assert batch.pop("pictures_a_row") == [0, 2, 1, 3]
    longest = max(len(rendered.input_ids) for rendered, _ in rows)
    assert {name: tuple(values.shape) for name, values in batch.items()} == {
        "input_ids": (4, longest), "labels": (4, longest), "image_mask": (4, longest),
        "loss_positions": (4, 7), "pixel_values": (4, 3, 3, 32, 32),
    }  # fmt: skip
    for number, (rendered, pictures) in enumerate(rows):
        size = len(rendered.input_ids)
        rest = longest - size
        assert batch["input_ids"][number].tolist() == rendered.input_ids.tolist() + [0] * rest
        assert batch["labels"][number].tolist() == rendered.labels.tolist() + [-100] * rest
        assert batch["image_mask"][number].tolist() == rendered.image_mask.tolist() + [False] * rest
        assert batch["image_mask"][number].sum() == 4 * len(pictures)
        for index in range(3):
            wanted = pictures[index] if index < len(pictures) else torch.zeros(3, 32, 32)
            assert torch.equal(batch["pixel_values"][number, index], wanted.to(torch.uint8))


def test_collate_without_any_picture(processor):
    batch = collate_training([(processor.render([user("it")]), []), (processor.render_text("a"), [])])
    assert "pixel_values" not in batch
    assert not batch["image_mask"].any()


def test_the_processor_fits_its_model(tokenizer):
    whole = VLMProcessor.for_config(VLMConfig(), tokenizer)
    assert (whole.image_tokens, whole.image_size) == (196, 224)
    rendered = whole.render([user("<image>")])
    assert sum(rendered.image_mask) == 196
    assert whole.pixels(make_picture(0)).shape == (3, 224, 224)


# Pixels


def test_pixels_show_the_whole_picture(processor):
    wide = Image.new("RGB", (640, 40), (255, 0, 0))
    wide.paste((0, 0, 255), (320, 0, 640, 40))
    pixels = processor.pixels(wide)
    assert (pixels.shape, pixels.dtype, pixels.is_contiguous()) == ((3, 32, 32), torch.uint8, True)
    assert (pixels == pixels[:, :1]).all()  # no row is a border
    columns = pixels[:, 0].T.tolist()
    assert columns[:15] == [[255, 0, 0]] * 15
    assert columns[17:] == [[0, 0, 255]] * 15


def test_pixels_of_a_tall_picture(processor):
    tall = Image.new("RGB", (40, 640), (255, 0, 0))
    tall.paste((0, 0, 255), (0, 320, 40, 640))
    rows = processor.pixels(tall)[:, :, 0].T.tolist()
    assert rows[:15] == [[255, 0, 0]] * 15
    assert rows[17:] == [[0, 0, 255]] * 15


def test_one_pixel_fills_the_square(processor):
    assert (processor.pixels(Image.new("RGB", (1, 1), (1, 2, 3))) == torch.tensor([1, 2, 3])[:, None, None]).all()
