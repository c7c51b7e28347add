"""EfficientNet-Lite, an ImageNet-trained encoder of convolutions (Tan and Le 2019, Lite in 2020), for inference.

A picture becomes one vector a patch of 16 x 16 pixels: what the network knows at that stride, and beside it what it
knows at the end, where a vector covers 2 x 2 patches. scripts/assets/efficientnet_folder.py writes a folder with it.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from model.messages import UserError

PATCH_SIZE = 16  # pixels a side
EPSILON = 1e-3  # of the batch norms
LITE0 = (  # repeats, kernel size, stride, expansion, channels of each stage
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip


class EfficientNetLiteConfig(PreTrainedConfig):
    """Sizes; the defaults are Lite0's. hidden_size is what a patch has: 112 and 1280 channels."""

    model_type = "efficientnet_lite"

    def __init__(
        self,
        image_size: int = 224,  # pixels a side
        stem_channels: int = 32,
        stages: tuple[tuple[int, ...], ...] = LITE0,  # the sixth halves the picture a fifth time, as in all sizes
        head_channels: int = 1280,
        **kwargs,
    ):
        if image_size % PATCH_SIZE:
            raise UserError(f"image_size {image_size} of an EfficientNet-Lite must be a multiple of {PATCH_SIZE}")
        self.image_size, self.patch_size = image_size, PATCH_SIZE
        self.stem_channels, self.head_channels = stem_channels, head_channels
        self.stages = [list(stage) for stage in stages]
        kwargs |= {"patch_size": PATCH_SIZE, "hidden_size": self.stages[4][-1] + head_channels}
        super().__init__(**kwargs)


class ConvNorm(nn.Module):
    """A convolution and the batch norm behind it, which knows its mean and variance and never learns them.

    Padded as TensorFlow does: ceil(size / stride) outputs, an odd pixel of padding stands right and below.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int = 1, stride: int = 1, groups: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, groups=groups, bias=False)
        self.weight, self.bias = nn.Parameter(torch.ones(channels_out)), nn.Parameter(torch.zeros(channels_out))
        self.register_buffer("mean", torch.zeros(channels_out))
        self.register_buffer("variance", torch.ones(channels_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padding = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.conv.kernel_size, self.conv.stride, strict=True):
            missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [missing // 2, missing - missing // 2]  # of the width, then of the height
        x = self.conv(F.pad(x, padding) if any(padding) else x)
        return F.batch_norm(x, self.mean, self.variance, self.weight, self.bias, eps=EPSILON)


class Block(nn.Module):
    """More channels, a convolution of each alone, fewer channels; added to what came in where the shapes agree."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = channels_in * expansion
        self.expand = ConvNorm(channels_in, inner) if expansion > 1 else None
        self.depthwise = ConvNorm(inner, inner, kernel, stride, groups=inner)
        self.project = ConvNorm(inner, channels_out)
        self.adds = stride == 1 and channels_in == channels_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = x if self.expand is None else F.relu6(self.expand(x))
        projected = self.project(F.relu6(self.depthwise(inner)))
        return x + projected if self.adds else projected


class EfficientNetLite(PreTrainedModel):
    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        channels = config.stem_channels
        self.stem = ConvNorm(3, channels, 3, 2)
        self.stages = nn.ModuleList()
        for repeats, kernel, stride, expansion, channels_out in config.stages:
            blocks = [Block(channels, channels_out, kernel, stride, expansion)]
            blocks += [Block(channels_out, channels_out, kernel, 1, expansion) for _ in range(1, repeats)]
            self.stages.append(nn.Sequential(*blocks))
            channels = channels_out
        self.head = ConvNorm(channels, config.head_channels)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **_ignored) -> BaseModelOutput:
        """[pictures, 3, height, width] -> last_hidden_state [pictures, patches, hidden_size], row by row."""
        pixel_values = pixel_values.to(memory_format=torch.channels_last)  # a third faster on a CPU
        x = F.relu6(self.stem(pixel_values))
        for stage in self.stages[:5]:
            x = stage(x)
        middle = x  # [pictures, 112, 14, 14]
        for stage in self.stages[5:]:
            x = stage(x)
        end = F.relu6(self.head(x))  # [pictures, 1280, 7, 7]
        both = torch.cat([middle, F.interpolate(end, size=middle.shape[-2:])], 1)
        return BaseModelOutput(last_hidden_state=both.flatten(2).transpose(1, 2))
