"""Linear layers in the layouts that are fastest to answer with; what is faster was measured, see docs/generation.md."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import QuickGELUActivation

BLOCK = 16  # output features side by side: a vector register of floats
QUICK_GELU = 1.702
FEW_ROWS = 16  # for which float16 weights are faster on a CPU than bfloat16 ones
LARGEST_HALF = 6e4  # float16 ends at 65504


class Packed:
    """y = x W^T + b for x [rows, inputs] -> [rows, outputs], with the weights in a layout of their own.

    Many rows are limited by arithmetic: on a CPU, oneDNN's packed layout, or bfloat16 if `dtype` says so. One row, a
    decoding step, is limited by reading the weights: on a CPU in blocks of 16 output features, which a batched product
    streams at the speed of memory; where `dtype` is half precision as float16, with the sums still in float32, which
    also pays for the few rows that are decoded together.
    Elsewhere than on a CPU it is an ordinary linear layer in `dtype`.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        swish: bool = False,
        for_one_row: bool | None = None,
    ):
        """weight [outputs, inputs]. swish: y sigmoid(y).

        for_one_row: take the memory for that layout, too; None: where there is no bias, as in most decoders.
        """
        weight, on_cpu = weight.detach(), weight.device.type == "cpu"
        self.outputs, self.swish = len(weight), swish
        self.half = dtype if on_cpu and dtype != torch.float32 else None
        self.weight = weight if on_cpu and not self.half else weight.to(dtype)
        self.bias = bias if bias is None or not self.half else bias.to(self.half)
        self.packed = self.blocks = self.row_bias = self.float16 = None
        if on_cpu and not self.half and torch.backends.mkldnn.is_available():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 256)
        if on_cpu and (for_one_row or (for_one_row is None and bias is None and not swish)):
            if self.half and _has_fbgemm() and weight.abs().max() < LARGEST_HALF:
                bias = None if bias is None else bias.detach().float()
                self.float16 = torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)
            else:
                self.blocks, self.row_bias = _in_blocks(weight), None if bias is None else bias.detach()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.float16 is not None and len(x) <= FEW_ROWS:
            return torch.ops.quantized.linear_dynamic_fp16(x, self.float16)
        if len(x) == 1 and self.blocks is not None:
            row = torch.bmm(x.expand(len(self.blocks), 1, -1), self.blocks).view(1, -1)
            row = row if row.shape[1] == self.outputs else row[:, : self.outputs]  # a view takes time, too
            return row if self.row_bias is None else row + self.row_bias
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(
                x, self.packed, self.bias, "swish" if self.swish else "none", [], ""
            )
        y = F.linear(x.to(self.half) if self.half else x, self.weight, self.bias)
        return (F.silu(y) if self.swish else y).to(x.dtype)


def _in_blocks(weight: torch.Tensor) -> torch.Tensor:
    """[outputs, inputs] -> [blocks, inputs, BLOCK], filled up with zeros."""
    weight = F.pad(weight, (0, 0, 0, -len(weight) % BLOCK))
    return weight.view(-1, BLOCK, weight.shape[1]).transpose(1, 2).contiguous()


def _has_fbgemm() -> bool:
    return torch.backends.quantized.engine in ("fbgemm", "x86")  # torch's onednn and qnnpack have no float16 product


class PackedLinear(nn.Module):
    """Stands in for an nn.Linear of a model that only answers; its parameters stay inside, under their names."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, scale: float = 1.0, swish: bool = False):
        """scale: of the weight, and where a swish follows of the bias too."""
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        bias = linear.bias.detach() * scale if swish else linear.bias
        self.product = Packed(linear.weight.detach() * scale, bias, dtype, swish)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x.flatten(0, -2)).view(*x.shape[:-1], -1)


def pack_linears(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace every linear layer inside by its packed form; names and values of the parameters stay.

    CLIP's quick gelu, x sigmoid(1.702 x), is a swish between products that are scaled by 1.702 and by its inverse, and
    oneDNN takes a swish together with the product before it.
    """
    if isinstance(getattr(module, "activation_fn", None), QuickGELUActivation):
        module.fc1 = PackedLinear(module.fc1, dtype, QUICK_GELU, swish=True)
        module.fc2 = PackedLinear(module.fc2, dtype, 1 / QUICK_GELU)
        module.activation_fn = nn.Identity()
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child, dtype))
        else:
            pack_linears(child, dtype)
