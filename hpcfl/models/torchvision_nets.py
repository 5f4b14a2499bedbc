"""Networks built from torchvision's blocks, with stems for small images; torchvision is imported where one is built, for a fast start."""
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hpcfl.models.classifier import Shape, Trunk, scale_width
from hpcfl.models.norms import NORMS

Setting = tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class MobileNetV2:
    """Inverted residual blocks (Sandler et al. 2018, table 2) with the first two strides of 2 taken away for images up to 64 pixels."""

    settings: Setting = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    stem: int = 32                           # `settings` has (expansion, width, blocks, stride) for each stage
    last: int = 1280

    def find_smallest(self) -> int:
        """1 pixel: padded convs of stride 2 never shrink a map to nothing."""
        return 1

    def build_trunk(self, shape: Shape, norm: str, width: float) -> Trunk:
        """No common extractor; the body ends in the global average of its last maps."""
        from torchvision.models.mobilenetv2 import InvertedResidual
        from torchvision.ops import Conv2dNormActivation

        form = {"norm_layer": NORMS[norm], "activation_layer": nn.ReLU6}
        channels = scale_width(self.stem, width)
        layers = OrderedDict[str, nn.Module](stem=Conv2dNormActivation(shape[0], channels, stride=1, **form))
        for stage, (expansion, wanted, count, stride) in enumerate(self.settings, 1):
            for index in range(1, count + 1):
                block = InvertedResidual(channels, scale_width(wanted, width), stride if index == 1 else 1, expansion, norm_layer=NORMS[norm])
                layers[f"stage{stage}_block{index}"] = block
                channels = scale_width(wanted, width)
        size = scale_width(self.last, width)
        layers |= {"last": Conv2dNormActivation(channels, size, kernel_size=1, **form), "average": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
        return Trunk(nn.Sequential(), shape, nn.Sequential(layers), size)


@dataclass(frozen=True)
class GoogLeNet:
    """Inception blocks (Szegedy et al. 2015, table 1) without auxiliary heads; one 3x3 conv in the place of the stem and its two pools."""

    stem: int = 192
    stages: tuple[tuple[tuple[int, ...], ...], ...] = (        # per block: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection
        ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
        ((192, 96, 208, 16, 48, 64), (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64), (112, 144, 288, 32, 64, 64),
         (256, 160, 320, 32, 128, 128)),
        ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)))

    def find_smallest(self) -> int:
        """1 pixel: padded pools of stride 2 never shrink a map to nothing."""
        return 1

    def build_trunk(self, shape: Shape, norm: str, width: float) -> Trunk:
        """No common extractor; the body ends in the global average of its last maps."""
        from torchvision.models.googlenet import Inception

        def conv(channels: int, wanted: int, **form: int) -> ConvNormRelu:
            return ConvNormRelu(channels, wanted, norm, **form)

        channels = scale_width(self.stem, width)
        layers = OrderedDict[str, nn.Module](stem=conv(shape[0], channels, kernel_size=3, padding=1))
        for stage, blocks in enumerate(self.stages, 1):
            if stage > 1:
                layers[f"pool{stage}"] = nn.MaxPool2d(3, 2, 1)
            for index, widths in enumerate(blocks, 1):
                branches = [scale_width(wanted, width) for wanted in widths]
                layers[f"stage{stage}_block{index}"] = Inception(channels, *branches, conv_block=conv)
                channels = branches[0] + branches[2] + branches[4] + branches[5]
        layers |= {"average": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
        return Trunk(nn.Sequential(), shape, nn.Sequential(layers), channels)


class ConvNormRelu(nn.Module):
    """relu(norm(conv(x))), the block of GoogLeNet, with the norm as a choice."""

    def __init__(self, channels: int, wanted: int, norm: str, **form: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, wanted, bias=False, **form)
        self.norm = NORMS[norm](wanted)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return self.relu(self.norm(self.conv(x)))
