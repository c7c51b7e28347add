"""Rows with branches: sharing what conversations begin with changes no logit and no gradient, only the work."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from dataset.batching import PackedRows, fill_rows, grouped, pack, share_prefix
from dataset.readers.opening import read_samples
from dataset.vlm_dataset import ConversationDataset, text_only
from helpers.data import make_picture, write_jsonl
from helpers.runs import losses, tiny
from model.processing import Rendered, collate_training
from trainer.data import worth_of_a_step
from trainer.stage import run_stage
from trainer.train_sft_vlm import SFT_VLM

PICTURE = "<image>\nLook at the picture and say in a word or two: "


def conversation(processor, *turns: str) -> Rendered:
    roles = ("user", "assistant")
    return processor.render([{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)])


@pytest.fixture
def talks(processor) -> list[Rendered]:
    """About one picture: single questions, one that is another's beginning, and a talk of two turns."""
    turns = [
        ("What is it?", "a cat"),
        ("What is it? @@@@", "a dog"),
        ("Where?", "left"),
        ("How many?", "one", "Where?", "top"),
    ]
    return [conversation(processor, PICTURE + first, *rest) for first, *rest in turns]


QWEN3 = {"qk_norm": True, "head_dim": 16, "qkv_bias": True, "output_bias": True}


@pytest.mark.parametrize("decoder", [{}, {"use_moe": True}, QWEN3, {**QWEN3, "use_moe": True}], ids=str)
def test_a_shared_row_gives_the_loss_and_gradients_of_its_conversations(make_vlm, processor, talks, decoder):
    model = make_vlm(**decoder, router_aux_loss_coef=0.0).train()
    pixels = [processor.pixels(make_picture(1))]
    [(_, row)] = grouped(((number, "a.png", talk) for number, talk in enumerate(talks)), 400)
    assert len(row.input_ids) < sum(len(talk.input_ids) for talk in talks)
    assert sum(row.trained) == sum(sum(talk.trained) for talk in talks)

    def gradients(batch):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    apart, wanted = gradients(collate_training([(talk, pixels) for talk in talks]))
    together, found = gradients(collate_training([(row, pixels)]))
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-6)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6)


def test_branches_do_not_see_each_other(make_vlm, processor, talks):
    """To the bit: other words in one branch change no logit outside it."""
    model, pixels = make_vlm(), [processor.pixels(make_picture(1))]
    [(_, row)] = grouped(((number, "a.png", talk) for number, talk in enumerate(talks)), 400)
    batch = collate_training([(row, pixels)])
    inputs = {name: value for name, value in batch.items() if name not in ("labels",)}
    before = model(**inputs).logits[0]
    of_second = batch["branches"][0, 0] == 2
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][0, of_second] = 77
    after = model(**inputs).logits[0]
    assert torch.equal(after[~of_second], before[~of_second])
    assert not torch.equal(after[of_second], before[of_second])


def test_rows_with_and_without_branches_share_a_batch(make_vlm, processor, talks):
    model, pixels = make_vlm(), [processor.pixels(make_picture(1))]
    alone = conversation(processor, "Hello?", "Yes. " * 40)
    row = share_prefix(talks[:2], 9)
    batch = collate_training([(row, pixels), (alone, [])])
    separate = [collate_training([one]) for one in ((row, pixels), (alone, []))]
    tokens = [int((one["labels"] != -100).sum()) for one in separate]
    losses = [model(**one).loss for one in separate]
    mean = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
    torch.testing.assert_close(model(**batch).loss, mean, rtol=0, atol=1e-6)


def test_the_text_loss_of_a_shared_row_is_that_of_its_conversations(make_vlm, talks):
    """Without their picture siblings are still apart: none sees the answer of another."""
    model = make_vlm()
    [(_, row)] = grouped(((number, "a.png", talk) for number, talk in enumerate(talks)), 400)
    torch.testing.assert_close(model(**text_only([row])).loss, model(**text_only(talks)).loss, rtol=0, atol=1e-6)


def test_branches_and_an_attention_mask_are_refused_together(make_vlm, processor, talks):
    batch = collate_training([(share_prefix(talks[:2], 9), [processor.pixels(make_picture(1))])])
    with pytest.raises(ValueError, match="leave attention_mask and the cache out"):
        make_vlm()(**batch, attention_mask=torch.ones_like(batch["input_ids"]))


def test_positions_go_on_where_the_shared_part_ends():
    row = Rendered(*map(np.array, ([1] * 9, [False] * 9, [False] * 9, [0, 0, 1, 1, 1, 2, 2, 3, 3], [0] * 7 + [3] * 2)))
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 2, 3, 0, 1]


def test_what_is_learnt_is_never_shared(processor):
    """Equal conversations keep their answers, each predicted from inside its own branch."""
    talk = conversation(processor, PICTURE + "What is it?", "a cat")
    [(_, row)] = grouped([(0, "a", talk), (1, "a", conversation(processor, PICTURE + "What is it?", "a cat"))], 400)
    assert sum(row.trained) == 2 * sum(talk.trained)
    for number, learnt in enumerate(row.trained):
        assert not learnt or row.branch[number] == row.branch[number - 1] > 0


def test_only_neighbours_about_the_same_pictures_share_a_row(processor, talks):
    def rows(pictures: str, conversations=talks, max_length: int = 400) -> list[int]:
        items = zip(range(9), pictures, conversations, strict=False)
        return [number for number, _ in grouped(items, max_length)]

    assert rows("aaaa") == [0]
    assert rows("aabb") == [0, 2]
    assert rows("abab") == [0, 1, 2, 3]
    assert rows("aaaa", max_length=len(talks[0].input_ids) + 1) == [0, 1, 2, 3]
    texts = [conversation(processor, "Hello there?", "Yes."), conversation(processor, "Hello all?", "No. " * 30)]
    assert rows("aa", texts) == [0]
    assert rows("aa", [conversation(processor, question * 9, "No.") for question in ("Why is ", "Who is ")]) == [0, 1]
    plain = [processor.render_text("a cat"), processor.render_text("a cat sat")]  # every token of these is learnt
    assert rows("aa", plain) == [0, 1]


def test_what_a_step_is_worth_is_said_and_changes_with_the_order_of_the_lines(data_folder, processor):
    lines = [
        {"image": image, "conversations": [{"role": "user", "content": PICTURE + question},
                                           {"role": "assistant", "content": "a cat"}]}
        for image in ("0_0.png", "3_0.png") for question in ("What", "Where", "Who")
    ]  # fmt: skip

    def said(order: tuple[int, ...], rows: int = 0) -> list[str]:
        path = write_jsonl(data_folder / "many.jsonl", [lines[number] for number in order])
        data = ConversationDataset(read_samples(path), processor, 400)
        return worth_of_a_step(Subset(data, range(len(data))), rows or len(data), 2)

    [shared] = said((0, 1, 2, 3, 4, 5))
    assert shared == ("2 rows hold 6 conversations, 3.0 a row: a step of 2 rows is worth about 6 conversations; in "
                      "another order of the file neighbours would share fewer rows")  # fmt: skip
    [packed] = said((0, 3, 1, 4, 2, 5), rows=3)[:1]
    assert packed == "3 rows hold 6 conversations, 2.0 a row: a step of 2 rows is worth about 4 conversations"
    [shuffled] = said((0, 3, 1, 4, 2, 5))
    assert shuffled.startswith("4 rows show a picture that rows elsewhere in the file show, too: ")
    partly, apart = said((0, 3, 4, 1, 2, 5))
    assert partly.startswith("4 rows hold 6 conversations, 1.5 a row: ") and apart.startswith("2 rows show ")
    assert said((0, 3)) == []  # each line a row, each picture once


def test_a_picture_behind_the_shared_beginning_keeps_a_row_of_its_own(data_folder, processor):
    """Shared rows bring each picture once, so none may stand in their branches."""
    talk = PICTURE + "Here is one of them, and this is what I ask: {} of them is like this one? " + PICTURE
    lines = [
        {"image": "0_0.png, 3_0.png", "conversations": [{"role": "user", "content": talk.format(question)},
                                                        {"role": "assistant", "content": "a cat"}]}
        for question in ("which", "none")
    ]  # fmt: skip
    data = ConversationDataset(read_samples(write_jsonl(data_folder / "many.jsonl", lines)), processor, 400)
    for row, pixels, _ in (data[number] for number in range(len(data))):
        assert sum(row.image_mask) == len(pixels) * processor.image_tokens == 2 * processor.image_tokens


def test_the_data_set_groups_and_stores_rows(data_folder, processor):
    lines = [
        {"image": image, "conversations": [{"role": "user", "content": PICTURE + question},
                                           {"role": "assistant", "content": "a cat"}]}
        for image in ("0_0.png", "3_0.png") for question in ("What", "Where", "Who")
    ]  # fmt: skip
    path = write_jsonl(data_folder / "many.jsonl", lines)
    data = ConversationDataset(read_samples(path), processor, 400)
    assert data.kept.tolist() == [0, 3]
    assert (data.report.conversations, data.report.rows) == (6, 2)
    wanted = [processor.render(sample.messages) for sample in read_samples(path)]
    for number in range(2):
        row, pixels, _ = data[number]
        shared = row.branch.tolist().index(1)
        assert row == share_prefix(wanted[3 * number : 3 * number + 3], shared)
        assert len(pixels) == 1 and data.lengths[number] == len(row.input_ids)


# packed side by side


@pytest.fixture
def mixed(processor, talks) -> list[tuple[Rendered, list[torch.Tensor]]]:
    """A row with branches, one picture, two pictures, none."""
    pictures = [processor.pixels(make_picture(number)) for number in range(4)]
    return [
        (share_prefix(talks[:3], 9), pictures[:1]),
        (conversation(processor, "<image>What is it?", "a bird"), pictures[1:2]),
        (conversation(processor, "<image> and <image>: which?", "the second"), pictures[2:]),
        (conversation(processor, "Hello?", "Yes."), []),
    ]


@pytest.mark.parametrize("use_moe", [False, True])
def test_a_packed_row_gives_the_loss_and_gradients_of_its_samples(make_vlm, mixed, use_moe):
    model = make_vlm(use_moe=use_moe, router_aux_loss_coef=0.0).train()
    packed = (pack([rendered for rendered, _ in mixed]), [picture for _, pictures in mixed for picture in pictures])
    found = {}
    for name, rows in (("apart", mixed), ("packed", [packed])):
        batch = collate_training(rows)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        found[name] = loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found["packed"], found["apart"], rtol=1e-4, atol=1e-6)


def test_neighbours_in_a_packed_row_do_not_see_each_other(make_vlm, processor, mixed):
    """Another picture or other words in one sample change no logit of the others, to the bit."""
    model = make_vlm()

    def logits(rows):
        batch = collate_training(
            [(pack([rendered for rendered, _ in rows]), [p for _, pictures in rows for p in pictures])]
        )
        del batch["labels"], batch["loss_positions"]
        return model(**batch).logits[0].split([len(rendered.input_ids) for rendered, _ in rows])

    before = logits(mixed)
    other_picture = [*mixed[:1], (mixed[1][0], [processor.pixels(make_picture(99))]), *mixed[2:]]
    words = mixed[2][0]
    words = replace(words, input_ids=np.where(words.image_mask, words.input_ids, 77))
    for changed, number in ((other_picture, 1), ([*mixed[:2], (words, mixed[2][1]), mixed[3]], 2)):
        after = logits(changed)
        same = [torch.equal(a, b) for a, b in zip(after, before, strict=True)]
        assert same == [place != number for place in range(4)]


def test_rows_are_filled_and_hold_every_sample_once():
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(220, 660, (4000,), generator=generator).tolist()
    pictures = [1 + number % 3 // 2 for number in range(4000)]
    rows = fill_rows(lengths, pictures, 2048, 8)
    assert sorted(number for row in rows for number in row) == list(range(4000))
    sizes = [sum(lengths[number] for number in row) for row in rows]
    assert max(sizes) <= 2048 and max(sum(pictures[number] for number in row) for row in rows) <= 8
    assert sum(sizes) > 0.99 * 2048 * len(rows)
    few = fill_rows(lengths, pictures, 2048, 2)
    assert max(sum(pictures[number] for number in row) for row in few) <= 2
    assert fill_rows(lengths, pictures, 2048, 8) == rows
    assert fill_rows([5, 4, 3, 3], [1, 1, 1, 1], 10, 2) == [
        [0, 1],
        [2, 3],
    ]  # 4 + 3 + 3 would be fuller, but for the cap
    assert fill_rows([5, 4, 3, 3], [1, 0, 0, 0], 11, 1) == [[0, 2, 3], [1]]


def test_a_sample_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match=r"--pack_tokens 20 .* a sample of 30 tokens .* make them larger"):
        PackedRows([], [10, 30], [0, 0], 20, 8)


@pytest.mark.parametrize("changes", [{"num_workers": 2}, {"cache_features": "float16", "use_moe": 1}], ids=str)
def test_a_stage_trains_on_packed_rows(changes, data_folder, tower_folder, capsys):
    config = tiny(SFT_VLM, data_folder, tower_folder, batch_size=1, pack_tokens=128, epochs=4, **changes)
    run_stage(config)
    assert losses(config)[-1] < 0.6 * losses(config)[0]
    assert "packed rows of 128 tokens" in capsys.readouterr().out
