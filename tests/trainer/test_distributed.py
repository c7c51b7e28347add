"""Ranks: what each of them learns from, and that two of them train exactly as one does."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from dataset.quarantine import Quarantine
from helpers.data import make_picture, write_jsonl
from helpers.models import IMAGE_TOKENS
from helpers.repository import ROOT
from helpers.runs import make_order, plain_sgd, records, steps_of, tiny
from model.tokenizer_files import load_tokenizer
from trainer import loop, stage
from trainer.checkpoint import resume
from trainer.config import StageConfig
from trainer.data import load_data
from trainer.distributed import Runtime
from trainer.guard import ending
from trainer.optim import freeze_all_but
from trainer.order import Order
from trainer.train_sft_vlm import SFT_VLM

TRAFFIC = "traffic_of_rank_{}.json"
SETTINGS = {
    "dense": {"use_moe": 0},
    "moe": {"use_moe": 1},
    "accumulated": {"use_moe": 1, "batch_size": 2, "accumulation_steps": 2},
    "cut": {"use_moe": 1, "batch_size": 4, "batch_tokens": 64},
    "recomputed": {"use_moe": 1, "batch_size": 4, "batch_tokens": 64, "checkpoint_activations": 1},
}


def configuration(name: str, folder: Path, tower: Path, world_size: int) -> StageConfig:
    """Steps of 8 samples, at a rate and without clipping, so that a gradient of another size shows."""
    settings = {"batch_size": 8 // world_size, "learning_rate": 0.3, "grad_clip": 1e9, **SETTINGS[name]}
    if world_size == 1:  # accumulation is split as the ranks would split it, or not at all
        settings |= {"batch_size": 8, "accumulation_steps": 1, "batch_tokens": 0}
    return tiny(SFT_VLM, folder, tower, val_samples=0, save_dir=str(folder / f"{name}_{world_size}"), **settings)


def train_and_keep(name: str, folder: Path, tower: Path) -> None:
    """Train a configuration on this rank's share and write what this rank's model has become."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    config, models, build_model = configuration(name, folder, tower, world_size), [], stage.build_model
    traffic = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "build_optimizer", plain_sgd)
        patch.setattr(ending, "stop_runtime", lambda: None)  # the ranks stay joined for the next configuration
        patch.setattr(stage, "build_model", lambda *arguments: models.append(build_model(*arguments)) or models[-1])
        if world_size > 1:
            patch.setattr(resume, "distribute", listened_to(resume.distribute, traffic.setdefault("start", [])))
            patch.setattr(loop, "train_step", listened_to(loop.train_step, traffic.setdefault("step", [])))
        stage.run_stage(config)
    weights = {key: value for key, value in models[0].state_dict().items() if key != "lm_head.weight"}  # tied
    save_file(weights, folder / f"{name}_{world_size}_rank_{rank}.safetensors")
    (folder / f"{name}_{TRAFFIC.format(rank)}").write_text(json.dumps(traffic))


def listened_to(function: Callable, heard: list) -> Callable:
    """The function, noting [collective, numbers sent] of all that ranks say to each other while it runs."""

    def listening(*arguments):
        with torch.autograd.profiler.profile(record_shapes=True) as profile:
            result = function(*arguments)
        said = [event for event in profile.function_events if event.name.startswith("gloo:")]
        heard.extend([event.name.removeprefix("gloo:"), sum(map(math.prod, event.input_shapes))] for event in said)
        return result

    return listening


def torchrun(arguments: list, folder: Path) -> subprocess.CompletedProcess:
    """Two ranks, started from a working directory that is not the project's."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    places = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": places, "DIST_TIMEOUT_SECONDS": "60"}
    return subprocess.run(
        [*launcher, *map(str, arguments)], cwd=folder, env={**os.environ, **settings}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def uneven_folder(tmp_path_factory) -> Path:
    """12 short samples with a picture and 12 long ones without: a step of 8 in the middle holds four of each."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "images").mkdir()
    lines = []
    for number in range(24):
        pictured = number % 2 == 0
        if pictured:
            make_picture(number).save(folder / f"images/{number}.png")
        answer = " ".join(["cat"] * (1 + number // 2 % 3 if pictured else 20 + number))
        question = "<image>\nWhat?" if pictured else "What?"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append({"image": f"{number}.png" if pictured else [], "conversations": turns})
    write_jsonl(folder / "train.jsonl", lines)
    return folder


@pytest.fixture(scope="module")
def trained(uneven_folder, tower_folder) -> Path:
    """Every configuration, trained on one rank here and on two ranks in one launch."""
    for name in ("dense", "moe"):
        train_and_keep(name, uneven_folder, tower_folder)
    done = torchrun([__file__, uneven_folder, tower_folder], uneven_folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return uneven_folder


def test_a_step_exists_in_which_one_rank_has_no_picture_and_other_tokens(uneven_folder, tower_folder, processor):
    config = configuration("dense", uneven_folder, tower_folder, world_size=2)
    data, _ = load_data(config, processor, Quarantine(), lambda *_: None)
    order = Order(torch.from_numpy(data.dataset.lengths), 4, 1, 2, 1, config.seed)
    pictures, tokens = [], []
    for rank in range(2):
        rows = [[data.dataset.rendered(number) for number in shares[rank]] for shares in order.rows_by_rank()]
        pictures.append([sum(sum(row.image_mask) for row in batch) // IMAGE_TOKENS for batch in rows])
        tokens.append([sum(sum(row.trained) for row in batch) for batch in rows])
    assert (4, 0) in zip(*pictures, strict=True)
    assert all(first != second for first, second in zip(*tokens, strict=True))


@pytest.mark.parametrize(
    ("name", "alone"),
    [("dense", "dense"), ("moe", "moe"), ("accumulated", "moe"), ("cut", "moe"), ("recomputed", "moe")],
)
def test_two_ranks_train_as_one(name, alone, trained, tower_folder):
    first, second = (load_file(trained / f"{name}_2_rank_{rank}.safetensors") for rank in range(2))
    single = load_file(trained / f"{alone}_1_rank_0.safetensors")
    assert not [key for key in first if not torch.equal(first[key], second[key])]  # ranks agree to the bit
    torch.testing.assert_close(first, single, rtol=0, atol=1e-5)
    ours = records(configuration(name, trained, tower_folder, world_size=2))
    theirs = records(configuration(alone, trained, tower_folder, world_size=1))
    assert [record["step"] for record in ours] == [1, 2, 3]
    for ranks, one in zip(ours, theirs, strict=True):
        for value in ("loss", "grad_norm", *(["aux_loss"] if alone == "moe" else [])):
            assert ranks[value] == pytest.approx(one[value], abs=1e-5)


def test_what_is_frozen_or_computed_is_never_sent(trained, uneven_folder, tower_folder):
    """Once what learns, then in every step's arithmetic the gradient."""
    config = configuration("dense", uneven_folder, tower_folder, world_size=2)
    model = stage.build_model(config, load_tokenizer(), say=lambda *_: None)
    freeze_all_but(model, config.trainable)
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    for rank in range(2):
        traffic = json.loads((trained / f"dense_{TRAFFIC.format(rank)}").read_text())
        sent = [count for name, count in traffic["start"] if name == "broadcast"]
        assert max(sent) == learning and sum(sent) < 1.01 * learning  # beside it the parameters' shapes
        summed = [count for name, count in traffic["step"] if name == "all_reduce"]
        assert summed == 3 * [learning]
        order = [count for name, count in traffic["step"] if name != "all_reduce"]  # of DDP's buckets, sent once
        assert len(order) <= 2 and sum(order) < 30


def test_stage_script_runs_on_two_ranks_from_anywhere(uneven_folder, tower_folder, tmp_path):
    flags = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
             "data_path": uneven_folder / "train.jsonl", "vision_model": tower_folder, "from_weight": "none",
             "save_dir": "relative", "device": "cpu", "log_interval": 1, "batch_size": 4, "epochs": 1}  # fmt: skip
    arguments = [part for name, value in flags.items() for part in (f"--{name}", value)]
    done = torchrun([ROOT / "trainer/train_sft_vlm.py", *arguments], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "relative/sft_vlm_32.safetensors").is_file()
    metrics = [json.loads(line) for line in (tmp_path / "relative/sft_vlm_32/metrics.jsonl").open()]
    assert [record["step"] for record in metrics] == [1, 2, 2]  # both steps once, though two ranks count; a validation
    assert done.stdout.count("weights: ") == 1


def test_collectives_of_a_single_rank_need_no_group():
    alone = Runtime(0, 1, torch.device("cpu"), torch.float32)
    assert alone.sum(1.5, 2) == [1.5, 2] and alone.gather("x") == ["x"] and alone.barrier() is None


# which samples


def test_order_is_a_pure_function_of_its_arguments():
    torch.manual_seed(1)
    first = steps_of(make_order())
    torch.manual_seed(2)
    assert steps_of(make_order()) == first
    assert steps_of(make_order(seed=6)) != first


def test_epoch_holds_no_sample_twice_and_epochs_differ():
    order = make_order()
    steps = steps_of(order)
    assert len(order.steps(0)) == 37 and len(steps) == order.total_steps == 111
    epochs = [sum(steps[n * 37 : (n + 1) * 37], []) for n in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == 37 * 8 and set(epoch) <= set(range(300))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert len({frozenset(epoch) for epoch in epochs}) > 1  # the four left out are others each time


def test_step_holds_the_same_samples_however_it_is_split():
    whole = [sorted(step) for step in steps_of(make_order(8, 1, 1))]
    for split in ((4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 1, 8)):
        assert [sorted(step) for step in steps_of(make_order(*split))] == whole


@pytest.mark.parametrize("split", [(8, 1, 1), (4, 2, 1), (2, 2, 2)])
def test_order_goes_on_from_any_step(split):
    order = make_order(*split, samples=41)
    whole = steps_of(order)
    assert len(whole) == 15
    for first_step in range(len(whole) + 1):
        assert steps_of(order, first_step) == whole[first_step:]


def test_steps_hold_samples_of_like_length():
    order = make_order()
    spread = [float(order.lengths[step].max() - order.lengths[step].min()) for step in order.steps(0)]
    assert sum(spread) / len(spread) < 10  # of 86; at random it would be above 60


def test_too_few_samples_for_a_step_are_refused():
    assert make_order(8, samples=8).total_steps == 3
    with pytest.raises(ValueError, match="7 rows do not fill one step of 8 .*--batch_size"):
        make_order(4, 2, samples=7)


if __name__ == "__main__":  # what torchrun starts on every rank
    for each in SETTINGS:
        train_and_keep(each, Path(sys.argv[1]), Path(sys.argv[2]))
    dist.destroy_process_group()
