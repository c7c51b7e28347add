"""What scripts/gpu_check.py checks: each check a function of the machine that returns figures, or raises why not."""

import platform
import shutil
import statistics
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
from scripts.measure.memory import Step, step_memory
from scripts.measure.real_step import RealStep, throughput
from scripts.measure.stage_runs import arguments_of, build_data, stage_metrics
from scripts.quickstart import BASE, FLAGS, PICTURES, STAGE_2, TOWER

NAMES = ("collectives", "steps", "stages", "decoding", "quickstart")
STAGE_NAMES = {"stage 1": "pretrain_vlm", "stage 2": "sft_vlm"}
TINY_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16}  # fmt: skip
OF_A_CARD = 0.85  # may be predicted to be taken; CUDA itself and gaps need the rest, as scripts/estimate.py says
# Of the quickstart's stage 2 whole, with its data. A guess, as nobody has timed it on a GPU: five minutes on two cores.
QUICKSTART_SECONDS = 240
LEAST_PICTURES = 32  # of it: the first log lines do not count


class Skipped(Exception):
    """This machine cannot do it; the message says why."""


@dataclass(frozen=True)
class Scale:
    sizes: tuple[tuple[int, int], ...]  # hidden_size and num_hidden_layers; the first is compiled, too, and answers
    vision_config: dict | None  # None: CLIP-ViT-B/16's
    rows: int  # a step at most, halved until it fits
    tokens: int  # a row
    supervised: int
    count: int  # steps a window
    new_tokens: int  # an answer
    pictures: int  # for the stage scripts
    batch_size: int  # of theirs, a rank
    log_interval: int
    num_workers: int
    quickstart: float  # share of the quickstart's data, at most


FULL = Scale(((512, 8), (768, 16)), None, 256, 256, 25, 4, 64, 512, 32, 2, 4, 1.0)
TINY = Scale(((32, 1), (48, 2)), TINY_TOWER, 2, 24, 10, 1, 4, 16, 4, 1, 0, 0.002)


@dataclass(frozen=True)
class Machine:
    device: torch.device
    dtype: torch.dtype  # that training takes by itself
    scale: Scale
    ranks: int  # under torchrun, at most
    folder: Path  # for what the checks write

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def facts(self) -> dict[str, str]:
        """Versions, card, and how fast it multiplies, which MFU is a share of."""
        found = {"card": platform.processor() or platform.machine(), "python": platform.python_version(),
                 "torch": torch.__version__, "transformers": transformers.__version__}  # fmt: skip
        if self.on_gpu:
            card = torch.cuda.get_device_properties(self.device)
            found["card"] = f"{torch.cuda.device_count()} x {card.name}, {card.total_memory / 1e9:.0f} GB"
            found["compute capability"] = f"{card.major}.{card.minor}"
            found["CUDA"] = str(torch.version.cuda)
            if dist.is_nccl_available():
                found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        name = str(self.dtype).removeprefix("torch.")
        return {**found, f"{name} products": f"{peak_flops(self.device, self.dtype) / 1e12:,.3g} TFLOP/s"}


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
    run: Callable[[Machine, float], Figures]  # the float: seconds that are left for everything


def checks_of(machine: Machine) -> list[Check]:
    """In the order of their worth, as the last may be without time."""
    scale, backend = machine.scale, "nccl" if machine.on_gpu else "gloo"
    checks = [Check("collectives", f"{backend}, one process", 30, collectives)]
    for stage in STAGE_NAMES:
        for size in scale.sizes:
            for cached in (True, False):
                setting = f"{stage}, {size[0]} x {size[1]}, {'cached' if cached else 'online'}"
                checks.append(Check("steps", setting, 40, partial(steps, stage, size, cached)))
    checks.append(Check("stages", "data", 60, stage_data))
    for setting, stage, ranks, flags in stage_settings(machine, backend):
        checks.append(Check("stages", setting, 120, partial(stage_run, stage, ranks, flags)))
    for rows in (1, ROWS):
        checks.append(Check("decoding", f"batch {rows}", 60, partial(decoding, rows)))
    for stage in STAGE_NAMES:
        size = scale.sizes[0]
        setting = f"{stage}, {size[0]} x {size[1]}, cached, compiled"
        checks.append(Check("steps", setting, 90, partial(steps, stage, size, True, compiled=True)))
    checks.append(Check("quickstart", "stage 2", QUICKSTART_SECONDS, quickstart))
    return checks


def stage_settings(machine: Machine, backend: str) -> list[tuple[str, str, int, dict]]:
    """(setting, stage, ranks under torchrun or 0, flags) of each run of a stage script."""
    settings = [
        ("stage 1, one process, bfloat16", "stage 1", 0, {"dtype": "bfloat16"}),
        ("stage 2, one process, bfloat16", "stage 2", 0, {"dtype": "bfloat16"}),
        ("stage 2, one process, float16", "stage 2", 0, {"dtype": "float16"}),
        ("stage 2, one process, --compile 1", "stage 2", 0, {"compile": 1}),
    ]
    doubled = {2**power for power in range(machine.ranks.bit_length())}
    return settings + [
        (f"stage 2, torchrun {ranks}, {backend}", "stage 2", ranks, {}) for ranks in sorted(doubled | {machine.ranks})
    ]


def _size_of(machine: Machine, size: tuple[int, int]) -> VLMConfig:
    return VLMConfig(hidden_size=size[0], num_hidden_layers=size[1], vision_config=machine.scale.vision_config)


def collectives(machine: Machine, _left: float) -> Figures:
    """A step under DistributedDataParallel has the gradients of one without: the only test of NCCL on a single GPU."""
    step = Step(_size_of(machine, machine.scale.sizes[0]), "sft_vlm", 2, machine.scale.tokens,
                machine.scale.supervised, cached=True, dtype=machine.dtype, device=machine.device.type)  # fmt: skip
    real = RealStep(step, machine.device)
    batch, gradients = real.make_batch(step), []
    backend = "nccl" if machine.on_gpu else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        for model in (real.model, DistributedDataParallel(real.model)):
            real.optimizer.zero_grad()
            step.loss(model, batch).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in real.learning]))
        del model
    finally:
        dist.destroy_process_group()
    far = float((gradients[0] - gradients[1]).norm() / gradients[0].norm())
    if not far < 1e-2:  # also where it is no number; sums on a GPU come in any order
        raise RuntimeError(f"gradients under {backend} differ by {far:.2g} of their norm from those without")
    return Figures(note=f"gradients differ by {far:.1g}")


def steps(
    stage: str, size: tuple[int, int], cached: bool, machine: Machine, _left: float, compiled: bool = False
) -> Figures:
    """Steps whose batch lies on the device before the clock starts: neither loader nor host count."""
    if compiled:
        _need_compiler()
        torch.compiler.reset()  # what other models' layers compiled counts against the same limit
    scale, device = machine.scale, machine.device
    step = Step(_size_of(machine, size), STAGE_NAMES[stage], scale.rows, scale.tokens, scale.supervised, cached,
                machine.dtype, device=device.type)  # fmt: skip
    old = machine.on_gpu and torch.cuda.get_device_capability(device) < (8, 0)
    predict = replace(step, device="old_cuda" if old else device.type)
    limit = OF_A_CARD * torch.cuda.mem_get_info(device)[0] if machine.on_gpu else float("inf")
    while (predicted := step_memory(predict).peak) > limit and step.rows > 1:
        step, predict = replace(step, rows=step.rows // 2), replace(predict, rows=step.rows // 2)
    taken = throughput(step, device, compiled, count=scale.count)
    best = peak_flops(device, machine.dtype)
    return Figures(
        samples_per_second=taken.samples_per_second,
        mfu=taken.flops_per_second / best if best else None,
        peak_gb=None if taken.peak is None else taken.peak / 1e9,
        predicted_gb=None if compiled else predicted / 1e9,  # eager steps are counted
        note=f"{step.rows} rows of {step.tokens} tokens, {step.supervised} learnt",
    )


def stage_data(machine: Machine, _left: float) -> Figures:
    pictures = machine.scale.pictures
    build_data(machine.folder / "data", pictures, pictures)
    return Figures(note=f"{pictures} pictures of Emoji World a stage")


def stage_run(stage: str, ranks: int, flags: dict, machine: Machine, _left: float) -> Figures:
    """The stage script as a process of its own, its figures from metrics.jsonl."""
    if flags.get("dtype") == "float16" and not machine.on_gpu:
        raise Skipped("float16 is for GPUs")
    if flags.get("dtype") == "bfloat16" and machine.on_gpu and machine.dtype == torch.float16:
        raise Skipped("this GPU has no bfloat16")
    if flags.get("compile"):
        _need_compiler()
    scale, short = machine.scale, "pretrain" if stage == "stage 1" else "sft"
    data = machine.folder / f"data/{short}.jsonl"
    if not data.is_file():
        raise RuntimeError("there is no data, see the check before")
    hidden_size, layers = scale.sizes[0]
    flags = {
        # Ranks find their own device, cuda:0 would put all on one.
        "device": machine.device.type if ranks else machine.device, "data_path": data, "from_weight": "none",
        "hidden_size": hidden_size, "num_hidden_layers": layers, "vision_model": TOWER, "batch_size": scale.batch_size,
        "epochs": max(1, ranks), "log_interval": scale.log_interval, "num_workers": scale.num_workers,
        "cache_features": "float16", "val_samples": 0, "save_interval": 1_000_000, **flags,
    }  # fmt: skip
    name = f"{short}_{ranks}_{flags.get('dtype', '')}_{flags.get('compile', 0)}"
    return _figures_of(stage_metrics(f"train_{STAGE_NAMES[stage]}", arguments_of(flags), machine.folder / name, ranks))


def _figures_of(lines: Sequence[dict], note: str = "") -> Figures:
    if not lines:
        raise RuntimeError("the run was too short to be measured")
    losses = [line["loss"] for line in lines]
    middle = {name: statistics.median(line[name] for line in lines)
              for name in ("rows_per_second", "mfu", "data_wait") if name in lines[0]}  # fmt: skip
    said = f"loss {losses[-1]:.2f}, {middle['data_wait']:.0%} of the time waiting for data"
    return Figures(middle["rows_per_second"], middle.get("mfu"), max(line["memory_gb"] for line in lines),
                   note=f"{note}, {said}" if note else said)  # fmt: skip


def decoding(rows: int, machine: Machine, _left: float) -> Figures:
    """Tokens a second of answers about a picture each, as the demo and the score ask for them."""
    torch.manual_seed(0)
    engine = Answerer(MiniMindVLM(_size_of(machine, machine.scale.sizes[0])), machine.device, machine.dtype)
    engine.end_ids = frozenset()  # nothing ends an answer but its length
    options = Options(max_new_tokens=machine.scale.new_tokens)
    for first in (1000, 2000):  # the first round loads kernels
        found = one_batch(engine, options, lambda row, first=first: first + row)
    speed = found["one_after_another_decode" if rows == 1 else "together_decode"]
    note = f"{speed:,.0f} tokens/s after the first token"
    return Figures(note=f"{note}, which comes after {1000 * found['first_seconds']:.1f} ms" if rows == 1 else note)


def quickstart(machine: Machine, left: float) -> Figures:
    """Stage 2 with the quickstart's flags, from its base decoder, on as much of its data as the time allows."""
    share = min(machine.scale.quickstart, 0.8 * left / QUICKSTART_SECONDS)  # reading and drawing need some, too
    pictures = max(LEAST_PICTURES, round(share * PICTURES["sft"]))
    build_data(machine.folder / "quickstart_data", pictures)
    flags = {"data_path": machine.folder / "quickstart_data/sft.jsonl", "from_weight": BASE, "vision_model": TOWER,
             "device": machine.device, "val_samples": 0}  # fmt: skip
    if machine.scale.log_interval == 1:
        flags["log_interval"] = 1
    lines = stage_metrics("train_sft_vlm", [*arguments_of(flags), *STAGE_2], machine.folder / "quickstart")
    note = f"{pictures:,} of its {PICTURES['sft']:,} pictures, batches of {FLAGS[1]}"
    return _figures_of(lines, note)


def _need_compiler() -> None:
    if not shutil.which("g++"):
        raise Skipped("no C++ compiler (g++)")
