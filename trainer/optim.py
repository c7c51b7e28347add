"""What learns and how fast: freezing by parts, AdamW with its groups, the learning rate's curve."""

import math

import torch
from torch import nn

from trainer.config import StageConfig

FINAL_SHARE = 0.1  # of the peak learning rate, at the last step


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The parts that a stage names in `trainable`, and the tower, which none may."""
    parts = {"language_model": model.model, "last_layer": model.model.layers[-1]}
    for part, name in (("projector", "vision_proj"), ("vision_encoder", "vision_encoder")):
        if hasattr(model, name):
            parts[part] = getattr(model, name)
    return parts


def freeze_all_but(model: nn.Module, trainable: tuple[str, ...]) -> None:
    parts = parts_of(model)
    absent = set(trainable) - set(parts)
    if absent:
        raise ValueError(f"--trainable {','.join(trainable)}: this model has no {', '.join(sorted(absent))}")
    model.requires_grad_(False)
    for name in trainable:
        parts[name].requires_grad_(True)


def table_of_parts(model: nn.Module, config: StageConfig) -> str:
    """Part, parameters, how many of them learn, at which peak rate."""
    parts = parts_of(model)
    last, layers = parts.pop("last_layer"), parts.pop("language_model")
    rows = {"language model, other": [p for p in layers.parameters() if not any(p is q for q in last.parameters())]}
    rows["language model, last layer"] = list(last.parameters())
    rows |= {name.replace("_", " "): list(part.parameters()) for name, part in parts.items()}
    lines = [f"{'part':<28}{'parameters':>14}{'trained':>14}  learning rate"]
    for name, parameters in rows.items():
        total = sum(p.numel() for p in parameters)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        rate = config.projector_learning_rate or config.learning_rate if name == "projector" else config.learning_rate
        lines.append(f"{name:<28}{total:>14,}{trained:>14,}  {f'{rate:g}' if trained else 'frozen'}")
    return "\n".join(lines)


def build_optimizer(model: nn.Module, config: StageConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over what learns; matrices decay, norms and biases do not."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            projector = name.startswith("vision_proj.") and config.projector_learning_rate > 0
            peak = config.projector_learning_rate if projector else config.learning_rate
            groups.setdefault((peak, config.weight_decay if parameter.dim() > 1 else 0.0), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": p, "peak": peak, "lr": peak, "weight_decay": decay} for (peak, decay), p in groups.items()],
        betas=(0.9, 0.95),
        fused=next(model.parameters()).device.type in ("cpu", "cuda"),
    )


def rate_share(step: float, total_steps: int, warmup_ratio: float) -> float:
    """Share of the peak learning rate for step 0, 1, ...: a line up, then a cosine down to FINAL_SHARE."""
    warmup = round(warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    return FINAL_SHARE + (1 - FINAL_SHARE) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
