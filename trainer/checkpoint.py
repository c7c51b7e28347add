"""What a run needs to go on: one directory a checkpoint, written aside, verified by a manifest, renamed when whole."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from model.vision_encoder import file_sha256
from trainer.runtime import Runtime

KEPT = 2  # newest checkpoints of a run


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
    state: dict, runtime: Runtime,
) -> None:  # fmt: skip
    """Write `folder/step-<step>`; every rank calls, rank 0 writes.

    state: what JSON can hold, for load_checkpoint to return.
    """
    random_states = runtime.gather(_random_state(runtime))
    if runtime.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        for litter in folder.glob(".tmp-*"):  # of runs that were killed while they wrote
            shutil.rmtree(litter, ignore_errors=True)
        aside = folder / f".tmp-{step}-{os.getpid()}"
        aside.mkdir()
        trained = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(trained, aside / "trained.safetensors")
        torch.save({"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}, aside / "optimizer.pt")
        (aside / "state.json").write_text(json.dumps({**state, "step": step, "random_states": random_states}))
        manifest = {path.name: file_sha256(path) for path in sorted(aside.iterdir())}
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in [*aside.iterdir(), aside]:
            _fsync(path)
        final = folder / f"step-{step:08d}"
        shutil.rmtree(final, ignore_errors=True)
        os.rename(aside, final)
        _fsync(folder)
        for old in sorted(folder.glob("step-*"))[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    runtime.barrier()


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest one that is whole; damaged ones are named and passed over."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            wrong = [name for name, digest in manifest.items() if file_sha256(path / name) != digest]
        except (OSError, ValueError) as error:
            wrong = [str(error)]
        if not wrong:
            return path
        print(f"checkpoint {path} is damaged ({wrong[0]}): trying the one before")
    return None


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, runtime: Runtime
) -> dict:
    """Fill model, optimizer and scaler, restore this rank's random state, return what `state` was and the step."""
    trained = load_file(path / "trained.safetensors")
    expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if set(trained) != expected:
        differing = sorted(set(trained) ^ expected)
        raise ValueError(f"{path} is of another model or stage: {len(differing)} tensors differ, first {differing[0]}")
    model.load_state_dict(trained, strict=False)
    rest = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    given = [{name: group[name] for name in ("peak", "weight_decay")} for group in optimizer.param_groups]
    optimizer.load_state_dict(rest["optimizer"])
    for group, values in zip(optimizer.param_groups, given, strict=True):
        group.update(values)  # flags of this run count, not those of the run that saved
    scaler.load_state_dict(rest["scaler"])
    state = json.loads((path / "state.json").read_text())
    if len(state["random_states"]) == runtime.world_size:
        own = {
            name: torch.tensor(bits, dtype=torch.uint8) for name, bits in state["random_states"][runtime.rank].items()
        }
        torch.set_rng_state(own["cpu"])
        if "cuda" in own and runtime.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda"], runtime.device)
    return state


def _random_state(runtime: Runtime) -> dict[str, list[int]]:
    state = {"cpu": torch.get_rng_state().tolist()}
    if runtime.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(runtime.device).tolist()
    return state


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
