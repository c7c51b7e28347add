"""Windows' stand-in: what only Unix has is taken away from a process, and one process trains there all the same."""

import json
import subprocess
import sys

from helpers.repository import ROOT
from helpers.runs import tiny, write_texts
from model.process_lock import ProcessLock
from scripts.export import folder as export_folder
from trainer.train_llm import LLM

# Libraries are imported before, as on Linux they have a right to what is taken away then. Reading processes are started
# afresh there, and folders cannot be opened.
STAND_IN = """
import asyncio, concurrent.futures, dataclasses, importlib, json, multiprocessing, os, pkgutil, signal, sys, tempfile
import huggingface_hub, pyarrow.parquet, torch, torch.distributed, torch.utils.data, transformers
import torch.utils.data._utils.signal_handling as handling
from transformers import AutoProcessor, CLIPVisionModel, LlavaForConditionalGeneration
sys.path.insert(0, sys.argv[1])
handling.IS_WINDOWS = True
multiprocessing.set_start_method("spawn")
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGALRM", "SIGKILL", "SIGQUIT"):
    delattr(signal, name)
for name in ("O_DIRECTORY", "pread", "pwrite", "fork", "getuid", "setsid"):
    delattr(os, name)
open_any, read_only, sync = os.open, set(), os.fsync
def open_file(path, flags, *rest, **named):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    descriptor = open_any(path, flags, *rest, **named)
    (read_only.discard if flags & os.O_RDWR else read_only.add)(descriptor)
    return descriptor
def fsync(descriptor):
    if descriptor in read_only:
        raise OSError(9, "Bad file descriptor")
    sync(descriptor)
os.open, os.fsync = open_file, fsync
"""
TRAIN = """
from pathlib import Path
from model.process_lock import ProcessLock, is_held
from scripts import status
from trainer.stage import run_stage
from trainer.train_llm import LLM
if __name__ == "__main__":  # not again in the processes that read
    tops = [os.path.join(sys.argv[1], top) for top in ("model", "dataset", "trainer", "scripts")]
    for top in tops:
        for found in pkgutil.iter_modules([top]):
            importlib.import_module(f"{os.path.basename(top)}.{found.name}")
    import eval_vlm, web_demo
    config = dataclasses.replace(LLM, **json.loads(sys.argv[2]))
    config.run_dir.mkdir(parents=True)
    lock = ProcessLock(config.run_dir / "lock")
    assert lock.acquire("process 12 on elsewhere") and is_held(lock.path)
    try:
        run_stage(config)
    except SystemExit as refusal:
        print(refusal)
    lock.release()
    assert not is_held(lock.path)
    run_stage(config)
    last = max((config.run_dir / "checkpoints").iterdir())
    last.rename(last.with_name(".tmp-lost"))
    run_stage(dataclasses.replace(config, from_resume=1, num_workers=1))
    status.main([str(config.run_dir)])
"""


def run(*arguments: str) -> str:
    command = [sys.executable, "-c", STAND_IN + TRAIN, str(ROOT), *arguments]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-4000:]
    return found.stdout


def test_every_module_is_imported_and_one_process_trains_and_goes_on_and_the_folder_is_locked(tmp_path):
    texts = write_texts(tmp_path)
    texts.write_text(texts.read_text() * 10)  # enough for the rendered tokens to be kept
    config = tiny(LLM, tmp_path, tmp_path, data_path=str(texts), batch_size=60, max_seq_len=32, save_interval=2)
    changed = {name: value for name, value in vars(config).items() if value != getattr(LLM, name)}
    said = run(json.dumps(changed))
    assert f"the run folder {config.run_dir} is in use by process 12 on elsewhere: wait for it" in said
    assert said.count("weights: ") == 2 and "resumed from " in said and "rendered at an earlier start" in said
    assert not [line for line in said.splitlines() if line.startswith("step ") and " GB" in line]  # it is not known
    assert f"{config.run_dir}: done" in said


def test_a_lock_is_refused_while_another_holds_it_and_names_the_holder(tmp_path, monkeypatch):
    """The road without fcntl; the one with it is in tests/trainer/guard/test_run_folder.py."""
    monkeypatch.setattr("model.process_lock.fcntl", None)
    first, second = ProcessLock(tmp_path / "lock"), ProcessLock(tmp_path / "lock")
    assert first.acquire("process 1 on here")
    assert not second.acquire("process 2 on here") and second.holder() == "process 1 on here"
    first.release()
    assert second.acquire("process 2 on here") and first.holder() == "process 2 on here"
    second.release()


def test_a_conversion_asks_windows_nothing_that_would_end_a_process(monkeypatch):
    """There os.kill(process, 0) is Ctrl+C."""
    called = []
    monkeypatch.setattr(export_folder.os, "kill", lambda *arguments: called.append(arguments))
    monkeypatch.setattr(export_folder, "WINDOWS", True)
    assert export_folder._alive(1) and not called
