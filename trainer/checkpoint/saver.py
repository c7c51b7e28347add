"""Saver: validates, holds exams, and writes weights and checkpoints while training goes on."""

import json
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from model.tokenizer_files import TOKENIZER, tokenizer_text
from model.weights import decoder_arguments, save_weights
from trainer.checkpoint.files import Snapshot, take_snapshot, write_checkpoint
from trainer.checkpoint.fingerprint import versions
from trainer.checkpoint.probe import probe_facts
from trainer.checkpoint.resume import rank_state, state_to_json
from trainer.data import StageData
from trainer.distributed import full_tensors
from trainer.evaluate import validation_loss
from trainer.exams import ExamFailed, Marks, take_exams
from trainer.guard.run_folder import Fatal, RunFolder
from trainer.guard.signals import Stopped, StopRequest
from trainer.report.metrics import Report
from trainer.run import Run

MOST_FAILURES = 3  # saves in a row that may fail before the run gives up
GIVE_UP = 1000  # above every signal's number: the flag with which ranks agree that saving has failed too often
SLOW = 15.0  # seconds
SLOW_STOP = (
    "this {what} took {seconds:.0f} s and torchrun gives a stopped run 30: start it with --shutdown-timeout 120, or a "
    "stop may end before its save does"
)


class CannotSave(Fatal):
    """Checkpoints could not be written several times in a row, or the last one could not."""

    state = "fatal-disk"


class Saver:
    """Every rank calls; rank 0 writes. What it copies from the devices is all that training waits for.

    Within `with`; at its end the last save is on disk, or CannotSave is raised on every rank.
    """

    def __init__(self, run: Run, data: StageData, report: Report, folder: RunFolder, stop: StopRequest):
        self.run, self.data, self.report, self.run_folder, self.stop = run, data, report, folder, stop
        self.folder = run.config.run_dir / "checkpoints"
        self.last_path: Path | None = None
        self.seconds = 0.0  # that training waited
        self.marks: dict = {}  # of the last exams, for status.json
        self._writer: threading.Thread | None = None
        self._failures: list[Exception] = []  # of the saves since the last good one

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.wait()
        if kind is None:
            self.check(most=1)
            self.run_folder.update(**self._progress())

    def after_step(self, settle: Callable[[], None]) -> None:
        """Save when it is time or when a signal asks a rank for it, then raise Stopped, both on every rank alike.

        settle: called before anything is saved, so that what is wrong with the last steps is known by then.
        """
        step, last, runtime = self.run.state.step, self.run.order.total_steps, self.run.runtime
        runtime.leave_step(step)
        given_up = len(self._failures) >= MOST_FAILURES
        asked = runtime.max(GIVE_UP if given_up else self.stop.number())
        if asked == GIVE_UP:
            self.check()
        due, exams_due = self._due(step, last)
        if due or exams_due or asked:
            settle()
        if due or exams_due:
            started = time.perf_counter()
            self.save(due, exams_due)
            self.run.model.train()
            self.report.meter.pause(time.perf_counter() - started)
        if asked and step < last:
            if not due:
                self.save_checkpoint()
            self.wait()
            self.run_folder.update(**self._progress())
            runtime.barrier()  # a rank that left earlier would have the others killed while they write
            raise Stopped(asked)
        self.run_folder.update_seldom(**self._progress())

    def _due(self, step: int, last: int) -> tuple[bool, bool]:
        """Whether it is time for a save, and for exams."""
        config = self.run.config
        due = step % config.save_interval == 0 or step == last
        exams_due = step % config.eval_interval == 0 or step == last if config.eval_interval else due
        return due, exams_due and bool(self.data.exams)

    def save(self, due: bool = True, exams_due: bool = False) -> None:
        """Validate, hold the exams if they are due, write the best weights if these are; if a save is due (every
        save_interval and at the end), write the weights and a checkpoint."""
        config = self.run.config
        loss, is_best = self._validate()
        marks = None
        if exams_due:
            marks, is_best = self._examine(loss)
        paths = [config.weight_path] * due + [config.best_path] * is_best
        written = self._write_weights(paths, loss, marks) if paths else True
        if due:
            self.save_checkpoint(loss, marks, written)

    def _write_weights(self, paths: list[Path], loss: float | None, marks: Marks | None) -> bool:
        """False where that failed."""
        run, config = self.run, self.run.config
        facts = {"stage": config.name, "step": str(run.state.step), "stage_config": json.dumps(vars(config))}
        if loss is not None:
            facts["val_loss"] = f"{loss:.4f}"
        if marks is not None:
            facts["exam"] = f"{marks.mean:.4f}"
        facts |= probe_facts(run.model, self.data.processor)
        written, started = True, time.perf_counter()
        tensors = full_tensors(run.model.state_dict().items(), keep=run.runtime.is_main)
        if run.runtime.is_main:
            facts[TOKENIZER] = tokenizer_text(self.data.processor.tokenizer)
            try:
                for path in paths:
                    save_weights(run.model, path, facts, tensors)
            except (OSError, RuntimeError, SafetensorError) as error:
                self._failed(error)
                written = False
        self.seconds += time.perf_counter() - started
        return written

    def save_checkpoint(
        self, val_loss: float | None = None, marks: Marks | None = None, weights_written: bool = True
    ) -> None:
        """Copy everything now and write it in the background; wait first for the save before.

        weights_written: where not, this save has failed whatever follows.
        """
        started, run = time.perf_counter(), self.run
        ranks = run.runtime.gather(rank_state(run))
        if run.runtime.is_main:
            self.wait()
        self.check()
        facts = {
            "stage": run.config.name,
            "step": run.state.step,
            "position": run.state.position,
            "val_loss": val_loss if val_loss is not None and math.isfinite(val_loss) else None,
            "order_batch": run.order.first_batch,
            "world_size": run.runtime.world_size,
            "versions": versions(),
            "fingerprints": run.fingerprints,
            "decoder": decoder_arguments(run.model.config.to_dict()),
            **({} if marks is None else {"exam": marks.mean}),
        }
        contents = state_to_json(run, ranks)
        snapshot = take_snapshot(run.model, run.optimizer, contents, facts, keep=run.runtime.is_main)
        if run.runtime.is_main:
            self._writer = threading.Thread(target=self._write, args=(snapshot, weights_written), name="checkpoint")
            self._writer.start()
        self.seconds += time.perf_counter() - started

    def wait(self) -> None:
        """Until what was handed over is on disk, or has failed."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def check(self, most: int = MOST_FAILURES) -> None:
        """Raises CannotSave on every rank once the last `most` saves failed."""
        failed = self._failures and len(self._failures) >= most
        reason = str(self._failures[-1]) if failed else None
        reason = self.run.runtime.gather(reason)[0]
        if reason is not None:
            raise CannotSave(
                f"the last {len(self._failures) or 'few'} saves failed: {reason}. Make room or give another "
                "--save_dir; what was saved before is whole, --from_resume 1 goes on from there"
            )

    def _validate(self) -> tuple[float | None, bool]:
        """The loss, and whether it is the best so far; where there are exams, those decide that."""
        if self.data.validation is None:
            return None, False
        state, loss = self.run.state, validation_loss(self.run, self.data)
        is_best = math.isfinite(loss) and loss < state.best and not self.data.exams
        if is_best:
            state.best = loss
        remark = ", the best" if is_best else "" if math.isfinite(loss) else ", which is never the best"
        self.report.write({"step": state.step, "val_loss": loss})
        self.report.say(f"step {state.step}: validation loss {loss:.4f}{remark}")
        return loss, is_best

    def _examine(self, loss: float | None) -> tuple[Marks | None, bool]:
        """What the exams came to, and whether that is the best so far; of equal marks the lower validation loss is.

        None where they failed, which costs the run nothing else.
        """
        state, exams, started = self.run.state, self.data.exams, time.perf_counter()
        try:
            marks = take_exams(self.run, exams, self.data.processor)
        except ExamFailed as error:
            self.report.say(f"step {state.step}: the exams failed ({error}); training goes on, the next ones try again")
            return None, False
        seconds = time.perf_counter() - started
        if state.exams != exams.identity:
            if state.exams:
                self.report.say("the exams are not those of before: the best is chosen anew")
            state.exams, state.best_exam = exams.identity, -1.0
        loss = loss if loss is not None and math.isfinite(loss) else math.inf
        is_best = (marks.mean, -loss) > (state.best_exam, -state.best)
        if is_best:
            state.best_exam, state.best = marks.mean, loss
        self.marks = {"exams": {"step": state.step, **marks.status()}}
        self.report.write({"step": state.step, **marks.record()})
        remark = ", the best" if is_best else ""
        self.report.say(f"step {state.step}: exam {marks.mean:.4f}{remark} ({marks}; {seconds:.1f} s)")
        if seconds > SLOW and "TORCHELASTIC_RUN_ID" in os.environ:
            self.report.say(SLOW_STOP.format(what="exam", seconds=seconds))
        return marks, is_best

    def _progress(self) -> dict:
        state, order = self.run.state, self.run.order
        last = self.last_path or state.resumed_from
        return {
            "step": state.step,
            "total_steps": order.total_steps,
            "epoch": order.epoch(state.step),
            "samples_seen": state.position,
            "samples_skipped": state.samples_skipped,
            "steps_skipped": state.steps_skipped,
            "last_checkpoint": str(last) if last else None,
            "seconds_saving": round(self.seconds, 3),
            **self.marks,
        }

    def _write(self, snapshot: Snapshot, weights_written: bool) -> None:
        started = time.perf_counter()
        try:
            self.last_path = write_checkpoint(self.folder, snapshot, self.run.config.keep_last, self.report.say)
            if weights_written:
                self._failures.clear()
            if time.perf_counter() - started > SLOW and "TORCHELASTIC_RUN_ID" in os.environ:
                self.report.say(SLOW_STOP.format(what="save", seconds=time.perf_counter() - started))
        except Exception as error:  # handed over: check() raises it in the thread that trains
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self._failures.append(error)
        self.report.say(f"saving failed ({error}); training goes on, the next save tries again")
