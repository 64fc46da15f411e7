"""The small convolutional trunk of `sam2s-nano`."""

import torch
from torch import Tensor, nn

from trocar_engines.network.config import ConvTrunkConfig

# sam2's transformer block and 2-D layer norm would do, but BatchNorm and ReLU fold into the convolutions
# at export: on two cores that is the difference between 3 and 6 ms a picture.


def conv_bn(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution and batch norm, "same" padding."""
    convolution = nn.Conv2d(
        inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False
    )
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class InvertedBlock(nn.Module):
    """Depthwise 5x5, pointwise expansion, depthwise 3x3, pointwise projection (MobileNetV4's "extra dw")."""

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        inside = channels * expansion
        self.mix = conv_bn(channels, channels, 5, groups=channels)
        self.expand = conv_bn(channels, inside, 1)
        self.depthwise = conv_bn(inside, inside, 3, groups=inside)
        self.project = conv_bn(inside, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Float [B, C, H, W] to the same."""
        hidden = torch.relu(self.expand(self.mix(features)))
        return features + self.project(torch.relu(self.depthwise(hidden)))  # type: ignore[no-any-return]


class GlobalBlock(nn.Module):
    """Self-attention over the whole (stride 32) map, so that a click sees the whole picture."""

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.query_key_value = nn.Linear(channels, 3 * channels)
        self.output = nn.Linear(channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        """Float [B, C, H, W] to the same."""
        batch, channels, height, width = features.shape
        tokens = self.norm(features.flatten(2).transpose(1, 2))
        heads = self.query_key_value(tokens).reshape(batch, height * width, 3, self.heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        mixed = self.output(mixed.transpose(1, 2).reshape(batch, height * width, channels))
        return features + mixed.transpose(1, 2).reshape(batch, channels, height, width)  # type: ignore[no-any-return]


class ConvTrunk(nn.Module):
    """Four levels of features at stride 4, 8, 16 and 32, in the form that sam2's `FpnNeck` takes."""

    def __init__(self, config: ConvTrunkConfig) -> None:
        super().__init__()
        self.channel_list = list(config.channels)
        self.stem = conv_bn(3, config.stem, 3, stride=2)
        self.stages = nn.ModuleList()
        previous = config.stem
        for level, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            blocks = [InvertedBlock(width, config.expansion) for _ in range(depth)]
            down = nn.Sequential(conv_bn(previous, width, 3, stride=2), nn.ReLU())
            context = [GlobalBlock(width)] if level == 3 else []
            self.stages.append(nn.Sequential(down, *blocks, *context))
            previous = width

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Float [B, 3, S, S] to four maps, stride 4 first."""
        features = torch.relu(self.stem(pixels))
        levels = []
        for stage in self.stages:
            features = stage(features)
            levels.append(features)
        return levels
