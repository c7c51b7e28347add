"""Losses and gradients that are not finite: the step is skipped on every rank, its rows are named, three end a run.

A loss that is NaN or infinite on one rank makes that rank's gradient NaN, DDP's sum carries it to all, so the norm of
the gradient is the one flag that every rank sees, without a collective of its own. The optimizer reads it on the device
and leaves everything as it was; the host reads it one step late on a GPU, so that neither waits for the other.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Callable

import torch

from trainer.guard.run_folder import Fatal
from trainer.report.metrics import Report, drop_records_after
from trainer.run import Run

MOST_IN_A_ROW = 3
SKIPPED = "skipped_steps.jsonl"
REMEMBERED = 20  # logged losses that a spike is measured against
SPIKE = 6.0  # standard deviations above their mean, and at least this share of the mean:
LEAST_DEVIATION = 0.02


class NotFinite(Fatal):
    state = "fatal-nonfinite"


def carry_to_gradient(loss: torch.Tensor) -> torch.Tensor:
    """The loss as it is, to the bit; where it is not finite, every gradient that it gives is NaN."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def step_if_finite(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, norm: torch.Tensor) -> None:
    """The optimizer's step, unless the gradient's norm is NaN or infinite: then nothing changes.

    float16's scaler finds out by itself; a fused optimizer is told on the device; for others the host waits.
    """
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
    elif optimizer.defaults.get("fused"):
        optimizer.found_inf = norm.isfinite().logical_not().float()
        optimizer.step()
    elif norm.isfinite():
        optimizer.step()


class FiniteCheck:
    """Gets what every step returned; the good ones go into the state's window, the others are written down."""

    def __init__(self, run: Run, where: Callable[[int], str], report: Report):
        """where: file and line of a row of the order."""
        self.run, self.where, self.report = run, where, report
        self.path = run.config.run_dir / SKIPPED
        self._pending: deque = deque()
        self._late = 1 if run.runtime.device.type == "cuda" else 0
        if run.runtime.is_main:
            drop_records_after(self.path, run.state.step)

    def check(self, step: int, values: dict) -> None:
        """values of train_step for `step`, counted from 0. Raises NotFinite at the third bad one in a row."""
        self._pending.append((step, values, *_to_host(values["grad_norm"])))
        self.settle(self._late)

    def settle(self, left: int = 0) -> None:
        """Look at all but the last `left` steps; before a log line or a save at all of them."""
        while len(self._pending) > left:
            step, values, norm, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            if math.isfinite(norm):
                self.run.state.window.append(values)
                self.run.state.skipped_in_a_row = 0
            else:
                self._skipped(step, values, float(norm))

    def spike(self, step: int, loss: float) -> None:
        """Note a logged loss; say so where it stands out from the last ones."""
        recent = self.run.state.recent_losses
        if len(recent) >= REMEMBERED // 4:
            usual = statistics.fmean(recent)
            deviation = max(statistics.pstdev(recent), LEAST_DEVIATION * abs(usual))
            if loss > usual + SPIKE * deviation:
                self.report.write({"step": step, "loss_spike": loss, "usual_loss": usual})
                self.report.say(f"step {step}: the loss jumped to {loss:.3f}, usual is {usual:.3f}")
        self.run.state.recent_losses = [*recent, loss][-REMEMBERED:]

    def _skipped(self, step: int, values: dict, norm: float) -> None:
        state, scaler, runtime = self.run.state, self.run.scaler, self.run.runtime
        state.steps_skipped += 1
        state.samples_skipped += self.run.order.global_batch
        if scaler.is_enabled() and scaler.get_scale() >= 1:
            return  # float16's daily work: the scale was too large and is being halved
        state.skipped_in_a_row += 1
        losses = runtime.gather(float(values["loss"]))
        ranks = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        by_rank = next(self.run.order.rows_by_rank(step))
        rows = [self.where(row) for rank in ranks or range(runtime.world_size) for row in by_rank[rank]]
        record = {
            "step": step + 1,
            "losses": [str(loss) for loss in losses],
            "grad_norm": str(norm),
            "ranks": ranks,
            "samples": rows,
        }
        if runtime.is_main:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        cause = f"the loss of rank {', '.join(map(str, ranks))}" if ranks else "the gradient"
        self.report.say(
            f"step {step + 1} skipped: {cause} is not finite; its {len(rows)} rows are named in {self.path}"
        )
        if state.skipped_in_a_row >= MOST_IN_A_ROW:
            raise NotFinite(
                f"{MOST_IN_A_ROW} steps in a row had a loss or gradient that is not finite, the last was step "
                f"{step + 1}: look at the rows named in {self.path}, lower --learning_rate, or use --dtype float32; "
                "the checkpoint before is whole"
            )


def _to_host(value: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """The value on the CPU; from a GPU it is there once the event has happened."""
    if value.device.type != "cuda":
        return value, None
    host, event = torch.empty((), dtype=value.dtype, pin_memory=True), torch.cuda.Event()
    host.copy_(value, non_blocking=True)
    event.record()
    return host, event
