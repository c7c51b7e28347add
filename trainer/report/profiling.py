"""--profile: some steps under torch's profiler, for a trace to look at and a table of what costs most."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from model.messages import counted

WARM_UP = 3  # steps before: first ones compile, fill caches, wait for the first pictures
SHOWN = 10


class Profiler:
    """Watches the steps after the first few of a run; training goes on meanwhile and afterwards."""

    def __init__(self, steps: int, path: Path, device: torch.device, say: Callable[[str], None]):
        self.steps, self.path, self.say = steps, path, say
        self.on_gpu = device.type == "cuda"
        self._left = WARM_UP + steps
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        self._profile = profile(
            activities=activities, schedule=schedule(wait=WARM_UP - 1, warmup=1, active=steps, repeat=1)
        )
        self._profile.start()

    def step_done(self) -> None:
        if self._left:
            self._left -= 1
            self._profile.step()
            if not self._left:
                self._report(self.steps)

    def close(self) -> None:
        """Of a run that ends earlier, what there is."""
        if self._left:
            watched, self._left = self.steps - self._left, 0
            self._report(watched)

    def _report(self, steps: int) -> None:
        self._profile.stop()
        if steps < 1:
            self.say(f"--profile: the run ended within the {WARM_UP} steps of warm-up, there is no trace")
            return
        self._profile.export_chrome_trace(str(self.path))
        self.say(table_of_operations(self._profile, self.on_gpu, steps))
        self.say(f"trace of {counted(steps, 'steps')}, for https://ui.perfetto.dev or chrome://tracing: {self.path}")


def table_of_operations(profiled: profile, on_gpu: bool, steps: int) -> str:
    """Name, milliseconds a step in the operation itself, share of all, calls a step; the slowest first."""

    def cost(operation) -> float:
        return operation.self_device_time_total if on_gpu else operation.self_cpu_time_total  # microseconds

    averages = [one for one in profiled.key_averages() if one.device_type == DeviceType.CPU]  # not their kernels again
    operations = [one for one in averages if not one.key.startswith("ProfilerStep")]
    whole = sum(map(cost, operations)) or 1.0
    lines = [f"{'operation':<60}{'ms a step':>12}{'share':>9}{'calls a step':>14}"]
    for one in sorted(operations, key=cost, reverse=True)[:SHOWN]:
        share = 100 * cost(one) / whole
        lines.append(f"{one.key[:59]:<60}{cost(one) / 1000 / steps:>12.3f}{share:>7.1f} %{one.count / steps:>14.1f}")
    return "\n".join(lines)
