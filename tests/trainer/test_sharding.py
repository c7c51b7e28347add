"""--shard 1: two ranks with half of the model each learn what two whole ones learn, and save the same files."""

import dataclasses
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch

from helpers.faults import outcome, run_ranks, said_by, small_run
from helpers.runs import records, tiny, weights_of
from trainer import loop, stage
from trainer.checkpoint import resume
from trainer.checkpoint.files import checkpoints_in
from trainer.config import StageConfig
from trainer.guard import finite
from trainer.train_pretrain_vlm import PRETRAIN_VLM

STOPPED = 128 + signal.SIGTERM
LAST = 11  # step


def run(folder: Path, name: str, **changes) -> StageConfig:
    """11 steps of two ranks, slow enough that rounding stays small; one validation sample, so one rank has none."""
    settings = {"learning_rate": 1e-3, "batch_size": 1, "save_interval": 4, "val_samples": 1}
    return small_run(folder, save_dir=str(folder / name / "out"), **{**settings, **changes})


def on_two_ranks(config: StageConfig, at_step=lambda rank, step: None) -> list[int]:
    Path(config.save_dir).parent.mkdir(exist_ok=True)
    return run_ranks(config, 2, at_step)


def leave_after(step: int):
    return lambda own, now: os.kill(os.getpid(), signal.SIGTERM) if (own, now) == (1, step) else None


def assert_alike(first: StageConfig, second: StageConfig) -> None:
    """Logged values and weights, but for rounding."""
    ours, theirs = records(first), records(second)
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for value in {"loss", "val_loss", "aux_loss"} & other.keys():
            assert one[value] == pytest.approx(other[value], abs=1e-5)
        if "grad_norm" in other:  # float32 adds up its many squares in another order
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    torch.testing.assert_close(weights_of(first), weights_of(second), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture(scope="module")
def whole(folder) -> StageConfig:
    config = run(folder, "whole")
    assert on_two_ranks(config) == [0, 0]
    return config


@pytest.fixture(scope="module")
def in_parts(folder) -> StageConfig:
    config = run(folder, "parts", shard=1)
    assert on_two_ranks(config) == [0, 0], said_by(config, 0)
    return config


def test_parts_learn_what_the_whole_learns(whole, in_parts):
    assert len([record for record in records(whole) if "val_loss" in record]) == 3
    assert_alike(in_parts, whole)
    last = [checkpoints_in(config.run_dir / "checkpoints")[-1] for config in (whole, in_parts)]
    manifests = [json.loads((path / "manifest.json").read_text()) for path in last]
    sizes = [{name: file["bytes"] for name, file in manifest["files"].items()} for manifest in manifests]
    assert sizes[0]["trained.safetensors"] == sizes[1]["trained.safetensors"]
    assert sizes[0]["optimizer.safetensors"] == sizes[1]["optimizer.safetensors"]


def test_layers_computed_again_in_parts_learn_the_same_bits(folder, in_parts):
    config = run(folder, "recomputed", shard=1, checkpoint_activations=1)
    assert on_two_ranks(config) == [0, 0], said_by(config, 0)
    assert outcome(config) == outcome(in_parts)


def test_stopped_in_parts_goes_on_to_the_same_bits(folder, in_parts):
    config = run(folder, "stopped", shard=1)
    assert on_two_ranks(config, leave_after(5)) == [STOPPED, STOPPED]
    assert checkpoints_in(config.run_dir / "checkpoints")[-1].name == "step-00000005"
    assert on_two_ranks(dataclasses.replace(config, from_resume=1)) == [0, 0]
    assert outcome(config) == outcome(in_parts)


def test_parts_go_on_whole_and_in_parts_again(folder, whole):
    config = run(folder, "changing")
    for step, shard in ((3, 1), (7, 0), (LAST, 1)):
        resumed = dataclasses.replace(config, shard=shard, from_resume=1)
        assert on_two_ranks(resumed, leave_after(step)) == ([STOPPED, STOPPED] if step < LAST else [0, 0])
    assert_alike(config, whole)


@pytest.mark.parametrize("use_moe", [0, 1])
def test_frozen_layers_and_tower_beside_parts(use_moe, data_folder, tower_folder):
    """Stage 1, accumulated, with rows without a picture: each rank holds the tower and half of the rest."""
    settings = {"batch_size": 2, "accumulation_steps": 2, "use_moe": use_moe, "learning_rate": 1e-3}
    runs = [tiny(PRETRAIN_VLM, data_folder, tower_folder, save_dir=str(data_folder / f"{shard}/out"), shard=shard,
                 **settings) for shard in (0, 1)]  # fmt: skip
    original = resume.build_optimizer

    def note_parts(model, *rest):
        held = sum(p.to_local().numel() for p in model.parameters() if hasattr(p, "to_local"))
        total = sum(p.numel() for p in model.parameters())
        tower = sum(p.numel() for p in model.vision_encoder.parameters())
        print(f"parts {held / (total - tower):.3f}" if held else "whole")
        return original(model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "build_optimizer", note_parts)
        for config in runs:
            assert on_two_ranks(config) == [0, 0], said_by(config, 0)
    assert_alike(runs[1], runs[0])
    assert "whole" in said_by(runs[0], 0)
    for rank in range(2):
        assert "parts 0.50" in said_by(runs[1], rank)


def test_no_number_on_one_rank_is_skipped_on_both(folder, monkeypatch):
    count, train_step = [0], loop.train_step

    def spoiled_on_rank_1(run, *rest):
        count[0] += 1

        def spoil(_, __, output):
            output.loss = output.loss * math.nan

        if os.environ["RANK"] != "1" or count[0] != 4:
            return train_step(run, *rest)
        hook = run.parallel_model.register_forward_hook(spoil)
        values = train_step(run, *rest)
        hook.remove()
        return values

    monkeypatch.setattr(loop, "train_step", spoiled_on_rank_1)
    config = run(folder, "spoiled", shard=1, val_samples=0)
    assert on_two_ranks(config) == [0, 0], said_by(config, 0)
    assert [record["step"] for record in records(config)] == [1, 2, 3, *range(5, 13)]
    (named,) = [json.loads(line) for line in (config.run_dir / finite.SKIPPED).read_text().splitlines()]
    assert named["step"] == 4 and named["ranks"] == [1]


def test_shard_needs_ranks_and_adamw(folder, capsys):
    stage.run_stage(run(folder, "alone", shard=1))
    assert "--shard 1 changes nothing with one rank" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--shard 1 cannot go with --optimizer muon.*take adamw"):
        run(folder, "muon", shard=1, optimizer="muon")
