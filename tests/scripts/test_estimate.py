"""What a run is said to take against what it takes, and the presets against what is said."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from helpers.data import write_jsonl
from helpers.models import SIZES
from helpers.runs import tiny, untrained_weights
from helpers.towers import make_tower
from model.config import MiniMindConfig, VLMConfig
from model.tower_folder import tower_sizes
from model.vision_encoder import KINDS
from scripts import estimate
from scripts.measure import stages
from scripts.measure.memory import Account, Step, largest_batch, step_memory
from scripts.measure.real_step import RealStep, Speed, flops_of
from trainer.config import CARDS, FEW, STEP, StageConfig, parse_config
from trainer.optim import build_optimizer, freeze_all_but
from trainer.report.meter import Meter, useful_flops
from trainer.stage import run_stage
from trainer.train_llm import LLM
from trainer.train_pretrain_vlm import PRETRAIN_VLM
from trainer.train_sft_vlm import SFT_VLM

STAGES = {"llm": LLM, "pretrain_vlm": PRETRAIN_VLM, "sft_vlm": SFT_VLM}
TINY_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16}  # fmt: skip
TINY = [f"--{name}={size}" for name, size in SIZES.items()] + ["--max_seq_len=24", "--batch_size=2", "--dtype=float32"]


def tiny_step(stage: str, **changes) -> Step:
    config = MiniMindConfig(**SIZES) if stage == "llm" else VLMConfig(**SIZES, vision_config=TINY_TOWER)
    return Step(**{"config": config, "stage": stage, "rows": 4, "tokens": 24, "supervised": 10, **changes})


@pytest.mark.parametrize("stage", STAGES)
def test_stages_are_the_trainers(stage):
    step = tiny_step(stage)
    model, theirs = step.make_model(), step.make_model()
    freeze_all_but(theirs, STAGES[stage].trainable)
    learn = [{name for name, p in one.named_parameters() if p.requires_grad} for one in (model, theirs)]
    assert learn[0] == learn[1]
    assert stages.STAGES == STAGES


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizers_state_is_what_the_trainers_keeps(optimizer):
    step = tiny_step("sft_vlm", optimizer=optimizer)
    model = step.make_model()
    real = build_optimizer(model, replace(SFT_VLM, optimizer=optimizer))
    step.loss(model, step.make_batch()).backward()
    real.step()
    numbers = [value.nbytes for state in real.state.values() for value in state.values() if value.numel() > 1]
    assert step_memory(step).optimizer == sum(numbers)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cached", [True, False])
def test_counted_memory_is_that_of_real_tensors(stage, dtype, cached):
    """The same account of a step that is really made: fake tensors and answers given for it change nothing."""
    step = tiny_step(stage, dtype=dtype, cached=cached)
    predicted = step_memory(step)
    with Account() as account:
        real = RealStep(step)
        weights = account.live
        batch = step.make_batch()
        real.timed(step, batch)
        account.peak = 0
        loss = step.loss(real.model, batch)
        kept = account.live - weights - sum(v.nbytes for s in real.optimizer.state.values() for v in s.values())
        loss.backward()
    assert sum(p.nbytes for p in real.model.parameters()) <= predicted.weights == weights
    assert kept == pytest.approx(predicted.activations, rel=0.01)
    assert account.peak == pytest.approx(predicted.peak, rel=0.01)
    assert predicted.gradients == sum(p.grad.nbytes for p in real.learning)


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_of_every_kind_of_tower_is_counted(kind, tmp_path):
    make_tower(kind, tmp_path)
    config = VLMConfig(**SIZES, vision_config=tower_sizes(tmp_path), projector="mlp")
    for dtype in (torch.float32, torch.bfloat16):
        memory = step_memory(tiny_step("sft_vlm", config=config, dtype=dtype))
        assert memory.peak > memory.weights + memory.optimizer > 0


def test_memory_grows_where_it_must():
    base = tiny_step("sft_vlm", tokens=200, supervised=100, dtype=torch.bfloat16)
    peaks = {device: step_memory(replace(base, device=device)).peak for device in ("cpu", "cuda", "old_cuda")}
    assert peaks["cuda"] < peaks["old_cuda"] and peaks["cuda"] < peaks["cpu"]  # where weights of pairs are kept
    held = step_memory(replace(base, accumulates=True)).peak - peaks["cpu"]
    assert 0 < held <= 2 * step_memory(base).gradients


def test_the_largest_batch_is_the_last_that_fits():
    step = tiny_step("pretrain_vlm")
    limit = step_memory(replace(step, rows=37)).peak
    assert [largest_batch(step, size) for size in (limit, 1000)] == [37, 0]


def test_time_is_arithmetic_over_speed_and_the_update():
    step = tiny_step("sft_vlm", cached=True)
    model = step.make_model()
    more = flops_of(replace(step, cached=False), model) - flops_of(step, model)
    assert more == pytest.approx(step.rows * estimate.StepFlops(model).per_encoded)
    assert Speed(flops=4.0, optimizer=1.0).seconds(8.0, micro_batches=3) == 7.0


@cache
def peak_of(stage: str, rows: int, accumulates: bool, cached: bool = True) -> int:
    tokens = STAGES[stage].max_seq_len
    config = VLMConfig()
    step = Step(config, stage, rows, tokens, 0, cached, dtype=torch.bfloat16, accumulates=accumulates, device="cuda")
    return step_memory(replace(step, supervised=tokens - step.before_answer)).peak


@pytest.mark.parametrize("stage", ["pretrain_vlm", "sft_vlm"])
@pytest.mark.parametrize("preset", CARDS)
def test_presets_fit_their_cards_and_twice_would_not(preset, stage):
    config = parse_config(STAGES[stage], ["--preset", preset])
    assert config.batch_size * config.accumulation_steps == STEP
    room = (1 - estimate.FREE) * float(preset.removesuffix("gb")) * estimate.GB
    accumulates = config.accumulation_steps > 1
    assert peak_of(stage, config.batch_size, accumulates) <= room
    assert not accumulates or peak_of(stage, 2 * config.batch_size, True) > room
    if preset == "4gb":  # the tower's own peak comes before the decoder's and is lower
        assert peak_of(stage, config.batch_size, True, cached=False) <= room


def test_flags_win_over_the_preset_and_a_stage_without_one_says_so(capsys):
    assert parse_config(SFT_VLM, ["--preset", "8gb", "--batch_size", "3"]) == replace(
        SFT_VLM, batch_size=3, accumulation_steps=CARDS["8gb"]["sft_vlm"]["accumulation_steps"]
    )
    assert parse_config(SFT_VLM, []) == SFT_VLM
    assert "preset" not in StageConfig.__dataclass_fields__
    with pytest.raises(SystemExit):
        parse_config(LLM, ["--preset", "8gb"])
    assert "scripts/estimate.py --stage llm --memory_gb 8" in capsys.readouterr().err


def test_a_few_pictures_are_learnt_by_what_ships_in_one_flag(capsys):
    few = parse_config(SFT_VLM, ["--data_path", "mine", "--preset", "few", "--epochs", "3"])
    assert few == replace(SFT_VLM, data_path="mine", **{**FEW, "epochs": 3})
    assert Path(few.from_weight).is_file() and (Path(few.vision_model) / "model.safetensors").is_file()
    with pytest.raises(SystemExit):
        parse_config(LLM, ["--preset", "few"])
    assert "--preset few is for sft_vlm, not for llm" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "cached"), [("none", False), ("float16", True), ("int8", True), ("pixels", False)])
def test_the_tower_runs_in_every_step_where_only_pixels_are_cached(kind, cached):
    step = estimate.step_of(estimate.parse_options(["--cache_features", kind]))
    assert step.cached == cached


def test_the_decoder_of_a_file_is_meant(tmp_path):
    """Also what no flag says: intermediate size, vocabulary, RoPE."""
    sizes = {**SIZES, "intermediate_size": 96, "vocab_size": 7000, "rope_theta": 1e5}
    path = untrained_weights(tmp_path / "other.safetensors", **sizes)
    step = estimate.step_of(estimate.parse_options(["--from_weight", path, "--checkpoint_activations", "1"]))
    found = {name: getattr(step.config, name) for name in sizes if name != "rope_theta"}
    assert found == {name: sizes[name] for name in found} and step.config.rope_parameters["rope_theta"] == 1e5
    assert step.checkpointed and "activations computed again" in estimate.describe(step, estimate.parse_options([]))


def test_the_report_holds_the_same_figures_as_the_file(data_folder, tower_folder, tmp_path, capsys, monkeypatch):
    path = tmp_path / "found.json"
    monkeypatch.setattr(estimate, "largest_batch", lambda step, limit: int(limit / 1e6))
    estimate.main([*TINY, "--vision_model", str(tower_folder), "--cache_features", "float16", "--tflops", "0.5",
                   "--accumulation_steps", "2", "--data", str(data_folder / "train.jsonl"), "--epochs", "3",
                   "--max_seq_len", "64", "--memory_gb", "0.05", "--json", str(path)])  # fmt: skip
    said, found = capsys.readouterr().out, json.loads(path.read_text())
    assert f"{found['parts']['all']['parameters']:,}" in said
    assert f"{found['memory_bytes']['peak'] / 1e9:.3f}" in said
    assert found["step_seconds"] == pytest.approx(found["step_flops"] / 0.5e12)
    assert found["run"]["rows"] == 24 and found["run"]["steps"] == 3 * 6
    assert found["largest_batch"] == {"0.05": 42} and "never measured on a GPU" in said


def test_a_whole_run_is_counted_as_training_counts_it(data_folder, tower_folder, tmp_path, monkeypatch):
    """Five rows of three conversations each: two steps of two rows, and no token sees another conversation's."""
    lines = [
        {"image": f"{3 * picture}_0.png", "conversations": [
            {"role": "user", "content": f"<image>What is it, once more: {letter}"},
            {"role": "assistant", "content": "a cat"}]}
        for picture in range(5) for letter in "abc"
    ]  # fmt: skip
    path = write_jsonl(data_folder / "shared.jsonl", lines)
    config = tiny(SFT_VLM, data_folder, tower_folder, data_path=str(path), batch_size=2, epochs=2, max_seq_len=64)
    counted, count = [], Meter.count
    monkeypatch.setattr(Meter, "count", lambda self, counts: counted.append(counts) or count(self, counts))
    run_stage(config)
    assert {(counts.rows, counts.conversations) for counts in counted} == {(2, 6)}
    step = tiny_step("sft_vlm")
    flops = sum(useful_flops(step.make_model(), encodes=True)(counts) for counts in counted)
    arguments = [*TINY, "--vision_model", str(tower_folder), "--max_seq_len", "64", "--tflops", "1", "--epochs", "2",
                 "--data", str(path), "--json", str(tmp_path / "found.json")]  # fmt: skip
    estimate.main(arguments)
    run = json.loads((tmp_path / "found.json").read_text())["run"]
    assert (run["rows"], run["steps"]) == (5, len(counted)) and len(counted) == 4
    assert run["flops"] == pytest.approx(flops, rel=1e-6)
    with pytest.raises(SystemExit, match="has 5 rows, which do not fill one step of 6 .--batch_size 2 x --acc"):
        estimate.main([*arguments, "--accumulation_steps", "3"])


@pytest.mark.parametrize(
    ("flags", "reason"),
    [(["--max_seq_len", "150"], "a row of 150 tokens"), (["--supervised", "900"], "not 900"),
     (["--hidden_size", "100"], "hidden_size 100"), (["--num_hidden_layers", "0"], "must be at least 1"),
     (["--vision_model", "nowhere"], "no config.json"),
     ([*TINY, "--stage", "llm", "--optimizer", "muon", "--check", "1", "--tflops", "1"], "--check")],
)  # fmt: skip
def test_what_cannot_be_estimated_is_said_in_a_sentence(flags, reason):
    with pytest.raises(SystemExit, match="estimate: .*" + reason):
        estimate.main(flags)


def test_tiles_count_as_pictures_and_their_places_as_tokens(capsys):
    whole = tiny_step("sft_vlm", tokens=64)
    cut = replace(whole, config=VLMConfig(**SIZES, vision_config=TINY_TOWER, tiles=4))
    assert (whole.before_answer, cut.before_answer) == (3 + 4, 3 + 5 * (4 + 4))
    batch = cut.make_batch()
    assert batch["pictures_a_row"] == [5] * 4 and batch["pixel_values"].shape[:2] == (4, 5)
    assert torch.isfinite(cut.loss(cut.make_model(), batch))
    more = flops_of(cut, cut.make_model()) - flops_of(whole, whole.make_model())
    count = estimate.StepFlops(whole.make_model())
    assert more == pytest.approx(4 * 4 * (count.per_picture + count.per_encoded))
    estimate.main([*TINY, "--max_seq_len=64", "--tiles=4", "--image_tokens=49", "--max_seq_len=512", "--tflops=1"])
    assert "a picture each in 5 views" in capsys.readouterr().out
