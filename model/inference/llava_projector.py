"""Our projectors as Llava's, two linear layers with a GELU between them, equal to the last bit; and back again.

"mlp" is that. "linear" is one layer: an activation "linear" in the place of GELU would say the same, but vLLM does not
know it and MLX applies GELU regardless. So the input of GELU is made tiny and its output large again. GELU is x times
the normal distribution up to x: for an x below 2 ** -25 that is 0.5 to the last bit of fp32. Scaling by a power of two
loses nothing either, as long as the exponent has room: in fp32 and bf16, not in fp16, for which files say "linear".
"""

import torch
from torch import nn

from model.projectors import LinearProjector, MLPProjector

SMALL = 2.0**-40


def projector_tensors(projector: LinearProjector | MLPProjector, activation: str) -> dict[str, torch.Tensor]:
    """The tensors of Llava's projector with this activation, "gelu" or, for one layer only, "linear"."""
    if isinstance(projector, MLPProjector):
        return projector.state_dict()
    scale, undo = (1.0, 1.0) if activation == "linear" else (SMALL, 2 / SMALL)
    linear = projector.vision_proj[0]
    return {
        "linear_1.weight": scale * linear.weight,
        "linear_1.bias": scale * linear.bias,
        "linear_2.weight": undo * torch.eye(linear.out_features),
        "linear_2.bias": torch.zeros(linear.out_features),
    }


@torch.no_grad()
def unscale_projector(projector: nn.Module) -> None:
    """Undo the scaling in a Llava model, so that it can run in float16 too. The rounding stays as it was."""
    first, second = projector.linear_1, projector.linear_2
    undo = 2 / SMALL * torch.eye(*second.weight.shape, device=second.weight.device)
    if torch.equal(second.weight.float(), undo):
        for parameter in first.parameters():
            parameter.div_(SMALL)
        second.weight.mul_(SMALL / 2)
        projector.act = nn.Identity()
