"""Where a model runs and in which arithmetic: one rule for training and for answering."""

import torch


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """auto, cpu, cuda, cuda:N or mps. Raises ValueError where there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this PyTorch ({torch.__version__}) sees no CUDA device; use --device cpu")
    try:
        return torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
    except RuntimeError:
        raise ValueError(f"--device {name}: choose from auto, cpu, cuda, cuda:N, mps") from None


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
