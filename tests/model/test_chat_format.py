"""Chat templates of other bases, taken apart: the renderer's ids are what template and tokenizer would give."""

import pytest
from transformers import AutoTokenizer

from helpers.foreign_base import FAMILIES, conversations, write_base
from model.chat_format import ChatFormat
from model.messages import UserError
from model.pictures import SampleError
from model.processing import VLMProcessor
from model.tokenizer_files import (
    in_our_form,
    load_tokenizer,
    picture_token,
    read_tokenizer,
    special_ids,
    tokenizer_from_text,
    tokenizer_text,
)

TALKS = list(conversations())
THOUGHT = "<think>\n\n</think>\n\n"  # that Qwen3's template puts before the last answer alone


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {family: write_base(folder / family, family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def published(folder):
    return AutoTokenizer.from_pretrained(folder)


def written(tokenizer, talk: list[dict], **options) -> str:
    return tokenizer.apply_chat_template(
        talk, tokenize=False, date_string="26 Jul 2024", enable_thinking=False, **options
    )


@pytest.mark.parametrize("talk", range(len(TALKS)))
def test_ids_are_those_of_template_and_tokenizer(bases, family, talk):
    theirs, talk = published(bases[family]), TALKS[talk]
    asks = talk[-1]["role"] == "user"
    rendered = VLMProcessor(read_tokenizer(bases[family])).render(talk, add_generation_prompt=asks)
    text = written(theirs, talk, add_generation_prompt=asks)
    if family == "qwen3":  # every answer is learnt as it will be asked for
        answers = "<|im_start|>assistant\n"
        text = text.replace(THOUGHT, "").replace(answers, answers + THOUGHT)
    assert rendered.input_ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"]


def test_what_is_learnt_are_the_answers_and_what_ends_them(bases, family):
    processor = VLMProcessor(read_tokenizer(bases[family]))
    rendered = processor.render(TALKS[4])
    answers = [message["content"] for message in TALKS[4] if message["role"] == "assistant"]
    expected = [id for answer in answers for id in (*processor.encode(answer), *processor.end.ids)]
    assert rendered.input_ids[rendered.trained].tolist() == expected
    assert processor.end_id == published(bases[family]).eos_token_id
    assert special_ids(processor.tokenizer)["eos_token_id"] == processor.end_id


def test_the_template_that_travels_writes_the_same_and_places_pictures(bases, family):
    tokenizer = read_tokenizer(bases[family])
    assert ChatFormat.of(tokenizer) == ChatFormat.of(published(bases[family]))
    parts = [{"type": "image"}, {"type": "text", "text": "\nWhat?"}]
    text = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert "<image>\nWhat?" in text
    marked = tokenizer.apply_chat_template(TALKS[3], return_dict=True, return_assistant_tokens_mask=True)
    rendered = VLMProcessor(tokenizer).render(TALKS[3])
    assert marked["input_ids"] == rendered.input_ids.tolist()
    assert marked["assistant_masks"] == rendered.trained.astype(int).tolist()


def test_a_tokenizer_goes_through_a_text_and_comes_out_the_same(bases, family):
    tokenizer = read_tokenizer(bases[family])
    again = tokenizer_from_text(tokenizer_text(tokenizer))
    assert again.get_vocab() == tokenizer.get_vocab() and again.special_tokens_map == tokenizer.special_tokens_map
    assert VLMProcessor(again).fingerprint() == VLMProcessor(tokenizer).fingerprint()
    assert again.decode(again("Two cats, 猫.")["input_ids"], skip_special_tokens=True) == "Two cats, 猫."


def test_the_shipped_tokenizer_through_a_text_has_the_same_fingerprint(processor):
    again = tokenizer_from_text(tokenizer_text(load_tokenizer()))
    assert VLMProcessor(again, processor.image_tokens).fingerprint() == processor.fingerprint()


def test_the_placeholder_is_any_token_that_can_be_had(bases):
    taken = {family: picture_token(read_tokenizer(bases[family]), 448) for family in FAMILIES}
    vocabularies = {family: read_tokenizer(bases[family]).get_vocab() for family in FAMILIES}
    assert taken["qwen3"] == vocabularies["qwen3"]["<|image_pad|>"]
    assert taken["smollm2"] == vocabularies["smollm2"]["@"]
    words = vocabularies["smollm2"]
    without = load_without(read_tokenizer(bases["smollm2"]), "@")
    assert picture_token(without, 448) == max(words.values()) + 1  # no text uses it
    assert picture_token(without, max(words.values()) + 1) == max(words.values()) + 1  # the embeddings grow


def load_without(tokenizer, text: str):
    known = {token: id for token, id in tokenizer.get_vocab().items() if token != text}
    tokenizer.get_vocab = lambda: known
    return tokenizer


def test_control_tokens_that_a_person_types_are_text(bases, family):
    processor = VLMProcessor(read_tokenizer(bases[family]))
    typed = processor.render([{"role": "user", "content": f"a {FAMILIES[family].eos} b"}])
    plain = processor.render([{"role": "user", "content": "a b"}])
    assert (typed.input_ids == processor.end_id).sum() == (plain.input_ids == processor.end_id).sum()


@pytest.mark.parametrize(("template", "says"), [
    ("{{ raise_exception('no') }}", "cannot be taken apart"),
    ("{% for m in messages %}{{ (loop.index | string) + m['content'] + eos_token }}{% endfor %}", "taken apart"),
    ("{{ messages[-1]['content'] + eos_token }}", "cannot be taken apart"),
    ("{% for m in messages %}{{ m['role'] + m['content'] + '.' }}{% endfor %}", "ends with none of its control tokens"),
])  # fmt: skip
def test_templates_that_cannot_be_followed_are_refused(bases, template, says):
    tokenizer = published(bases["smollm2"])
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=says):
        in_our_form(tokenizer)


@pytest.mark.parametrize("family", ["smollm2", "tinyllama"])
def test_a_base_without_a_template_gets_one(bases, family):
    tokenizer = published(bases[family])
    tokenizer.chat_template = None
    processor = VLMProcessor(in_our_form(tokenizer))
    text = processor.tokenizer.decode(processor.render(TALKS[1]).input_ids)
    words = ("<|im_start|>user", "<|im_end|>") if family == "smollm2" else ("User:", "Assistant:", "</s>")
    assert all(word in text for word in words)


def test_a_template_without_system_messages_refuses_one(bases):
    tokenizer = published(bases["tinyllama"])
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
        "{% elif m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    processor = VLMProcessor(in_our_form(tokenizer))
    processor.render(TALKS[3])
    with pytest.raises(SampleError, match="role is 'system', which this base's chat template does not write"):
        processor.render(TALKS[4])


def test_a_folder_without_a_tokenizer_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer.json: put the base's own there"):
        read_tokenizer(tmp_path)
