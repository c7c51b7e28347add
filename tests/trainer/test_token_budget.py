"""--batch_tokens: a step's share in the fewest passes within a budget, on every rank alike, and the same update."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch

from helpers.runs import losses, make_order, plain_sgd, records, run_until, tiny, watched_run
from trainer import stage
from trainer.checkpoint import resume, saver
from trainer.order import Order, cut_into, fewest_passes, micro_batches, validation_passes
from trainer.train_sft_vlm import SFT_VLM


@pytest.fixture(autouse=True)
def no_probe(monkeypatch):
    """The sentences that a weight file is known by are a pass more at each save."""
    monkeypatch.setattr(saver, "probe_facts", lambda *_: {})


def fewest_by_trying(lengths: list[int], budget: int) -> int:
    """Of all ways to cut a sorted list."""
    for pieces in range(1, len(lengths) + 1):
        for cuts in itertools.combinations(range(1, len(lengths)), pieces - 1):
            edges = [0, *cuts, len(lengths)]
            if all(fits(lengths[start:end], budget) for start, end in itertools.pairwise(edges)):
                return pieces
    raise AssertionError("a row alone always fits")


def fits(lengths: list[int], budget: int) -> bool:
    return len(lengths) == 1 or len(lengths) * max(lengths) <= budget


def test_no_cut_with_fewer_runs_keeps_within_the_budget():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        lengths = sorted(torch.randint(1, 30, (7,), generator=generator).tolist())
        budget = int(torch.randint(5, 150, (), generator=generator))
        fewest = fewest_passes(lengths, budget)
        assert len(fewest) == fewest_by_trying(lengths, budget)
        for pieces in range(len(fewest), len(lengths) + 1):
            found = cut_into(pieces, lengths, budget)
            assert len(found) == pieces
            assert sum((lengths[start:end] for start, end in found), []) == lengths
            assert all(fits(lengths[start:end], budget) for start, end in found)


@pytest.mark.parametrize("resplit", [False, True])
@pytest.mark.parametrize("split", [(8, 1, 2), (2, 3, 2), (4, 2, 1), (16, 1, 3)])
def test_ranks_cut_their_shares_into_equally_many_pieces_that_hold_every_sample_once(split, resplit):
    order = make_order(*split, samples=192)  # what is left divides into all of them
    first = 0
    if resplit:
        order, first = order.resumed_at(24, 96, first_batch=4), 24
    for budget in (1, 100, 300, 10_000):
        cut = [list(micro_batches(order, rank, budget, first)) for rank in range(order.world_size)]
        steps = list(order.rows_by_rank(first))
        assert {len(own) for own in cut} == {len(steps)} == {order.total_steps - first}
        for shares, *pieces in zip(steps, *cut, strict=True):
            assert len({len(own) for own in pieces}) == 1
            for share, own in zip(shares, pieces, strict=True):
                assert sorted(sum(own, [])) == sorted(share)
                assert all(fits(order.lengths[piece].tolist(), budget) for piece in own)
        again = list(micro_batches(order, 0, budget, first + 2))
        assert again == cut[0][2:]


def test_ranks_of_which_one_could_do_with_fewer_passes_take_as_many():
    order = Order(torch.tensor([10, 10, 10, 10, 40, 40, 40, 40]), 1, 4, 2, 1, 0)
    object.__setattr__(order, "rows_by_rank", lambda first: iter([[[0, 1, 2, 3], [4, 5, 6, 7]]]))
    short, long = (next(micro_batches(order, rank, 80)) for rank in range(2))
    assert long == [[4, 5], [6, 7]] and short == [[0, 1], [2, 3]]


def test_a_budget_of_one_batch_of_the_longest_never_cuts_a_batch():
    order = make_order(8, 1, 2)
    assert all(len(step) == 1 for step in micro_batches(order, 1, 8 * int(order.lengths.max())))


def test_a_run_goes_on_with_another_budget(data_folder, tower_folder, monkeypatch):
    config = tiny(SFT_VLM, data_folder, tower_folder, save_interval=1, learning_rate=1e-4)
    unbroken = dataclasses.replace(config, save_dir=str(data_folder / "unbroken"))
    stage.run_stage(unbroken)
    run_until(config, 2, monkeypatch)
    stage.run_stage(dataclasses.replace(config, from_resume=1, batch_tokens=40, profile=1))
    assert losses(config) == pytest.approx(losses(unbroken), abs=1e-5) and len(losses(config)) == 3


@pytest.mark.parametrize("use_moe", [0, 1])
def test_cut_step_gives_the_weights_of_the_uncut_one(use_moe, data_folder, tower_folder, monkeypatch):
    monkeypatch.setattr(resume, "build_optimizer", plain_sgd)
    build_model, passes = stage.build_model, []

    def build_and_watch(*arguments):
        model = build_model(*arguments)
        model.model.register_forward_hook(lambda _, inputs, __: passes[-1].append(inputs[0].shape[:2]))
        return model

    monkeypatch.setattr("helpers.runs.ORIGINAL_BUILD_MODEL", build_and_watch)
    found = []
    for budget in (1000, 0, 60, 1):
        passes.append([])
        config = tiny(
            SFT_VLM, data_folder, tower_folder, use_moe=use_moe, batch_size=2, accumulation_steps=4, grad_clip=1e9,
            learning_rate=0.03, batch_tokens=budget, save_dir=str(data_folder / f"budget_{budget}"),
        )  # fmt: skip
        before, model = watched_run(config, monkeypatch)
        found.append((model.state_dict(), records(config)))
    uncut, uncut_records = found[0]
    assert max(float((uncut[name] - before[name]).abs().max()) for name in uncut) > 1e-3  # the steps were no trifle
    for weights, cut_records in found[1:]:
        torch.testing.assert_close(weights, uncut, rtol=0, atol=1e-6)
        assert [r["loss"] for r in cut_records] == pytest.approx([r["loss"] for r in uncut_records], abs=1e-6)
    assert len(passes[0]) == 3 < len(passes[1]) < 3 * 4 < len(passes[2]) < len(passes[3]) == 24
    for budget, shapes in ((1000, passes[0]), (2 * 64, passes[1]), (60, passes[2])):
        assert max(rows * length for rows, length in shapes) <= budget


def validated(budget: int, data_folder, tower_folder, monkeypatch) -> tuple[list[tuple[int, int]], float]:
    """Rows and longest row of each pass of a validation, and the loss that it found."""
    build_model, passes = stage.build_model, []

    def build_and_watch(*arguments):
        model = build_model(*arguments)
        model.model.register_forward_pre_hook(
            lambda part, inputs: None if part.training else passes.append(tuple(inputs[0].shape[:2]))
        )
        return model

    config = tiny(
        SFT_VLM, data_folder, tower_folder, val_path=str(data_folder / "train.jsonl"), learning_rate=1e-9,
        batch_tokens=budget, save_dir=str(data_folder / f"budget_{budget}"),
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(stage, "build_model", build_and_watch)
        stage.run_stage(config)
    return passes, next(record["val_loss"] for record in records(config) if "val_loss" in record)


def test_validation_keeps_within_the_budget_and_finds_the_same_loss(data_folder, tower_folder, monkeypatch):
    whole, expected = validated(10_000, data_folder, tower_folder, monkeypatch)
    assert len(whole) == 1
    for budget in (100, 60):
        passes, loss = validated(budget, data_folder, tower_folder, monkeypatch)
        assert max(rows * length for rows, length in passes if rows > 1) <= budget
        assert sum(rows for rows, _ in passes) == whole[0][0] and len(passes) < whole[0][0]
        assert loss == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("samples", "ranks"), [(1, 2), (5, 2), (7, 3), (24, 2), (2, 4)])
@pytest.mark.parametrize("budget", [1, 60, 100, 10_000])
def test_ranks_validate_in_equally_many_passes_that_hold_every_sample_once(samples, ranks, budget):
    lengths = torch.randint(5, 40, (samples,), generator=torch.Generator().manual_seed(samples))

    def cut(rank: int, most) -> list[list[int]]:
        return validation_passes(lengths, budget, SimpleNamespace(rank=rank, world_size=ranks, max=most))

    pieces = max(len(cut(rank, lambda own: own)) for rank in range(ranks))  # what the ranks agree on
    found = [cut(rank, lambda own: pieces) for rank in range(ranks)]
    assert {len(passes) for passes in found} == {pieces}
    assert sorted(sum((sum(passes, []) for passes in found), [])) == list(range(samples))
    assert all(fits(lengths[piece].tolist(), budget) for passes in found for piece in passes if piece)
