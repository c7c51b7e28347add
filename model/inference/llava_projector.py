"""Our projectors as Llava's, two linear layers with a GELU between them, equal to the last bit; and back again.

"mlp" is that. "linear" is one layer: with the activation "linear" a second one that changes nothing says the same, and
can be trained on. vLLM does not know that word and MLX applies GELU regardless: for them the input of GELU is made tiny
and its output large again. GELU is x times the normal distribution up to x: for an x below 2 ** -25 that is 0.5 to the
last bit of fp32. Scaling by a power of two loses nothing either, as long as the exponent has room: in fp32 and bf16,
not in fp16. What comes out is exact, but its gradients are not of this world: such a file is for inference only.
"""

from collections.abc import Mapping

import torch
from torch import nn

from model.messages import UserError
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


def our_projector(tensors: Mapping[str, torch.Tensor], activation: str) -> tuple[str, dict[str, torch.Tensor]]:
    """The way back: the name of a class of model.projectors, and its tensors; two layers without a GELU become one.

    Raises:
        UserError: an activation that neither class has.
    """
    tensors = {name: value.float() for name, value in tensors.items()}
    scaled = torch.equal(tensors["linear_2.weight"], 2 / SMALL * torch.eye(*tensors["linear_2.weight"].shape))
    if activation == "gelu" and not scaled:
        return "mlp", tensors
    if activation not in ("gelu", "linear"):
        raise UserError(f"the projector's activation is {activation!r}: this reads gelu and linear")
    if scaled:
        tensors |= {f"linear_1.{name}": tensors[f"linear_1.{name}"] / SMALL for name in ("weight", "bias")}
        tensors["linear_2.weight"] = tensors["linear_2.weight"] * (SMALL / 2)
    second = tensors["linear_2.weight"].double()
    weight, bias = second @ tensors["linear_1.weight"].double(), second @ tensors["linear_1.bias"].double()
    bias = bias + tensors["linear_2.bias"].double()
    return "linear", {"vision_proj.0.weight": weight.float(), "vision_proj.0.bias": bias.float()}


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
