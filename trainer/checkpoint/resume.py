"""How a run starts: anew, or from its last whole checkpoint."""

import contextlib
import math
import os
import random
import shutil
import socket
from pathlib import Path

import numpy as np
import torch

from model.messages import UserError
from model.model_minimind import MiniMindForCausalLM
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
from trainer.checkpoint.fingerprint import SHOWN, check_same_on_all_ranks, fingerprints, shortened
from trainer.config import StageConfig
from trainer.data import StageData
from trainer.distributed import Runtime, distribute
from trainer.optim import build_optimizer
from trainer.run import Run, RunState

SHARED = ("step", "position", "best", "best_exam", "exams", "tracker_id", "steps_skipped", "samples_skipped",
          "skipped_in_a_row", "recent_losses")  # fmt: skip  # fields of RunState that are the same on every rank
SET_ASIDE = "checkpoints.before"  # an earlier run's, and its best weights, moved by one that starts anew


def last_manifest(config: StageConfig) -> dict | None:
    """Of the checkpoint that a run resumes from; None where it starts anew."""
    if config.resumes:
        for path in reversed(checkpoints_in(config.run_dir / "checkpoints")):
            with contextlib.suppress(UserError):  # damaged: start_or_resume names it
                return read_manifest(path)
    return None


def start_or_resume(config: StageConfig, runtime: Runtime, model: MiniMindForCausalLM, data: StageData) -> Run:
    """A run at its first step, or where its last whole checkpoint left it; the model may be spread over the ranks now.

    Raises:
        UserError: the ranks differ, the checkpoint is of another run, every checkpoint is damaged, or the new steps do
            not divide what is left; the same on every rank.
    """
    expected = fingerprints(config, model, data.processor, data.train)
    runtime.wait_for_all()
    check_same_on_all_ranks(expected, config, model, runtime)
    parallel_model = distribute(model, bool(config.shard), runtime)
    optimizer = build_optimizer(model, config, runtime.dtype)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    torch.manual_seed(config.seed + runtime.rank)  # dropout differs from rank to rank
    run = Run(config, runtime, model, parallel_model, optimizer, scaler, data.order, expected)

    folder, checkpoint = config.run_dir / "checkpoints", None
    if config.resumes:
        checkpoint = runtime.from_main(lambda: newest_checkpoint(folder))
        _check_that_all_see(checkpoint, folder, runtime)
    if runtime.is_main:
        if checkpoint is None:
            _set_aside(config)
        remove_litter(folder)
    if checkpoint is not None:
        _load(run, checkpoint)
    return run


def _load(run: Run, path: Path) -> None:
    """Bring a run to where a checkpoint is."""
    manifest, config = read_manifest(path), run.config
    _check_same_run(path, manifest, run)
    _check_that_changed_data_suffice(manifest, run)
    run.order = run.order.resumed_at(manifest["step"], manifest["position"], manifest["order_batch"])
    load_tensors(path, run.model, run.optimizer)
    state = load_state(path)
    if state["scaler"]:  # empty where what is float16 here was bfloat16 there: the scaler finds its scale anew
        run.scaler.load_state_dict(state["scaler"])
    window = restore_rank(state["ranks"], config.seed, state["step"], run.runtime)
    if not math.isfinite(state["best"]):  # older versions took NaN for the best
        until_then = [one for one in whole_in(path.parent) if one <= path]
        state["best"] = min(losses_of(until_then).values(), default=math.inf)
    run.state = RunState(**{name: state[name] for name in SHARED if name in state}, window=window, resumed_from=path)
    run.runtime.print0(f"resumed from {path}")


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


def _check_same_run(path: Path, manifest: dict, run: Run) -> None:
    saved, present = manifest["fingerprints"], run.fingerprints
    if run.config.allow_data_change:
        data = ("data", "samples")
        if any(saved[name] != present[name] for name in data):
            run.runtime.print0(
                "the training data has changed since the checkpoint: going on at the same place of its new order"
            )
        present = {**present, **{name: saved[name] for name in data}}
    wrong = [shortened(line) for line in differences(saved, present)]
    if wrong:
        rest = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        data_only = all(line.startswith(("data:", "samples:")) for line in wrong)
        cure = ", or --allow_data_change 1 to go on with the new data" if data_only else ""
        raise UserError(
            f"{path} is of another run: {'; '.join(wrong[:SHOWN])}{rest}. Give the same data and flags again{cure}; or "
            "start anew: --from_resume 0"
        )


def _check_that_changed_data_suffice(manifest: dict, run: Run) -> None:
    """Raises UserError where less data than before leaves nothing to train on."""
    config, batch, taken = run.config, manifest["order_batch"], manifest["position"]
    total = len(run.order.lengths) // batch * batch * config.epochs
    if total <= taken and manifest["fingerprints"]["data"] != run.fingerprints["data"]:
        kept = f" --from_weight {config.weight_path} keeps what was learnt." if config.weight_path.exists() else ""
        raise UserError(
            f"nothing is left to train on: the run has taken {taken:,} rows, and --epochs {config.epochs} of the "
            f"changed data are {total:,}. Give more data, or start anew with this: --from_resume 0.{kept}"
        )


def _set_aside(config: StageConfig) -> None:
    """Move an earlier run's checkpoints and best weights out of the way.

    Else a restart would take the ones for this run's, and everybody the others: a run that never validates would leave
    them beside its own weights for good.
    """
    before, best = config.run_dir / SET_ASIDE, config.best_path
    checkpoints = checkpoints_in(config.run_dir / "checkpoints")
    moved = list(checkpoints)
    if config.start_path and best.exists() and best.samefile(config.start_path):  # a resumption will read it again
        print(f"{best} is an earlier run's and stays until this run, which starts from it, has a best of its own")
    elif best.exists():
        moved.append(best)
    if not moved:
        return
    if checkpoints:
        for path in checkpoints_in(before):
            shutil.rmtree(path)
        (before / best.name).unlink(missing_ok=True)
    before.mkdir(exist_ok=True)
    for path in moved:
        os.replace(path, before / path.name)
    names = ", ".join(path.name for path in moved)
    print(f"an earlier run's {names} moved to {before}; the next run that starts anew deletes what it finds there")


# ---- what differs from rank to rank


def state_to_json(run: Run, ranks: list[dict]) -> dict:
    """The content of a checkpoint's state.json. ranks: rank_state of every rank."""
    return {**{name: getattr(run.state, name) for name in SHARED}, "scaler": run.scaler.state_dict(), "ranks": ranks}


def rank_state(run: Run) -> dict:
    """What differs from rank to rank: random states, and this rank's values of a log line that is not full yet."""
    window = [{name: float(value) for name, value in values.items()} for values in run.state.window]
    return {"random": random_state(run.runtime), "window": window}


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
