"""Checkpoints on disk: one directory each, written aside, verified by its manifest, renamed when whole.

step-00001234/
    trained.safetensors     what learns
    optimizer.safetensors   its moments, "<name of the state>/<name of the parameter>"
    state.json              what JSON can hold: scaler, random states and unfinished log line of every rank, ...
    manifest.json           size and sha256 of these files, and what the run must have in common to go on from here

Order of a save: write every file, fsync every file, read them back, fsync the directory, rename, fsync the parent. So a
name `step-...` is either whole or was damaged later, which the manifest shows. Nothing here is ever unpickled.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

from model.files import file_sha256, sync_to_disk
from model.messages import NO_ROOM, UserError
from trainer.distributed import full_tensors, local_part

FORMAT = 2
TRAINED, OPTIMIZER, STATE, MANIFEST = "trained.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
CHUNK = 1 << 24  # bytes a write
ROOM = 1 << 20  # bytes that a file system needs beside the files themselves


class DiskFull(OSError):
    """A checkpoint that did not fit; the ones before it are as they were."""


@dataclass
class Snapshot:
    """All that a checkpoint will hold, copied from the devices, so that training can go on while it is written."""

    trained: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict
    facts: dict  # of the manifest: step, config, fingerprints, ...


# ---- what there is


def checkpoints_in(folder: Path) -> list[Path]:
    """Every directory with a checkpoint's name, oldest first, whole or not."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def read_manifest(path: Path) -> dict:
    """The manifest of a checkpoint. Raises UserError saying what is wrong where its own digest does not fit."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        digest = manifest.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{MANIFEST}: {getattr(error, 'strerror', None) or 'unreadable'}") from error
    if digest != _digest(manifest):
        raise UserError(f"{MANIFEST}: its content is not what its own sha256 says")
    if manifest["format"] != FORMAT:
        raise UserError(f"{MANIFEST}: format {manifest['format']}, this program reads {FORMAT}")
    return manifest


def damage(path: Path, thorough: bool = True) -> str | None:
    """What is wrong with a checkpoint, None where it is whole. Not thorough: sizes only, the content is not read."""
    try:
        files = read_manifest(path)["files"]
        for name, expected in files.items():
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} of {expected['bytes']} bytes"
            if thorough and file_sha256(path / name) != expected["sha256"]:
                return f"{name} differs from its sha256"
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    return None


def whole_in(folder: Path) -> list[Path]:
    """Those that have all their files, oldest first; the content is not read."""
    return [path for path in checkpoints_in(folder) if damage(path, thorough=False) is None]


def losses_of(checkpoints: list[Path]) -> dict[Path, float]:
    """The validation loss of those that have a finite one: older versions wrote NaN too, which is below nothing."""
    losses = {path: read_manifest(path)["val_loss"] for path in checkpoints}
    return {path: loss for path, loss in losses.items() if loss is not None and math.isfinite(loss)}


def best_of(checkpoints: list[Path]) -> Path | None:
    """By the exams, of equal ones or without any by the validation loss; None where neither is known of any."""
    losses = losses_of(checkpoints)
    exams = {path: read_manifest(path).get("exam") for path in checkpoints}
    ranks = {
        path: (-1.0 if exams[path] is None else exams[path], -losses.get(path, math.inf))
        for path in checkpoints if path in losses or exams[path] is not None
    }  # fmt: skip
    return max(ranks, key=ranks.get, default=None)


def newest_checkpoint(folder: Path, say: Callable = print) -> Path | None:
    """The newest one that is whole; damaged ones are named and passed over.

    Raises:
        UserError: there are checkpoints and none is whole; the message says why, one by one.
    """
    reasons = []
    for path in reversed(checkpoints_in(folder)):
        reason = damage(path)
        if reason is None:
            return path
        reasons.append(f"{path.name} ({reason})")
        say(f"checkpoint {path} is damaged ({reason}): trying the one before")
    if reasons:
        raise UserError(
            f"no checkpoint in {folder} is whole: {'; '.join(reasons)}. Put a copy back, or start anew: --from_resume 0"
        )
    return None


# ---- writing


def take_snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict, facts: dict, keep: bool = True
) -> Snapshot:
    """Copies on the CPU of what learns and of the optimizer's state, whole and in the names of the parameters.

    keep: where not, the snapshot stays empty; but every rank must call, because each may hold a part.
    """
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    moments = {}
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if value is not None:
                moments[f"{key}/{names[parameter]}"] = torch.as_tensor(value)
    trained = {name: parameter.detach() for parameter, name in names.items()}
    parts = [full_tensors(part.items(), keep) for part in (trained, moments)]
    return Snapshot(*({name: _copy(tensor) for name, tensor in part.items()} for part in parts), state, facts)


def write_checkpoint(folder: Path, snapshot: Snapshot, keep_last: int, say: Callable = print) -> Path:
    """Write `folder/step-<step>`, then delete what is older than the last keep_last, but never the best.

    Raises:
        DiskFull: it did not fit; what had been written of it is gone again.
        OSError: it could not be written for another reason, or what was read back is not what was written.
    """
    step = snapshot.facts["step"]
    final, aside = folder / f"step-{step:08d}", folder / f".tmp-{step}-{os.getpid()}"
    os.makedirs(folder, exist_ok=True)
    remove_litter(folder, say)
    needed = sum(t.numel() * t.element_size() for part in (snapshot.trained, snapshot.optimizer) for t in part.values())
    free = shutil.disk_usage(folder).free
    if free < needed + ROOM:
        raise DiskFull(_no_room(folder, needed, free))
    try:
        os.mkdir(aside)
        _write_files(aside, snapshot)
    except OSError as error:
        _remove(aside, say)
        if error.errno in NO_ROOM:
            raise DiskFull(_no_room(folder, needed, shutil.disk_usage(folder).free)) from error
        raise
    if final.exists():  # damaged, or it would have been gone on from
        os.rename(final, folder / f".tmp-replaced-{step}-{os.getpid()}")
    os.rename(aside, final)
    sync_to_disk(folder)
    _rotate(folder, keep_last, say)
    return final


def remove_litter(folder: Path, say: Callable = print) -> None:
    """Delete what killed runs left half-written or half-deleted."""
    for path in folder.glob(".tmp-*"):
        _remove(path, say)


def _write_files(aside: Path, snapshot: Snapshot) -> None:
    contents = {  # one at a time in memory
        TRAINED: lambda: to_bytes(snapshot.trained),
        OPTIMIZER: lambda: to_bytes(snapshot.optimizer),
        STATE: lambda: json.dumps(snapshot.state).encode(),
    }
    files = {name: _write(aside / name, content()) for name, content in contents.items()}
    for name, written in files.items():
        if file_sha256(aside / name) != written["sha256"]:
            raise OSError(f"{aside / name} reads back other than it was written: is the disk failing?")
    manifest = {"format": FORMAT, **snapshot.facts, "files": files}
    _write(aside / MANIFEST, json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1).encode())
    sync_to_disk(aside)


def _write(path: Path, content: bytes) -> dict:
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for start in range(0, len(content), CHUNK):
            chunk = memoryview(content)[start : start + CHUNK]
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "sha256": digest.hexdigest()}


def _rotate(folder: Path, keep_last: int, say: Callable) -> None:
    """Keep the last keep_last that have all their files, and the best."""
    whole = whole_in(folder)
    kept, best = whole[-keep_last:], best_of(whole)
    for path in checkpoints_in(folder):
        if path < kept[0] and path != best:
            gone = folder / f".tmp-gone-{path.name}"
            try:
                os.rename(path, gone)  # so that a kill in between leaves no damaged checkpoint, but litter
            except OSError as error:
                say(f"old checkpoint {path} cannot be deleted ({error.strerror}); training goes on")
            else:
                _remove(gone, say)


def _remove(path: Path, say: Callable) -> None:
    try:
        for file in path.iterdir():
            os.unlink(file)
        os.rmdir(path)
    except OSError as error:
        say(f"{path} cannot be deleted ({error.strerror}); training goes on")


# ---- reading


def load_tensors(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill what learns and the optimizer's state. Raises UserError naming what does not fit.

    The groups with their rates and decays stay as the flags of this run made them.
    """
    trained, moments = (_load(path / name) for name in (TRAINED, OPTIMIZER))
    expected = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if set(trained) != set(expected):
        differing = sorted(set(trained) ^ set(expected))
        raise UserError(f"{path} is of another model or stage: {len(differing)} tensors differ, first {differing[0]}")
    with torch.no_grad():
        for name, parameter in expected.items():
            if trained[name].shape != parameter.shape:
                raise UserError(f"{path}: {name} is {[*trained[name].shape]}, the model's is {[*parameter.shape]}")
            parameter.copy_(local_part(trained[name], parameter))
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in moments.items():
        kind, name = key.split("/", 1)
        by_name.setdefault(name, {})[kind] = local_part(value, expected[name]) if name in expected else value
    if unknown := set(by_name) - set(expected):
        raise UserError(f"{path}: the optimizer knows {sorted(unknown)[0]}, which does not learn here")
    names = {parameter: name for name, parameter in expected.items()}
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state = {number: by_name[name] for number, name in enumerate(ordered) if name in by_name}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def load_state(path: Path) -> dict:
    return json.loads((path / STATE).read_bytes())


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no safetensors file ({error}): it is not one of our checkpoints") from error


def differences(expected: dict, found: dict) -> Iterator[str]:
    """`key: expected 1, found 2` of every key that the two do not share, in the order of the keys."""
    for key in [*expected, *(key for key in found if key not in expected)]:
        if expected.get(key) != found.get(key):
            yield f"{key}: expected {expected.get(key, 'nothing')}, found {found.get(key, 'nothing')}"


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _no_room(folder: Path, needed: int, free: int) -> str:
    return f"a checkpoint needs {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB can be written in {folder}"


def _digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
