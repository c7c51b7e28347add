"""Linear layers in the layouts that are fastest to answer with; what is faster was measured, see docs/generation.md."""

import torch
from torch import nn
from torch.nn import functional as F

BLOCK = 16  # output features side by side: a vector register of floats
LARGEST_HALF = 6e4  # float16 ends at 65504


class Packed:
    """y = x W^T + b for x [rows, inputs] -> [rows, outputs], with the weights laid out anew.

    Many rows are limited by arithmetic: on a CPU, oneDNN's packed layout, or bfloat16 if `dtype` says so. One row, a
    decoding step, is limited by reading the weights: on a CPU in blocks of 16 output features, which a batched product
    streams at the speed of memory; where `dtype` is half precision as float16, with the sums still in float32.
    Elsewhere than on a CPU it is an ordinary linear layer in `dtype`.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        decodes: bool = True,
    ):
        """weight [outputs, inputs]; decodes: False leaves out the layout for one row."""
        self.outputs, self.inputs = weight.shape
        self.bias, self.on_cpu = bias, weight.device.type == "cpu"
        self.half = dtype if self.on_cpu and dtype != torch.float32 else None
        self.blocks = self.float16 = self.packed = None
        if self.half:
            self.weight, self.bias = weight.to(self.half), None if bias is None else bias.to(self.half)
        else:
            self.weight = weight.to(dtype) if not self.on_cpu else weight
            if self.on_cpu and torch.backends.mkldnn.is_available():
                self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 256)
        if decodes and self.on_cpu and bias is None:
            if self.half and _has_fbgemm() and weight.abs().max() < LARGEST_HALF:
                self.float16 = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)
            else:
                self.blocks = _in_blocks(weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) == 1 and self.float16 is not None:
            return torch.ops.quantized.linear_dynamic_fp16(x, self.float16)
        if len(x) == 1 and self.blocks is not None:
            row = torch.matmul(x, self.blocks).view(1, -1)
            return row if row.shape[1] == self.outputs else row[:, : self.outputs]
        if self.half:
            return F.linear(x.to(self.half), self.weight, self.bias).to(x.dtype)
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


def _in_blocks(weight: torch.Tensor) -> torch.Tensor:
    """[outputs, inputs] -> [blocks, inputs, BLOCK], filled up with zeros."""
    weight = F.pad(weight.detach(), (0, 0, 0, -len(weight) % BLOCK))
    return weight.view(-1, BLOCK, weight.shape[1]).transpose(1, 2).contiguous()


def _has_fbgemm() -> bool:
    return torch.backends.quantized.engine in ("fbgemm", "x86", "onednn")


class PackedLinear(nn.Module):
    """Stands in for an nn.Linear of a model that only answers; the linear layer itself stays inside, under its name."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.product = Packed(linear.weight.detach(), linear.bias, dtype, decodes=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


def pack_linears(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace every linear layer inside by its packed form; names and values of the parameters stay."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child, dtype))
        else:
            pack_linears(child, dtype)
