"""What a run says: a progress bar, one JSON line a log interval, and Weights & Biases when asked."""

import json
import math
import os
import time
from pathlib import Path

from dataset.step_batch import Counts
from model.files import written_aside
from model.messages import UserError
from model.progress import Progress, say
from trainer.config import StageConfig
from trainer.report.meter import Meter, useful_flops
from trainer.report.profiling import Profiler
from trainer.run import Run


class Report:
    """All that a run says while it trains, on rank 0 only; the other ranks call it just the same."""

    def __init__(self, run: Run):
        config, state = run.config, run.state
        self.active = run.runtime.is_main
        encodes = config.cache_features in ("none", "pixels")
        self.meter = Meter(run.runtime, useful_flops(run.model, encodes))
        self.tracker = self.profiler = None
        if not self.active:
            return
        if config.use_wandb:
            self.tracker = _start_wandb(config, state.tracker_id)
            state.tracker_id = self.tracker.id  # for a resumed run to go on under it
        if config.profile:
            self.profiler = Profiler(config.profile, config.run_dir / "trace.json.gz", run.runtime.device, self.say)
        print(self.meter, flush=True)
        self.path = config.run_dir / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        drop_records_after(self.path, state.step)
        self.progress = Progress(run.order.total_steps, config.name, "step", done=state.step)
        self._started, self._first_step, self._total_steps = time.perf_counter(), state.step, run.order.total_steps

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        if self.profiler is not None:
            self.profiler.close()
        if self.active:
            self.progress.close()
        if self.tracker is not None:
            self.tracker.finish()

    def step_done(self, counts: Counts) -> None:
        """Once a step: what this rank learnt from."""
        self.meter.count(counts)
        if self.active and self.progress.is_bar:  # elsewhere `log` prints lines of its own
            self.progress.update()
        if self.profiler is not None:
            started = time.perf_counter()
            self.profiler.step_done()
            self.meter.pause(time.perf_counter() - started)

    def log(self, step: int, values: dict[str, float]) -> None:
        """A record of a training step, with the speed since the last one."""
        speed = self.meter.read()
        if self.active:
            line = f"loss {values['loss']:.3f}, {speed_line(speed)}"
            self.progress.note(line)
            if not self.progress.is_bar:
                left = (time.perf_counter() - self._started) / (step - self._first_step) * (self._total_steps - step)
                print(f"step {step}/{self._total_steps}: {line}, {left / 60:.1f} min left", flush=True)
        self.write({"step": step, **values, **speed})

    def write(self, record: dict) -> None:
        if not self.active:
            return
        record = {name: _written(value) for name, value in record.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
        if self.tracker is not None:
            known = {name: value for name, value in record.items() if name != "step" and value is not None}
            self.tracker.log(known, step=record["step"])

    def say(self, line: str) -> None:
        if self.active:
            say(line)


def speed_line(speed: dict[str, float]) -> str:
    """What Meter.read gave, for a log line; conversations where they are more than rows."""
    share = f"{100 * speed['mfu']:.1f} % mfu, " if "mfu" in speed else ""
    rows, conversations = speed["rows_per_second"], speed["conversations_per_second"]
    several = f"{_rate(conversations)} conversations, " if conversations > rows else ""
    memory = f", {speed['memory_gb']:.1f} GB" if "memory_gb" in speed else ""
    return (
        f"{_rate(rows)} rows, {several}{speed['supervised_tokens_per_second']:.0f} trained tokens/s, {share}"
        f"{100 * speed['data_wait']:.0f} % wait{memory}"
    )


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _written(value: object) -> object:
    """A value of a record as JSON can hold it: null where it is no number, which most readers of JSON refuse."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.8g}") if math.isfinite(value) else None


def drop_records_after(path: Path, step: int) -> None:
    """A new run starts an empty file; a resumed one forgets what came after its checkpoint."""
    lines = path.read_text().splitlines() if path.is_file() and step else []
    whole = [line for line in lines if line.endswith("}")]  # a killed run may leave half a line
    with written_aside(path, durable=False) as aside:  # a run that is killed here must not lose its history
        aside.write_text("".join(line + "\n" for line in whole if json.loads(line)["step"] <= step))


def _start_wandb(config: StageConfig, run_id: str):
    try:
        import wandb
    except ImportError:
        raise UserError("--use_wandb 1 needs the package: pip install wandb") from None
    config.run_dir.mkdir(parents=True, exist_ok=True)
    has_key = bool(os.environ.get("WANDB_API_KEY")) or "api.wandb.ai" in _text(Path.home() / ".netrc")
    mode = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
    return wandb.init(
        project=config.wandb_project, name=config.weight_name, dir=str(config.run_dir), mode=mode,
        id=run_id or None, resume="allow" if run_id else None,
        config={name: str(value) for name, value in vars(config).items()},
    )  # fmt: skip


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""
