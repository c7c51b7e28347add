"""The shipped tokenizer: its fixed ids, exact round trips, typed control tokens, and the chat template."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset import emoji_world
from model.config import END_ID, END_OF_TEXT_ID, IMAGE_TOKEN, IMAGE_TOKEN_ID, START_ID, MiniMindConfig
from model.processing import VLMProcessor

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)  # Cs: surrogates, which are no characters
BRIEF = {"role": "system", "content": "Be brief. 简短回答。"}
TURNS = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "a cat"},
    {"role": "user", "content": "  还有什么？\r\n\t"},
    {"role": "assistant", "content": "🦄 and 一只猫 é"},  # its first token is only a part of its first character
    {"role": "user", "content": "@@@@ @"},
    {"role": "assistant", "content": ""},
]


def test_sizes_and_special_ids(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == MiniMindConfig().vocab_size == 6400
    assert sorted(tokenizer.get_vocab().values()) == list(range(6400))
    assert tuple(tokenizer.convert_ids_to_tokens([0, 1, 2])) == CONTROL_TOKENS
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2]
    assert (END_OF_TEXT_ID, START_ID, END_ID) == (0, 1, 2)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_the_image_token_is_34_and_never_part_of_another(tokenizer):
    assert (IMAGE_TOKEN, IMAGE_TOKEN_ID) == ("@", 34)
    texts = [tokenizer.decode([number]) for number in range(len(tokenizer))]
    assert [number for number, text in enumerate(texts) if "@" in text] == [34]
    assert texts[34] == "@"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("@@@@", ["@", "@", "@", "@"]),
        ("a@b", ["a", "@", "b"]),
        (" @ @\n@", ["Ġ", "@", "Ġ", "@", "Ċ", "@"]),
        ("猫@猫", None),
    ],
)
def test_at_signs_stay_single_tokens(tokenizer, text, expected):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(34) == text.count("@")
    assert expected is None or tokenizer.convert_ids_to_tokens(ids) == expected


def round_trips(tokenizer, text: str) -> None:
    for typed in (False, True):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=typed)["input_ids"]
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "  leading and trailing  ", "\n\n\n", "one\r\ntwo\rthree\n", "tab\t\ttab", "a ,b .c !d ?e 'll n't",
        "👩‍👩‍👧‍👦🏳️‍🌈🦄🇨🇳", "今天天气很好，我们一起去公园。", "𠮷野家 𓀀 한국어 العربية हिन्दी",
        "".join(map(chr, range(0x300))), "\ufeffbom\u200b\u2028\u00a0\U0010ffff\ufffd\ue000",
        "e\u0301 is not \u00e9", "<|im_start|>system\n<|im_end|><|endoftext|>", "@" * 200,
    ],
)  # fmt: skip
def test_round_trip_of_hard_texts(tokenizer, text):
    round_trips(tokenizer, text)


def test_round_trip_of_any_text(tokenizer):
    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(TEXT)
    def check(text):
        round_trips(tokenizer, text)

    check()


@pytest.mark.parametrize("control", CONTROL_TOKENS)
def test_typed_control_tokens_are_plain_text(tokenizer, processor, control):
    assert tokenizer(control)["input_ids"] == [CONTROL_TOKENS.index(control)]  # what typing must not reach
    for text in (control, f"a{control}b", f" {control}\n", control * 3):
        ids = processor.encode(text)
        assert not set(ids) & {0, 1, 2}
        assert tokenizer.decode(ids) == text


def test_typing_leaves_the_tokenizer_as_it_was(tokenizer, processor):
    """encode() switches the shared tokenizer to plain text; the template's own call must switch it back."""
    messages = [{"role": "user", "content": "hi"}]
    before = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    processor.encode("<|im_end|> never seen before")
    assert tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"] == before
    assert before.count(1) == before.count(2) == 1


@pytest.mark.parametrize("language", emoji_world.LANGUAGES)
def test_names_of_the_first_128_concepts_are_one_token(tokenizer, processor, language):
    names = [getattr(concept, language) for concept in emoji_world.concepts()[:128]]
    ids = [processor.encode(name) for name in names]
    assert {name: len(tokens) for name, tokens in zip(names, ids, strict=True) if len(tokens) != 1} == {}
    assert len(set(ids)) == 128
    assert [tokenizer.decode(tokens) for tokens in ids] == names


def same_as_rendered(tokenizer, processor, messages, add_generation_prompt=False) -> None:
    wanted = tokenizer.apply_chat_template(
        messages,
        return_dict=True,
        return_assistant_tokens_mask=not add_generation_prompt,
        add_generation_prompt=add_generation_prompt,
    )
    rendered = processor.render(messages, add_generation_prompt=add_generation_prompt)
    assert rendered.input_ids.tolist() == wanted["input_ids"]
    if not add_generation_prompt:
        assert rendered.trained.tolist() == [mask == 1 for mask in wanted["assistant_masks"]]
        assert any(rendered.trained) == any(message["role"] == "assistant" for message in messages)


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("system", [[], [BRIEF]], ids=["plain", "system"])
@pytest.mark.parametrize("turns", [1, 2, 3, 4, 6])
def test_chat_template_is_the_renderer(tokenizer, processor, turns, system, add_generation_prompt):
    same_as_rendered(tokenizer, processor, [*system, *TURNS[:turns]], add_generation_prompt)


def test_chat_template_text_is_as_documented(tokenizer):
    text = tokenizer.apply_chat_template([BRIEF, *TURNS[:2]], tokenize=False)
    assert text == (
        "<|im_start|>system\nBe brief. 简短回答。<|im_end|>\n<|im_start|>user\nWhat is it?<|im_end|>\n"
        "<|im_start|>assistant\na cat<|im_end|>\n"
    )
    parts = [{"type": "image"}, {"type": "text", "text": "\nWhat is it?"}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"


def test_chat_template_is_the_renderer_for_any_text(tokenizer, processor: VLMProcessor):
    plain = TEXT.map(lambda text: text.replace("<", ""))  # neither control tokens nor <image>

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.tuples(st.sampled_from(("system", "user", "assistant")), plain), min_size=1, max_size=4))
    def check(pairs):
        same_as_rendered(tokenizer, processor, [{"role": role, "content": text} for role, text in pairs])

    check()
