"""Residual networks for small images: 3x3 stem of stride 1, no pool before the average at the end."""
from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor, nn

from hpcfl.models.classifier import Shape, Trunk, scale_width
from hpcfl.models.norms import NORMS


class BasicBlock(nn.Module):
    """relu(x' + norm(conv(relu(norm(conv(x)))))), x' = x or its 1x1 projection where the shape changes (He et al. 2016, figure 2)."""

    def __init__(self, channels: int, wanted: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, wanted, 3, stride, 1, bias=False)
        self.norm1 = NORMS[norm](wanted)
        self.conv2 = nn.Conv2d(wanted, wanted, 3, 1, 1, bias=False)
        self.norm2 = NORMS[norm](wanted)
        same = stride == 1 and channels == wanted
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(channels, wanted, 1, stride, bias=False), NORMS[norm](wanted))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride), rounded up."""
        inside = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        return self.relu(inside + self.shortcut(x))


@dataclass(frozen=True)
class ResNet:
    """Stages one after the other, of `blocks[i]` basic blocks of width `widths[i]`; each stage but the first halves height and width.

    FedVTC's `resnet_sizes` (specification section 6) and FedConv's ResNet-18 for CIFAR-10.
    """

    blocks: tuple[int, ...]
    widths: tuple[int, ...] = (64, 128, 256, 512)

    def find_smallest(self) -> int:
        """1 pixel: padded convs of stride 2 never shrink a map to nothing."""
        return 1

    def build_trunk(self, shape: Shape, norm: str, width: float) -> Trunk:
        """No common extractor; the body ends in the global average of its last maps."""
        channels = scale_width(self.widths[0], width)
        layers = OrderedDict[str, nn.Module](conv=nn.Conv2d(shape[0], channels, 3, 1, 1, bias=False), norm=NORMS[norm](channels), relu=nn.ReLU())
        for stage, (count, wanted) in enumerate(zip(self.blocks, self.widths, strict=False), 1):
            wanted = scale_width(wanted, width)
            for index in range(1, count + 1):
                stride = 2 if stage > 1 and index == 1 else 1
                layers[f"stage{stage}_block{index}"] = BasicBlock(channels, wanted, stride, norm)
                channels = wanted
        layers |= {"average": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
        return Trunk(nn.Sequential(), shape, nn.Sequential(layers), channels)
