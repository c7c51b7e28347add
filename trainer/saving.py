"""Saver: validates, and writes weights and checkpoints while training goes on."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError

from model.model_minimind import MiniMindForCausalLM
from model.weights import save_weights
from trainer.checkpoint import Snapshot, take_snapshot, write_checkpoint
from trainer.config import StageConfig
from trainer.fingerprint import versions
from trainer.metrics import Metrics
from trainer.order import Order
from trainer.resplit import ResplitOrder
from trainer.run_state import RunState
from trainer.runtime import Runtime

MOST_FAILURES = 3  # saves in a row that may fail before the run gives up


class CannotSave(ValueError):
    """Checkpoints could not be written several times in a row, or the last one could not."""


class Saver:
    """Every rank calls; rank 0 writes. What it copies from the devices is all that training waits for."""

    def __init__(
        self, config: StageConfig, model: MiniMindForCausalLM, optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler, order: Order | ResplitOrder, found: dict,
        validate: Callable[[], float] | None, metrics: Metrics, runtime: Runtime,
    ):  # fmt: skip
        """found: the run's fingerprints. validate: measures the validation loss, called on every rank."""
        self.config, self.model, self.optimizer, self.scaler = config, model, optimizer, scaler
        self.order, self.found, self.validate = order, found, validate
        self.metrics, self.runtime = metrics, runtime
        self.folder = config.run_dir / "checkpoints"
        self.last_saved = -1  # step
        self.last_path: Path | None = None
        self.seconds = 0.0  # that training waited
        self._writer: threading.Thread | None = None
        self._failures: list[Exception] = []  # of the saves since the last good one

    def full(self, state: RunState) -> None:
        """Every save_interval and at the end: validate, write the weights (and the best), write a checkpoint."""
        loss, is_best = self._validate(state)
        facts = {
            "stage": self.config.name, "step": str(state.step), "stage_config": json.dumps(vars(self.config)),
            **({} if loss is None else {"val_loss": f"{loss:.4f}"}),
        }  # fmt: skip
        paths = [self.config.weight_path]
        if is_best:
            paths.append(self.config.weight_path.with_name(f"{self.config.weight_name}_best.safetensors"))
        whole = True
        if self.runtime.is_main:
            try:
                for path in paths:
                    save_weights(self.model, path, facts)
            except (OSError, RuntimeError, SafetensorError) as error:
                self._failed(error)
                whole = False
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
        if self.runtime.is_main:
            facts = {
                "stage": self.config.name, "step": state.step, "position": state.position, "val_loss": val_loss,
                "order_batch": getattr(self.order, "whole", self.order).global_batch,
                "world_size": self.runtime.world_size, "versions": versions(), "fingerprints": self.found,
            }  # fmt: skip
            snapshot = take_snapshot(self.model, self.optimizer, state.to_json(self.scaler, ranks), facts)
            self._writer = threading.Thread(target=self._write, args=(snapshot, whole), name="checkpoint")
            self._writer.start()
        self.last_saved = state.step
        self.seconds += time.perf_counter() - started

    def wait(self) -> None:
        """Until what was handed over is on disk, or has failed."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def finish(self) -> None:
        """Wait for the last save of a run, on every rank. Raises CannotSave where it failed."""
        self.wait()
        self.check(most=1)

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
        is_best, state.best = loss < state.best, min(loss, state.best)
        self.metrics.write({"step": state.step, "val_loss": loss})
        self.metrics.say(f"step {state.step}: validation loss {loss:.4f}{', the best' if is_best else ''}")
        return loss, is_best

    def _write(self, snapshot: Snapshot, whole: bool) -> None:
        try:
            self.last_path = write_checkpoint(self.folder, snapshot, self.config.keep_last, self.metrics.say)
            if whole:
                self._failures.clear()
        except Exception as error:  # handed over: check() raises it in the thread that trains
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self._failures.append(error)
        self.metrics.say(f"saving failed ({error}); training goes on, the next save tries again")
