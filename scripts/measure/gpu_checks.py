"""What scripts/gpu_check.py checks: each check a function of the machine that returns figures, or raises why not."""

import contextlib
import gc
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch.nn.parallel import DistributedDataParallel

from model.config import VLMConfig
from model.device import peak_flops
from model.inference.answerer import Answerer, Options
from model.model_vlm import MiniMindVLM
from scripts.measure.generation import ROWS, one_batch
from scripts.measure.memory import FREE, Account, Step, step_memory
from scripts.measure.real_step import RealStep, flops_of
from scripts.measure.stage_runs import arguments_of, build_data, stage_metrics
from scripts.quickstart import BASE, FLAGS, PICTURES, STAGE_2

NAMES = ("collectives", "steps", "stages", "decoding", "quickstart")
STAGE_NAMES = {"stage 1": "pretrain_vlm", "stage 2": "sft_vlm"}
# Of the quickstart's stage 2 on all of its data. A guess, as nobody has timed it on a GPU: five minutes on two cores.
QUICKSTART_SECONDS = 240
WINDOWS = 5  # of which the median counts
LEAST_PICTURES = 32  # of it: the first log lines do not count


class Skipped(Exception):
    """This machine cannot do it; the message says why."""


@dataclass(frozen=True)
class Scale:
    sizes: tuple[tuple[int, int], ...] = (
        (512, 8),
        (768, 16),
    )  # hidden_size, layers; the first is compiled, and answers
    vision_config: dict | None = None  # None: CLIP-ViT-B/16's
    rows: int = 256  # a step at most, halved until it fits
    tokens: int = 256  # a row
    supervised: int = 25
    count: int = 4  # steps a window
    new_tokens: int = 64  # an answer
    pictures: int = 512  # for the stage scripts
    batch_size: int = 32  # of theirs, a rank
    log_interval: int = 2
    num_workers: int = 4
    quickstart: float = 1.0  # fraction of the quickstart's data, at most


FULL = Scale()
TINY = Scale(
    sizes=((32, 1), (48, 2)),
    vision_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                   "image_size": 32, "patch_size": 16},
    rows=2, tokens=24, supervised=10, count=1, new_tokens=4,
    pictures=16, batch_size=4, log_interval=1, num_workers=0, quickstart=0.002,
)  # fmt: skip


@dataclass(frozen=True)
class Machine:
    device: torch.device
    dtype: torch.dtype  # that training uses by itself
    scale: Scale
    ranks: int  # under torchrun, at most
    folder: Path  # for what the checks write
    ends: float = float("inf")  # by time.perf_counter(), for all checks together

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def backend(self) -> str:
        return "nccl" if self.on_gpu else "gloo"

    def seconds_left(self) -> float:
        return self.ends - time.perf_counter()

    def config(self, size: tuple[int, int]) -> VLMConfig:
        return VLMConfig(hidden_size=size[0], num_hidden_layers=size[1], vision_config=self.scale.vision_config)

    def step(self, stage: str, size: tuple[int, int], rows: int, cached: bool) -> Step:
        return Step(self.config(size), STAGE_NAMES[stage], rows, self.scale.tokens, self.scale.supervised, cached,
                    self.dtype, device=self.device.type)  # fmt: skip

    def facts(self) -> dict[str, str]:
        """Versions, card, and how fast it multiplies, which MFU is a fraction of."""
        facts = {"card": platform.processor() or platform.machine(), "python": platform.python_version(),
                 "torch": torch.__version__, "transformers": transformers.__version__}  # fmt: skip
        if self.on_gpu:
            card = torch.cuda.get_device_properties(self.device)
            facts["card"] = f"{torch.cuda.device_count()} x {card.name}, {card.total_memory / 1e9:.0f} GB"
            facts["compute capability"] = f"{card.major}.{card.minor}"
            facts["CUDA"] = str(torch.version.cuda)
            if dist.is_nccl_available():
                facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        name = str(self.dtype).removeprefix("torch.")
        return {**facts, f"{name} products": f"{peak_flops(self.device, self.dtype) / 1e12:,.3g} TFLOP/s"}


@dataclass(frozen=True)
class Figures:
    samples_per_second: float | None = None
    mfu: float | None = None
    peak_gb: float | None = None
    predicted_gb: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Check:
    name: str  # of NAMES
    setting: str
    seconds: int  # that it may take
    run: Callable[[Machine], Figures]


def checks_of(machine: Machine) -> list[Check]:
    """In the order of their worth, as there may be no time for the last."""
    sizes = machine.scale.sizes
    checks = [Check("collectives", f"{machine.backend}, one process", 30, collectives)]
    for stage in STAGE_NAMES:
        for size in sizes:
            for cached in (True, False):
                setting = f"{stage}, {size[0]} x {size[1]}, {'cached' if cached else 'online'}"
                checks.append(Check("steps", setting, 40, partial(steps, stage, size, cached)))
    checks.append(Check("stages", "data", 60, stage_data))
    for setting, stage, ranks, flags in stage_settings(machine):
        checks.append(Check("stages", setting, 120, partial(stage_run, stage, ranks, flags)))
    for rows in (1, ROWS):
        checks.append(Check("decoding", f"batch {rows}", 60, partial(decoding, rows)))
    for stage in STAGE_NAMES:
        setting = f"{stage}, {sizes[0][0]} x {sizes[0][1]}, cached, compiled"
        checks.append(Check("steps", setting, 90, partial(steps, stage, sizes[0], True, compiled=True)))
    return [*checks, Check("quickstart", "stage 2", QUICKSTART_SECONDS, quickstart)]


def stage_settings(machine: Machine) -> list[tuple[str, str, int, dict]]:
    """(setting, stage, ranks under torchrun or 0, flags) of each run of a stage script."""
    powers_of_two = {2**power for power in range(machine.ranks.bit_length())}
    return [
        ("stage 1, one process, bfloat16", "stage 1", 0, {"dtype": "bfloat16"}),
        ("stage 2, one process, bfloat16", "stage 2", 0, {"dtype": "bfloat16"}),
        ("stage 2, one process, float16", "stage 2", 0, {"dtype": "float16"}),
        ("stage 2, one process, --compile 1", "stage 2", 0, {"compile": 1}),
        *((f"stage 2, torchrun {ranks}, {machine.backend}", "stage 2", ranks, {})
          for ranks in sorted(powers_of_two | {machine.ranks})),
    ]  # fmt: skip


def collectives(machine: Machine) -> Figures:
    """A step under DistributedDataParallel has the gradients of one without: the only test of NCCL on a single GPU."""
    step = machine.step("stage 2", machine.scale.sizes[0], rows=2, cached=True)
    real = RealStep(step, machine.device)
    batch, gradients = real.make_batch(step), []
    dist.init_process_group(machine.backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        for model in (real.model, DistributedDataParallel(real.model)):
            real.optimizer.zero_grad()
            step.loss(model, batch).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in real.learning]))
        del model
    finally:
        dist.destroy_process_group()
    difference = float((gradients[0] - gradients[1]).norm() / gradients[0].norm())
    if not difference < 1e-2:  # also where it is NaN; a GPU adds in any order
        raise RuntimeError(
            f"gradients under {machine.backend} differ by {difference:.2g} of their norm from those without"
        )
    return Figures(note=f"gradients differ by {difference:.1g}")


def steps(stage: str, size: tuple[int, int], cached: bool, machine: Machine, compiled: bool = False) -> Figures:
    """Steps whose batch lies on the device before the clock starts: neither loader nor host count."""
    if compiled:
        _need_compiler()
        torch.compiler.reset()  # what other models' layers compiled counts against the same limit
    device, limit, kind = machine.device, float("inf"), machine.device.type
    if machine.on_gpu:
        limit = (1 - FREE) * torch.cuda.mem_get_info(device)[0]
        kind = "old_cuda" if torch.cuda.get_device_capability(device) < (8, 0) else "cuda"
    step = machine.step(stage, size, machine.scale.rows, cached)
    while (predicted := step_memory(replace(step, device=kind)).peak) > limit and step.rows > 1:
        step = replace(step, rows=step.rows // 2)
    return replace(
        measure_steps(step, machine, compiled),
        predicted_gb=None if compiled else predicted / 1e9,  # eager steps are counted
        note=f"{step.rows} rows of {step.tokens} tokens, {step.supervised} learnt",
    )


def measure_steps(step: Step, machine: Machine, compiled: bool = False) -> Figures:
    """The median of WINDOWS windows of steps, after two steps that only tell the memory.

    On a GPU its allocator tells the peak. On a CPU, which has none that could, the tensors are counted, unless
    compiled code hides them.
    """
    device, on_gpu = machine.device, machine.on_gpu
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
    with contextlib.nullcontext() if on_gpu or compiled else Account() as account:
        real = RealStep(step, device, compiled)
        batch = real.make_batch(step)
        real.timed(step, batch)  # the optimizer has its state after it
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        elif account:
            account.peak = account.live
        real.timed(step, batch)
    peak = account.peak / 1e9 if account else None
    if on_gpu:
        peak = (torch.cuda.max_memory_allocated(device) - before) / 1e9
    seconds = statistics.median(real.mean_seconds(step, batch, machine.scale.count) for _ in range(WINDOWS))
    best = peak_flops(device, machine.dtype)
    mfu = flops_of(step, real.model) / seconds / best if best else None
    return Figures(step.rows / seconds, mfu, peak)


def stage_data(machine: Machine) -> Figures:
    pictures = machine.scale.pictures
    build_data(machine.folder / "data", pictures, pictures)
    return Figures(note=f"{pictures} pictures of Emoji World a stage")


def stage_run(stage: str, ranks: int, flags: dict, machine: Machine) -> Figures:
    """The stage script as a process of its own, its figures from metrics.jsonl."""
    if flags.get("dtype") == "float16" and not machine.on_gpu:
        raise Skipped("float16 is for GPUs")
    if flags.get("dtype") == "bfloat16" and machine.on_gpu and machine.dtype == torch.float16:
        raise Skipped("this GPU has no bfloat16")
    if flags.get("compile"):
        _need_compiler()
    scale, name = machine.scale, STAGE_NAMES[stage].removesuffix("_vlm")
    data = machine.folder / f"data/{name}.jsonl"
    if not data.is_file():
        raise RuntimeError("there is no data, see the check before")
    hidden_size, layers = scale.sizes[0]
    flags = {
        # Ranks find their own device, cuda:0 would put all on one.
        "device": machine.device.type if ranks else machine.device, "data_path": data, "from_weight": "none",
        "hidden_size": hidden_size, "num_hidden_layers": layers, "batch_size": scale.batch_size,
        "epochs": max(1, ranks), "log_interval": scale.log_interval, "num_workers": scale.num_workers,
        "cache_features": "float16", **flags,
    }  # fmt: skip
    folder = machine.folder / f"{name}_{ranks}_{flags.get('dtype', '')}_{flags.get('compile', 0)}"
    return _figures_of(stage_metrics(f"train_{STAGE_NAMES[stage]}", arguments_of(flags), folder, ranks))


def _figures_of(lines: Sequence[dict], note: str = "") -> Figures:
    medians = {name: statistics.median(line[name] for line in lines)
               for name in ("rows_per_second", "mfu", "data_wait") if name in lines[0]}  # fmt: skip
    note += f"loss {lines[-1]['loss']:.2f}, {medians['data_wait']:.0%} of the time waiting for data"
    peak = max(line["memory_gb"] for line in lines)
    return Figures(medians["rows_per_second"], medians.get("mfu"), peak, note=note)


def decoding(rows: int, machine: Machine) -> Figures:
    """Tokens a second of answers about a picture each, as the demo and the score ask for them."""
    torch.manual_seed(0)
    engine = Answerer(MiniMindVLM(machine.config(machine.scale.sizes[0])), machine.device, machine.dtype)
    engine.end_ids = frozenset()  # nothing ends an answer but its length
    options = Options(max_new_tokens=machine.scale.new_tokens)
    speeds = {}
    for graphs in (False, True) if machine.on_gpu else (False,):
        engine.reader.decoder.graphs = graphs
        for first in (1000, 2000):  # the first round loads kernels
            figures = one_batch(engine, options, lambda row, first=first: first + row)
        speeds[graphs] = figures["one_after_another_decode" if rows == 1 else "together_decode"]
    note = f"{speeds[max(speeds)]:,.0f} tokens/s after the first token"
    if rows == 1:
        note += f", which comes after {1000 * figures['first_seconds']:.1f} ms"
    if True in speeds:
        note += f"; without CUDA graphs {speeds[False]:,.0f}"
    return Figures(note=note)


def quickstart(machine: Machine) -> Figures:
    """Stage 2 with the quickstart's flags, from its base decoder, on as much of its data as the time allows."""
    in_time = 0.8 * machine.seconds_left() / QUICKSTART_SECONDS  # reading and drawing need some, too
    pictures = max(LEAST_PICTURES, round(min(machine.scale.quickstart, in_time) * PICTURES["sft"]))
    data = machine.folder / "quickstart_data"
    build_data(data, pictures)
    flags = {"data_path": data / "sft.jsonl", "from_weight": BASE, "device": machine.device}
    if machine.scale.log_interval == 1:
        flags["log_interval"] = 1
    lines = stage_metrics("train_sft_vlm", [*arguments_of(flags), *STAGE_2], machine.folder / "quickstart")
    return _figures_of(lines, f"{pictures:,} of its {PICTURES['sft']:,} pictures, batches of {FLAGS[1]}, ")


def _need_compiler() -> None:
    if not shutil.which("g++"):
        raise Skipped("no C++ compiler (g++)")
