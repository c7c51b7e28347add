"""Training runs at tiny sizes: started, watched, stopped, refused, and what they wrote."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from helpers.data import write_jsonl
from helpers.models import SIZES
from model.config import MiniMindConfig
from model.model_minimind import MiniMindForCausalLM
from model.weights import read_weights, save_weights
from trainer import loop, stage
from trainer.config import StageConfig
from trainer.order import Order
from trainer.stage import run_stage
from trainer.train_pretrain_vlm import PRETRAIN_VLM

# what a record says of the machine, not of the run
SPEEDS = ("conversations_per_second", "rows_per_second", "supervised_tokens_per_second", "data_wait", "forward_seconds",
          "backward_seconds", "optimizer_seconds", "memory_gb", "mfu")  # fmt: skip

ORIGINAL_BUILD_MODEL, ORIGINAL_TRAIN_STEP = stage.build_model, loop.train_step


def tiny(config: StageConfig, folder: Path, tower: Path, **changes) -> StageConfig:
    """A real stage at tiny sizes on the CPU: 24 samples of the data folder are 3 steps of 8."""
    settings = {
        **SIZES, "data_path": str(folder / "train.jsonl"), "save_dir": str(folder / "out"), "from_weight": "none",
        "vision_model": str(tower), "max_seq_len": 64, "batch_size": 8, "val_samples": 0, "learning_rate": 1e-2,
        "warmup_ratio": 0.0, "device": "cpu", "dtype": "float32", "num_workers": 0, "log_interval": 1,
    }  # fmt: skip
    return dataclasses.replace(config, **{**settings, **changes})


def write_texts(folder: Path) -> Path:
    """Plain texts and conversations in turn, as train_llm's data holds them."""
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is a cat."}]
    lines = [{"text": f"There are {n % 5} cats and a dog."} if n % 2 else {"conversations": turns} for n in range(24)]
    return write_jsonl(folder / "texts.jsonl", lines)


def watched_run(config: StageConfig, monkeypatch) -> tuple[dict[str, torch.Tensor], torch.nn.Module]:
    """Run a stage; its tensors from before the first step, and the model after the last."""
    seen = {}

    def build_and_remember(*arguments):
        seen["model"] = ORIGINAL_BUILD_MODEL(*arguments)
        seen["before"] = {name: value.clone() for name, value in seen["model"].state_dict().items()}
        return seen["model"]

    monkeypatch.setattr(stage, "build_model", build_and_remember)
    stage.run_stage(config)
    return seen["before"], seen["model"]


def run_until(config: StageConfig, last_step: int, monkeypatch) -> None:
    """Run a stage and stop it dead in the step after last_step, as a lost machine would."""
    taken = []

    def step_or_stop(*arguments):
        if len(taken) == last_step:
            raise KeyboardInterrupt
        taken.append(1)
        return ORIGINAL_TRAIN_STEP(*arguments)

    monkeypatch.setattr(loop, "train_step", step_or_stop)
    with pytest.raises(KeyboardInterrupt):
        stage.run_stage(config)
    monkeypatch.setattr(loop, "train_step", ORIGINAL_TRAIN_STEP)


def stopped_run(data_folder: Path, tower_folder: Path, monkeypatch, **changes) -> StageConfig:
    """A run of six steps that stopped in the sixth, with checkpoints of steps 2 and 4."""
    settings = {"batch_size": 4, "save_interval": 2, **changes}
    config = tiny(PRETRAIN_VLM, data_folder, tower_folder, **settings)
    run_until(config, 5, monkeypatch)
    return dataclasses.replace(config, from_resume=1)


def untrained_weights(path: Path, **changes) -> str:
    torch.manual_seed(3)
    save_weights(MiniMindForCausalLM(MiniMindConfig(**{**SIZES, **changes})), path)
    return str(path)


def refusal(config: StageConfig, *expected: str) -> str:
    """The one sentence that a stage ends with, holding all that is expected, and nothing written."""
    with pytest.raises(SystemExit) as stopped:
        run_stage(config)
    assert_refused(config, str(stopped.value), *expected)
    return str(stopped.value)


def assert_refused(config: StageConfig, sentence: str, *expected: str) -> None:
    assert sentence.startswith(f"{config.name}: ") and "\n" not in sentence and "Traceback" not in sentence
    assert not [part for part in expected if part not in sentence], sentence
    assert not config.weight_path.exists() and not list(Path(config.save_dir).glob("*/metrics.jsonl"))


def records(config: StageConfig) -> list[dict]:
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(config: StageConfig) -> list[float]:
    return [record["loss"] for record in records(config) if "loss" in record]


def status_of(config) -> dict:
    return json.loads((config.run_dir / "status.json").read_text())


def weights_of(config: StageConfig) -> dict[str, torch.Tensor]:
    return read_weights(config.weight_path)[1]


def assert_bit_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def plain_sgd(model: torch.nn.Module, config: StageConfig, dtype: torch.dtype) -> torch.optim.SGD:
    """Weights that show the size of a gradient, which AdamW divides away."""
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD([{"params": learnt, "peak": config.learning_rate}], lr=config.learning_rate)


def make_order(batch_size: int = 8, accumulation_steps: int = 1, world_size: int = 1, samples: int = 300, **changes):
    lengths = torch.randint(4, 90, (samples,), generator=torch.Generator().manual_seed(1))
    return Order(lengths, batch_size, accumulation_steps, world_size, **{"epochs": 3, "seed": 5, **changes})


def steps_of(order: Order, first_step: int = 0) -> list[list[int]]:
    """Rows of each step, in order, put together again from every rank's."""
    steps = list(order.rows_by_rank(first_step))
    assert {len(by_rank) for by_rank in steps} <= {order.world_size}
    assert {len(rows) for by_rank in steps for rows in by_rank} <= {order.batch_size * order.accumulation_steps}
    return [sum(by_rank, []) for by_rank in steps]
