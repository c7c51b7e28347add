"""Saver: validates, and writes weights and checkpoints while training goes on."""

import json
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError

from model.model_minimind import MiniMindForCausalLM
from model.weights import decoder_arguments, save_weights
from trainer.checkpoint.files import Snapshot, take_snapshot, write_checkpoint
from trainer.checkpoint.fingerprint import versions
from trainer.checkpoint.resume import RunState
from trainer.config import StageConfig
from trainer.distributed import Runtime, whole_tensors
from trainer.guard.run_folder import Fatal, RunFolder
from trainer.guard.signals import Stopped, StopRequest
from trainer.order import Order, ResplitOrder
from trainer.report.metrics import Metrics

MOST_FAILURES = 3  # saves in a row that may fail before the run gives up
GIVE_UP = 1000  # above every signal's number: the flag with which ranks agree that saving has failed too often
SLOW = 15.0  # seconds


class CannotSave(Fatal):
    """Checkpoints could not be written several times in a row, or the last one could not."""

    state = "fatal-disk"


class Saver:
    """Every rank calls; rank 0 writes. What it copies from the devices is all that training waits for."""

    def __init__(
        self, config: StageConfig, model: MiniMindForCausalLM, optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler, order: Order | ResplitOrder, found: dict,
        validate: Callable[[], float] | None, probe: Callable[[], dict[str, str]], metrics: Metrics, folder: RunFolder,
        stop: StopRequest, runtime: Runtime,
    ):  # fmt: skip
        """found: the run's fingerprints. validate, probe: the validation loss, and what weights are known by at the
        next start (trainer/checkpoint/probe.py); called on every rank.
        """
        self.run_folder, self.stop = folder, stop
        self.config, self.model, self.optimizer, self.scaler = config, model, optimizer, scaler
        self.order, self.found, self.validate, self.probe = order, found, validate, probe
        self.metrics, self.runtime = metrics, runtime
        self.folder = config.run_dir / "checkpoints"
        self.last_path: Path | None = None
        self.seconds = 0.0  # that training waited
        self._writer: threading.Thread | None = None
        self._failures: list[Exception] = []  # of the saves since the last good one

    def after_step(self, state: RunState, settle: Callable[[], None]) -> None:
        """Save when it is time or when a signal asked a rank for it, then raise Stopped, both on every rank alike.

        settle: called before anything is saved, so that what is wrong with the last steps is known by then.
        """
        step, last = state.step, self.order.total_steps
        self.runtime.leave_step(step)
        given_up = len(self._failures) >= MOST_FAILURES
        asked = self.runtime.most(GIVE_UP if given_up else self.stop.number())
        if asked == GIVE_UP:
            self.check()
        due = step % self.config.save_interval == 0 or step == last
        if due or asked:
            settle()
        if due:
            started = time.perf_counter()
            self.full(state)
            self.model.train()
            self.metrics.meter.pause(time.perf_counter() - started)
        if asked and step < last:
            if not due:
                self.checkpoint(state)
            self.wait()
            self.run_folder.update(**self._progress(state))
            self.runtime.barrier()  # a rank that left earlier would have the others killed while they write
            raise Stopped(asked)
        self.run_folder.update_seldom(**self._progress(state))

    def full(self, state: RunState) -> None:
        """Every save_interval and at the end: validate, write the weights (and the best), write a checkpoint."""
        loss, is_best = self._validate(state)
        facts = {
            "stage": self.config.name, "step": str(state.step), "stage_config": json.dumps(vars(self.config)),
            **({} if loss is None else {"val_loss": f"{loss:.4f}"}), **self.probe(),
        }  # fmt: skip
        paths = [self.config.weight_path]
        if is_best:
            paths.append(self.config.best_path)
        whole, started = True, time.perf_counter()
        tensors = whole_tensors(self.model.state_dict().items(), keep=self.runtime.is_main)
        if self.runtime.is_main:
            try:
                for path in paths:
                    save_weights(self.model, path, facts, tensors)
            except (OSError, RuntimeError, SafetensorError) as error:
                self._failed(error)
                whole = False
        self.seconds += time.perf_counter() - started
        self.checkpoint(state, loss, whole)

    def checkpoint(self, state: RunState, val_loss: float | None = None, whole: bool = True) -> None:
        """Copy everything now and write it in the background; wait first for the save before.

        whole: False where the weights beside it could not be written, so that this save has failed whatever follows.
        """
        started = time.perf_counter()
        ranks = self.runtime.gather(state.own_part(self.runtime))
        if self.runtime.is_main:
            self.wait()
        self.check()
        facts = {
            "stage": self.config.name, "step": state.step, "position": state.position,
            "val_loss": val_loss if val_loss is not None and math.isfinite(val_loss) else None,
            "order_batch": getattr(self.order, "whole", self.order).global_batch,
            "world_size": self.runtime.world_size, "versions": versions(), "fingerprints": self.found,
            "decoder": decoder_arguments(self.model.config.to_dict()),
        }  # fmt: skip
        contents = state.to_json(self.scaler, ranks)
        snapshot = take_snapshot(self.model, self.optimizer, contents, facts, keep=self.runtime.is_main)
        if self.runtime.is_main:
            self._writer = threading.Thread(target=self._write, args=(snapshot, whole), name="checkpoint")
            self._writer.start()
        self.seconds += time.perf_counter() - started

    def wait(self) -> None:
        """Until what was handed over is on disk, or has failed."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def finish(self, state: RunState) -> None:
        """Wait for the last save of a run, on every rank. Raises CannotSave where it failed."""
        self.wait()
        self.check(most=1)
        self.run_folder.update(**self._progress(state))

    def check(self, most: int = MOST_FAILURES) -> None:
        """Raises CannotSave on every rank once the last `most` saves failed."""
        failed = self._failures and len(self._failures) >= most
        reason = str(self._failures[-1]) if failed else None
        reason = self.runtime.gather(reason)[0]
        if reason is not None:
            raise CannotSave(
                f"the last {len(self._failures) or 'few'} saves failed: {reason}. Make room or give another "
                "--save_dir; what was saved before is whole, --from_resume 1 goes on from there"
            )

    def _validate(self, state: RunState) -> tuple[float | None, bool]:
        """The loss, and whether it is the best so far."""
        if self.validate is None:
            return None, False
        loss = self.validate()
        is_best = math.isfinite(loss) and loss < state.best
        if is_best:
            state.best = loss
        remark = ", the best" if is_best else "" if math.isfinite(loss) else ", which is never the best"
        self.metrics.write({"step": state.step, "val_loss": loss})
        self.metrics.say(f"step {state.step}: validation loss {loss:.4f}{remark}")
        return loss, is_best

    def _progress(self, state: RunState) -> dict:
        last = self.last_path or state.resumed_from
        return {
            "step": state.step, "total_steps": self.order.total_steps, "epoch": self.order.epoch(state.step),
            "samples_seen": state.position, "samples_skipped": state.samples_skipped,
            "steps_skipped": state.steps_skipped, "last_checkpoint": str(last) if last else None,
            "seconds_saving": round(self.seconds, 3),
        }  # fmt: skip

    def _write(self, snapshot: Snapshot, whole: bool) -> None:
        started = time.perf_counter()
        try:
            self.last_path = write_checkpoint(self.folder, snapshot, self.config.keep_last, self.metrics.say)
            if whole:
                self._failures.clear()
            if time.perf_counter() - started > SLOW and "TORCHELASTIC_RUN_ID" in os.environ:
                self.metrics.say(
                    f"this save took {time.perf_counter() - started:.0f} s and torchrun gives a stopped run 30: start "
                    "it with --shutdown-timeout 120, or a stop may end before its save does"
                )
        except Exception as error:  # handed over: check() raises it in the thread that trains
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self._failures.append(error)
        self.metrics.say(f"saving failed ({error}); training goes on, the next save tries again")
