"""Where a model runs and in which arithmetic: one rule for training and for answering."""

import functools
import math
import os
import time

import torch
from torch import nn

from model.messages import UserError

MEASURING = 0.1  # seconds, for the peak
SIDES = {"cpu": 768, "cuda": 8192}  # of matrices whose product needs some milliseconds; elsewhere 2048


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """auto, cpu, cuda, cuda:N or mps. Raises UserError where there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this PyTorch ({torch.__version__}) sees no CUDA device; use --device cpu")
    try:
        return torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
    except RuntimeError:
        raise UserError(f"--device {name}: choose from auto, cpu, cuda, cuda:N, mps") from None


def keep_few_kernels() -> None:
    """Before the first product: oneDNN keeps compiled kernels for 32 shapes, where nobody has asked for another number.

    It would keep 1,024, and batches of all lengths bring new ones in every step: that took 0.9 GB within 140 steps, for
    no gain in speed.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")


def to_device(batch: dict, device: torch.device) -> dict:
    """A batch's tensors on a device, without waiting for copies from pinned memory; the rest as it is."""
    return {
        name: value.to(device, non_blocking=True) if torch.is_tensor(value) else value for name, value in batch.items()
    }


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the device computes in it, float16 on older GPUs, float32 elsewhere."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and _cpu_has_bfloat16():
        return torch.bfloat16
    return torch.float32


def _cpu_has_bfloat16() -> bool:
    """Without its own instructions a CPU emulates bfloat16, several times slower than float32."""
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def compile_layers(model: nn.Module, device: torch.device) -> None:
    """torch.compile each layer of the decoder and of the tower, for batches of any shape.

    Raises:
        UserError: this machine has no compiler for the device.
    """
    try:
        torch.compile(lambda x: x.exp() + 1)(torch.ones(8, device=device))  # fails now, not in the first step
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:150]
        raise UserError(
            f"--compile 1: torch.compile does not work here ({reason}): install a C++ compiler (apt-get install g++), "
            "or use --compile 0"
        ) from error
    torch._dynamo.config.recompile_limit = 64  # layers differ by mask, by what learns, by training or not; 8 is too few
    tower = getattr(model, "vision_encoder", None)
    towers_layers = next((m for m in tower.modules() if isinstance(m, nn.ModuleList)), ()) if tower is not None else ()
    for layer in (*model.model.layers, *towers_layers):
        layer.compile(dynamic=True)


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second in a large product of matrices, the best of some tries; 0 where none works.

    Measured once a process: no table tells how many cores a container has, or at which clock a GPU runs.
    """
    side = SIDES.get(device.type, 2048)
    try:
        generator = torch.Generator(device)  # a training run's own one must stay where it is
        left, right = (torch.rand(side, side, generator=generator, device=device, dtype=dtype) for _ in range(2))
        best, tries, started = math.inf, 0, time.perf_counter()
        while tries < 3 or time.perf_counter() - started < MEASURING:
            begun = time.perf_counter()
            torch.mm(left, right)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            best, tries = min(best, time.perf_counter() - begun), tries + 1
    except RuntimeError:  # a device without this arithmetic, or without the memory
        return 0.0
    if device.type == "cuda":
        del left, right
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return 2 * side**3 / best
