"""The projectors: a picture's patches to tokens of the text, several patches folded into one before if that is asked.

VLMConfig.projector names the class, VLMConfig.fold how many patches become one token. A new projector is a class here.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F

from model.config import VLMConfig
from model.messages import UserError


def fold_patches(patches: torch.Tensor, side: int, fold: tuple[int, int]) -> torch.Tensor:
    """Pixel shuffle: rows x columns of neighbouring patches become one, their channels side by side, row by row.

    [pictures, side * side, width] -> [pictures, side / rows * side / columns, rows * columns * width]
    """
    rows, columns = fold
    pictures, _, width = patches.shape
    if fold == (1, 1):
        return patches
    blocks = patches.view(pictures, side // rows, rows, side // columns, columns, width).transpose(2, 3)
    return blocks.reshape(pictures, -1, rows * columns * width)


class Projector(nn.Module):
    """[pictures, patches, vision width] -> [pictures, image tokens, hidden size]. `project` is the class's own part."""

    first: str  # begin of the name of a parameter that no other class has

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.side, self.fold = config.patches_a_side, config.fold

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.project(fold_patches(patches, self.side, self.fold))

    def project(self, patches: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class LinearProjector(Projector):
    """MiniMind2-V's: one linear layer."""

    first = "vision_proj."

    def __init__(self, config: VLMConfig):
        super().__init__(config)
        self.vision_proj = nn.Sequential(nn.Linear(config.projected_size, config.hidden_size))

    def project(self, patches: torch.Tensor) -> torch.Tensor:
        return self.vision_proj(patches)


class MLPProjector(Projector):
    """LLaVA-1.5's, under the names of its files: two linear layers, each of the text's width, a GELU between them."""

    first = "linear_1."

    def __init__(self, config: VLMConfig):
        super().__init__(config)
        self.linear_1 = nn.Linear(config.projected_size, config.hidden_size)
        self.linear_2 = nn.Linear(config.hidden_size, config.hidden_size)

    def project(self, patches: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.gelu(self.linear_1(patches)))


class NormMLPProjector(Projector):
    """MiniMind-3V's: as LLaVA-1.5's behind a LayerNorm, which takes the tower's scale out."""

    first = "mlp."

    def __init__(self, config: VLMConfig):
        super().__init__(config)
        self.mlp = nn.Sequential(
            nn.LayerNorm(config.projected_size),
            nn.Linear(config.projected_size, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, config.hidden_size),
        )

    def project(self, patches: torch.Tensor) -> torch.Tensor:
        return self.mlp(patches)


PROJECTORS: dict[str, type[Projector]] = {"linear": LinearProjector, "mlp": MLPProjector, "norm_mlp": NormMLPProjector}


def build_projector(config: VLMConfig) -> Projector:
    """Untrained. Raises UserError where there is none of that name."""
    if config.projector not in PROJECTORS:
        raise UserError(f"projector {config.projector!r} is not known: choose from {', '.join(PROJECTORS)}")
    return PROJECTORS[config.projector](config)


def projector_named(names: Iterable[str]) -> str:
    """Which projector has parameters of these names. Raises UserError where none has."""
    names = sorted(names)
    found = [kind for kind, projector in PROJECTORS.items() if any(name.startswith(projector.first) for name in names)]
    if len(found) != 1:
        raise UserError(f"the projector's tensors {', '.join(names[:4])} are of none of {', '.join(PROJECTORS)}")
    return found[0]
