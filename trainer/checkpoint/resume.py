"""What a run carries from step to step beside its tensors, and how it goes on from a checkpoint."""

import contextlib
import math
import os
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from model.messages import UserError
from trainer.checkpoint.files import (
    checkpoints_in,
    damage,
    differences,
    load_state,
    load_tensors,
    losses_of,
    newest_checkpoint,
    read_manifest,
    remove_litter,
    whole_in,
)
from trainer.checkpoint.fingerprint import SHOWN, shortened
from trainer.config import StageConfig
from trainer.distributed import Runtime
from trainer.order import Order, ResplitOrder, order_after

SHARED = (
    "step",
    "position",
    "best",
    "tracker_id",
    "steps_skipped",
    "samples_skipped",
    "skipped_in_a_row",
    "recent_losses",
)  # fields that are the same on every rank
SET_ASIDE = "checkpoints.before"  # an earlier run's, and its best weights, moved by one that starts anew


@dataclass
class RunState:
    step: int = 0  # done
    position: int = 0  # rows of the global order that these steps took
    best: float = math.inf  # validation loss so far
    window: list[dict] = field(default_factory=list)  # this rank's values of the steps since the last log line
    tracker_id: str = ""
    steps_skipped: int = 0  # because loss or gradient was not finite
    samples_skipped: int = 0  # rows that these steps took
    skipped_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)  # logged, newest last
    resumed_from: Path | None = None

    def to_json(self, scaler: torch.amp.GradScaler, ranks: list[dict]) -> dict:
        """ranks: own_part of every rank."""
        return {**{name: getattr(self, name) for name in SHARED}, "scaler": scaler.state_dict(), "ranks": ranks}

    def own_part(self, runtime: Runtime) -> dict:
        """What differs from rank to rank: random states, and the parts of a log line that is not full yet."""
        window = [{name: float(value) for name, value in values.items()} for values in self.window]
        return {"random": random_state(runtime), "window": window}


def resumes(config: StageConfig) -> bool:
    """Whether a run goes on from its last checkpoint: told to, or restarted by torchrun after a failure."""
    return bool(config.from_resume) or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def kept_settings(config: StageConfig) -> dict | None:
    """What the decoder of the run that is gone on with was built from; None where there is nothing to go on from.

    Checkpoints of older versions do not say; their decoders were MiniMind's in all that has no flag.
    """
    manifest = _kept_manifest(config)
    return None if manifest is None else manifest.get("decoder", {})


def kept_dropout(config: StageConfig) -> float | None:
    """That of the run that is gone on with; older versions did not take it from the file to start from."""
    manifest = _kept_manifest(config)
    return None if manifest is None else manifest["fingerprints"].get("--dropout")


def _kept_manifest(config: StageConfig) -> dict | None:
    if resumes(config):
        for path in reversed(checkpoints_in(config.run_dir / "checkpoints")):
            with contextlib.suppress(ValueError):  # damaged: begin names it
                return read_manifest(path)
    return None


def begin(
    config: StageConfig, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
    order: Order, found: dict, runtime: Runtime, say: Callable = print,
) -> tuple[RunState, Order | ResplitOrder]:  # fmt: skip
    """The state to train from and the order from there on: a new run's, or that of its last whole checkpoint.

    found: this run's fingerprints.

    Raises:
        UserError: the checkpoint is of another run, every checkpoint is damaged, or the new steps do not divide what
            is left; the same on every rank.
    """
    folder = config.run_dir / "checkpoints"
    path = None
    if resumes(config):
        path = runtime.from_main(lambda: newest_checkpoint(folder, say))
        _check_that_all_see(path, folder, runtime)
    if runtime.is_main:
        if path is None:
            _set_aside(config, say)
        remove_litter(folder, say)
    if path is None:
        return RunState(), order
    manifest = read_manifest(path)
    _check_same_run(path, manifest, found, config, say)
    whole = replace(order, batch_size=manifest["order_batch"], accumulation_steps=1, world_size=1)
    _check_that_changed_data_suffice(whole, manifest, found, config)
    split = (order.batch_size, order.accumulation_steps, order.world_size)
    order = order_after(whole, manifest["step"], manifest["position"], *split)
    load_tensors(path, model, optimizer)
    state = load_state(path)
    if state["scaler"]:  # empty where what is float16 here was bfloat16 there: the scaler finds its scale anew
        scaler.load_state_dict(state["scaler"])
    window = restore_rank(state["ranks"], config.seed, state["step"], runtime)
    if not math.isfinite(state["best"]):  # older versions took NaN for the best
        until_then = [one for one in whole_in(folder) if one <= path]
        state["best"] = min(losses_of(until_then).values(), default=math.inf)
    say(f"resumed from {path}")
    return RunState(**{name: state[name] for name in SHARED}, window=window, resumed_from=path), order


def _check_that_all_see(path: Path | None, folder: Path, runtime: Runtime) -> None:
    """Raises UserError on all ranks where one has another checkpoint than rank 0, or rank 0 alone has none.

    torchrun may give rank 0 to another machine each time; with folders of their own they would start anew in silence.
    """
    if path is None:
        found = [one.name for one in checkpoints_in(folder)]
    else:
        found = damage(path, thorough=False) or read_manifest(path)["files"]
    everybody = runtime.gather((socket.gethostname(), found))
    for rank, (host, theirs) in enumerate(everybody):
        if theirs != everybody[0][1]:
            raise UserError(
                f"rank {rank} on {host} does not see in {path or folder} what rank 0 on {everybody[0][0]} sees: give a "
                "--save_dir on a disk that all machines share, or copy the folder to each of them"
            )


def _check_same_run(path: Path, manifest: dict, found: dict, config: StageConfig, say: Callable) -> None:
    expected = manifest["fingerprints"]
    if config.allow_data_change:
        data = ("data", "samples")
        if any(expected[name] != found[name] for name in data):
            say("the training data has changed since the checkpoint: going on at the same place of its new order")
        found = {**found, **{name: expected[name] for name in data}}
    wrong = [shortened(line) for line in differences(expected, found)]
    if wrong:
        rest = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        data_only = all(line.startswith(("data:", "samples:")) for line in wrong)
        cure = ", or --allow_data_change 1 to go on with the new data" if data_only else ""
        raise UserError(
            f"{path} is of another run: {'; '.join(wrong[:SHOWN])}{rest}. Give the same data and flags again{cure}; or "
            "start anew: --from_resume 0"
        )


def _check_that_changed_data_suffice(whole: Order, manifest: dict, found: dict, config: StageConfig) -> None:
    """Raises UserError where less data than before leaves nothing to train on."""
    total, taken = whole.total_steps * whole.global_batch, manifest["position"]
    if total <= taken and manifest["fingerprints"]["data"] != found["data"]:
        kept = f" --from_weight {config.weight_path} keeps what was learnt." if config.weight_path.exists() else ""
        raise UserError(
            f"nothing is left to train on: the run has taken {taken:,} rows, and --epochs {config.epochs} of the "
            f"changed data are {total:,}. Give more data, or start anew with this: --from_resume 0.{kept}"
        )


def _set_aside(config: StageConfig, say: Callable) -> None:
    """Move an earlier run's checkpoints and best weights out of the way.

    Else a restart would take the ones for this run's, and everybody the others: a run that never validates would leave
    them beside its own weights for good.
    """
    before, best = config.run_dir / SET_ASIDE, config.best_path
    checkpoints = checkpoints_in(config.run_dir / "checkpoints")
    found = list(checkpoints)
    if config.start_path and best.exists() and best.samefile(config.start_path):  # a resumption will read it again
        say(f"{best} is an earlier run's and stays until this run, which starts from it, has a best of its own")
    elif best.exists():
        found.append(best)
    if not found:
        return
    if checkpoints:
        for path in checkpoints_in(before):
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        (before / best.name).unlink(missing_ok=True)
    before.mkdir(exist_ok=True)
    for path in found:
        os.replace(path, before / path.name)
    names = ", ".join(path.name for path in found)
    say(f"an earlier run's {names} moved to {before}; the next run that starts anew deletes what it finds there")


# ---- what differs from rank to rank


def random_state(runtime: Runtime) -> dict:
    """Every generator that a rank has, as JSON can hold it."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
    }
    if runtime.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(runtime.device).numpy().tobytes().hex()
    return state


def restore_rank(ranks: list[dict], seed: int, step: int, runtime: Runtime) -> list[dict]:
    """Restore this rank's random states; return the values of its unfinished log line.

    With another number of ranks nothing can be the same to the bit: the generators get new seeds, and the first rank
    takes over what all had counted.
    """
    if len(ranks) != runtime.world_size:
        torch.manual_seed(seed + 1_000_003 * step + runtime.rank)
        return [_merged(values, runtime) for values in zip(*(rank["window"] for rank in ranks), strict=True)]
    state, window = ranks[runtime.rank]["random"], ranks[runtime.rank]["window"]
    torch.set_rng_state(_bytes(state["torch"]))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    if "cuda" in state and runtime.device.type == "cuda":
        torch.cuda.set_rng_state(_bytes(state["cuda"]), runtime.device)
    return [{name: torch.tensor(value, device=runtime.device) for name, value in each.items()} for each in window]


def _merged(parts: tuple[dict, ...], runtime: Runtime) -> dict:
    """One step's values of all former ranks: the norm is everybody's, losses are parts of a sum."""
    merged = {}
    for name, value in parts[0].items():
        total = value if name == "grad_norm" else sum(part[name] for part in parts) * runtime.is_main
        merged[name] = torch.tensor(total, device=runtime.device)
    return merged


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
