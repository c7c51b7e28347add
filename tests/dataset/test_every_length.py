"""Conversations made by chance at every --max_seq_len: a picture is whole or its sample is dropped, and counted."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import CLIPVisionConfig, CLIPVisionModel

from dataset.check import DataReport
from dataset.samples import DataError, Sample
from dataset.vlm_dataset import ConversationDataset
from helpers.data import make_picture
from helpers.models import SIZES, VISION_SIZES
from helpers.zoo import lenient
from model.processing import Rendered, VLMProcessor, collate_training
from model.weights import build_vlm

LENGTHS = range(150, 701)
IMAGE_TOKENS, IMAGE_SIZE, PATCH = 196, 28, 2  # as many tokens as CLIP-ViT-B/16's, of fewer pixels
PICTURE, MOST_PICTURES = "<image>", 4
WORDS = ["a cat ", "What", "猫", "螃", "@", "@@@@", " ", "\n", "<|im_end|>", "😀", "long " * 20, "very long " * 60]
CONTENT = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5)
CHANCE = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck),
          "phases": [Phase.generate]}  # fmt: skip  # a failure at 551 lengths would be shrunk for minutes


@st.composite
def conversations(draw) -> list[dict]:
    """One to three questions and answers, 0 to 4 pictures anywhere in them, in answers too."""
    contents = draw(st.lists(CONTENT, min_size=2, max_size=6).map(lambda drawn: drawn[: len(drawn) // 2 * 2]))
    for _ in range(draw(st.integers(0, MOST_PICTURES))):
        content = draw(st.sampled_from(contents))
        content.insert(draw(st.integers(0, len(content))), PICTURE)
    roles = ("user", "assistant") * 3
    return [{"role": role, "content": "".join(words)} for role, words in zip(roles, contents, strict=False)]


# A file whose neighbours often begin alike: another question at the end, or another answer.
FILES = st.lists(st.tuples(conversations(), st.integers(0, 2)), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{number}.png" for number in range(MOST_PICTURES)]
    for number, path in enumerate(paths):
        make_picture(number, 8).save(path)
    return paths


@pytest.fixture(scope="module")
def processor(tokenizer) -> VLMProcessor:
    return VLMProcessor(tokenizer, IMAGE_TOKENS, IMAGE_SIZE)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder, sizes = tmp_path_factory.mktemp("tower"), {"image_size": IMAGE_SIZE, "patch_size": PATCH}
    torch.manual_seed(1)
    CLIPVisionModel(CLIPVisionConfig(**{**VISION_SIZES, **sizes})).save_pretrained(folder)
    return build_vlm(SIZES, folder).eval()


def samples_of(file: list[tuple[list[dict], int]], pictures: list[Path]) -> list[Sample]:
    conversations = []
    for turns, more in file:
        *start, question, answer = turns
        other_question = [*start, {**question, "content": question["content"] + " or?"}, answer]
        other_answer = [*start, question, {**answer, "content": "no" + answer["content"]}]
        conversations += [turns, other_question, other_answer][: 1 + more]
    tags = [sum(turn["content"].count(PICTURE) for turn in turns) for turns in conversations]
    return [
        Sample(f"train.jsonl:{number}", turns, tuple(pictures[:count]))
        for number, (turns, count) in enumerate(zip(conversations, tags, strict=True), 1)
    ]


def expected(whole: Rendered, max_seq_len: int) -> bool:
    """Whether a sample can be used: each picture within the length, and a token to learn that is not the first."""
    ends = np.flatnonzero(whole.image_mask)[IMAGE_TOKENS - 1 :: IMAGE_TOKENS] + 1
    return all(ends <= max_seq_len) and bool(whole.trained[1:max_seq_len].any())


def conversations_in(row: Rendered) -> list[Rendered]:
    """Each as it stands alone: the shared beginning, and a branch."""
    return [row[np.isin(row.branch, (0, branch))] for branch in range(1, row.branch.max() + 1)] or [row]


def check_length(samples: list[Sample], wholes: list[Rendered], processor: VLMProcessor, max_seq_len: int):
    """The data set at a length, after every promise was held to it; None where no sample is left."""
    usable = [number for number, whole in enumerate(wholes) if expected(whole, max_seq_len)]
    quarantine = lenient()
    if not usable:
        with pytest.raises(DataError, match=f"no sample of {len(samples)} can be used"):
            ConversationDataset(samples, processor, max_seq_len, quarantine)
        assert quarantine.dropped == len(samples) and not quarantine.bad
        return None
    data = ConversationDataset(samples, processor, max_seq_len, quarantine)
    report: DataReport = data.report
    assert not report.bad and report.conversations == len(usable)
    assert quarantine.dropped == len(report.dropped) == len(samples) - len(usable)
    assert {one.where for one in report.dropped} == {s.where for n, s in enumerate(samples) if n not in usable}
    rows = [data.rendered(number) for number in range(len(data))]
    found = [conversation for row in rows for conversation in conversations_in(row)]
    assert max(map(len, rows)) <= max_seq_len
    for row, pictures in zip(rows, data.views_a_row.tolist(), strict=True):
        assert row.image_mask.sum() == pictures * IMAGE_TOKENS
    for conversation, number in zip(found, usable, strict=True):
        cut = wholes[number][:max_seq_len]
        assert np.array_equal(conversation.input_ids, cut.input_ids) and np.array_equal(conversation.labels, cut.labels)
        assert np.array_equal(conversation.image_mask, cut.image_mask)
    return data


def test_every_length(pictures, processor):
    """All lengths of 150 to 700, for each of the files."""
    seen = {"cut": 0, "dropped": 0, "shared": 0, "pictures": set()}

    @settings(max_examples=8, **CHANCE)
    @given(FILES)
    def check(file):
        samples = samples_of(file, pictures)
        wholes = [processor.render(sample.messages) for sample in samples]
        for max_seq_len in LENGTHS:
            data = check_length(samples, wholes, processor, max_seq_len)
            seen["dropped"] += len(samples) - (data.report.conversations if data else 0)
            seen["cut"] += any(len(whole) > max_seq_len and expected(whole, max_seq_len) for whole in wholes)
            seen["shared"] += bool(data) and data.report.rows < data.report.conversations
        seen["pictures"].update(len(sample.pictures) for sample in samples)

    check()
    assert min(seen["cut"], seen["dropped"], seen["shared"]) > 300 and seen["pictures"] == set(range(5)), seen


def test_the_forward_pass_at_lengths_by_chance(pictures, processor, vlm):
    """Where a file has anything left, its rows go through the model, and each row's loss is finite."""
    passes = []

    @settings(max_examples=40, **CHANCE)
    @given(FILES, st.lists(st.integers(LENGTHS[0], LENGTHS[-1]), min_size=2, max_size=2))
    def check(file, lengths):
        samples = samples_of(file, pictures)
        wholes = [processor.render(sample.messages) for sample in samples]
        ends = [int(np.flatnonzero(whole.image_mask)[-1]) + 1 for whole in wholes if whole.image_mask.any()]
        for max_seq_len in [*lengths, *(end + 1 for end in ends[:1])]:  # and where the room just holds a picture
            data = check_length(samples, wholes, processor, max_seq_len)
            if data is not None:
                with torch.no_grad():
                    loss = vlm(**collate_training([data[number][:2] for number in range(len(data))])).loss
                assert torch.isfinite(loss) and loss > 0
                passes.append(max_seq_len)

    check()
    assert len(passes) > 40


def test_a_picture_that_ends_where_the_room_does(pictures, processor, vlm):
    """With room for its last token it is whole, with one less its sample is dropped; wherever, and however many."""
    for count in range(1, MOST_PICTURES + 1):
        for before in range(0, 40, 13):
            question = "cat " * before + PICTURE * count
            turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "a cat"},
                     {"role": "user", "content": question}, {"role": "assistant", "content": "a dog"}]  # fmt: skip
            sample = Sample("train.jsonl:1", turns, tuple(pictures[:count]))
            end = int(np.flatnonzero(processor.render(turns).image_mask)[-1]) + 1
            data = ConversationDataset([sample], processor, end, lenient())
            assert len(data.rendered(0)) == end and data.rendered(0).image_mask[-1]
            with torch.no_grad():
                assert torch.isfinite(vlm(**collate_training([data[0][:2]])).loss)
            with pytest.raises(DataError, match=f"its last picture ends at token {end} and would be cut"):
                ConversationDataset([sample], processor, end - 1, lenient())
