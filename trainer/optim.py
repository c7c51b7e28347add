"""What learns and how fast: freezing by parts, AdamW or Muon with their groups, the learning rate's curve."""

import math

import torch
from torch import nn

from model.messages import UserError
from trainer.config import StageConfig

FINAL_FACTOR = 0.1  # of the peak learning rate, at the last step


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The parts that a stage names in `trainable`, and the tower, which none may."""
    decoder = nn.ModuleList([model.model, model.lm_head])  # the head is a tensor of its own where the config says so
    layers = model.model.layers
    parts = {"language_model": decoder, "first_layer": layers[0], "last_layer": layers[-1]}
    for part, name in (("projector", "vision_proj"), ("vision_encoder", "vision_encoder")):
        if hasattr(model, name):
            parts[part] = getattr(model, name)
    return parts


def freeze_all_but(model: nn.Module, trainable: tuple[str, ...]) -> None:
    parts = parts_of(model)
    absent = set(trainable) - set(parts)
    if absent:
        raise UserError(f"--trainable {','.join(trainable)}: this model has no {', '.join(sorted(absent))}")
    model.requires_grad_(False)
    for name in trainable:
        parts[name].requires_grad_(True)


def count_parts(model: nn.Module) -> dict[str, dict[str, int]]:
    """Of each part the `parameters`, and how many of them are `learning`."""
    parts = parts_of(model)
    decoder, first, last = (parts.pop(name) for name in ("language_model", "first_layer", "last_layer"))
    in_last, in_first = set(last.parameters()), set()
    if not model.model.embed_tokens.weight.requires_grad and first is not last:
        in_first = {p for p in first.parameters() if p.requires_grad}  # a line of its own where it learns alone
    rows = {
        "language model, other": [p for p in decoder.parameters() if p not in in_last | in_first],
        **({"language model, first layer": in_first} if in_first else {}),
        "language model, last layer": in_last,
        **{name.replace("_", " "): list(part.parameters()) for name, part in parts.items()},
    }
    return {
        name: {
            "parameters": sum(p.numel() for p in parameters),
            "learning": sum(p.numel() for p in parameters if p.requires_grad),
        }
        for name, parameters in rows.items()
    }


def table_of_parts(model: nn.Module, config: StageConfig) -> str:
    """Part, parameters, how many of them learn, at which peak rate."""
    lines = [f"{'part':<28}{'parameters':>14}{'trained':>14}  learning rate"]
    for name, counts in count_parts(model).items():
        total, trained = counts.values()
        rate = config.projector_learning_rate or config.learning_rate if name == "projector" else config.learning_rate
        lines.append(f"{name:<28}{total:>14,}{trained:>14,}  {f'{rate:g}' if trained else 'frozen'}")
    return "\n".join(lines)


def build_optimizer(
    model: nn.Module, config: StageConfig, dtype: torch.dtype = torch.float32
) -> torch.optim.AdamW:  # fmt: skip
    """Over what learns: matrices decay, norms and biases do not; with Muon the decoder layers' matrices are its own.

    dtype: of the arithmetic; Muon's iterations take bfloat16 where that is it.
    """
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            projector = name.startswith("vision_proj.") and config.projector_learning_rate > 0
            peak = config.projector_learning_rate if projector else config.learning_rate
            matrix = parameter.dim() > 1
            decay = config.weight_decay if matrix else 0.0
            muon = matrix and ".layers." in name and min(parameter.shape) > 1  # the shared expert's gate is a vector
            groups.setdefault((peak, decay, muon and config.optimizer == "muon"), []).append(parameter)
    listed = [
        {"params": p, "peak": peak, "lr": peak, "weight_decay": decay, "muon": muon}
        for (peak, decay, muon), p in groups.items()
    ]
    options = {"betas": (0.9, 0.95), "fused": next(model.parameters()).device.type in ("cpu", "cuda")}
    return Muon(listed, dtype, **options) if config.optimizer == "muon" else torch.optim.AdamW(listed, **options)


class Muon(torch.optim.AdamW):
    """Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) for groups marked `muon`, AdamW for the others.

    The step of a matrix is its momentum with all singular values made alike. It is scaled as Moonlight does (Liu et al.
    2025, arXiv 2502.16982), so that one learning rate serves both. torch.optim.Muon always computes in bfloat16, which
    many CPUs emulate at a quarter of float32's speed. A `found_inf` of 1, as a fused AdamW heeds it, leaves matrices
    and momenta as they were, and nobody waits to learn what it is.
    """

    MOMENTUM = 0.95

    def __init__(self, groups: list[dict], dtype: torch.dtype = torch.float32, **options):
        super().__init__(groups, **options)
        self.dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        self._step_supports_amp_scaling = False  # the scaler must skip a bad step whole, not AdamW's groups alone

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"] if group["muon"] else ():
                if parameter.grad is not None:
                    self._step_matrix(parameter, group)
                    parameter.grad = None  # done: AdamW passes it over
        super().step(closure)

    def _step_matrix(self, parameter: torch.Tensor, group: dict) -> None:
        state = self.state[parameter]
        if not state:  # AdamW wants a "step" in every state that it loads
            state |= {"momentum": torch.zeros_like(parameter), "step": torch.tensor(0.0)}
        momentum = state["momentum"].lerp(parameter.grad, 1 - self.MOMENTUM)
        update = orthogonalized(parameter.grad.lerp(momentum, self.MOMENTUM).to(self.dtype)).to(parameter.dtype)
        changed = parameter * (1 - group["lr"] * group["weight_decay"])
        changed.add_(update, alpha=-0.2 * math.sqrt(max(parameter.shape)) * group["lr"])
        for old, new in ((state["momentum"], momentum), (parameter, changed)):
            skipped = getattr(self, "found_inf", None)
            old.copy_(new if skipped is None else torch.where(skipped.bool(), old, new))


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with its singular values pushed to about 1 (0.7 to 1.2), by five Newton-Schulz iterations."""
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan's quintic: steepest at 0
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x if wide is matrix else x.T


def lr_factor(step: float, total_steps: int, warmup_ratio: float) -> float:
    """Of the peak learning rate, for step 0, 1, ...: a line up, then a cosine down to FINAL_FACTOR."""
    warmup = round(warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    return FINAL_FACTOR + (1 - FINAL_FACTOR) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
