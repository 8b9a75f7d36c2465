"""A small residual convolutional network for 28 x 28 grey images.

Three stages of one residual block each (16, 32 and 64 channels by default), batch normalization, ReLU, global average
pooling and one linear layer: 9 million multiply-accumulates and 78 thousand parameters. The architecture follows He et al.,
"Deep Residual Learning for Image Recognition" (CVPR 2016), scaled down.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with a shortcut; the shortcut is a 1 x 1 convolution where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 [N, C, H, W] -> float32 [N, C', H / stride, W / stride]."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + self.shortcut(x))


class ResidualNet(nn.Module):
    """Stem, three residual stages, pooling and a linear classifier.

    Args:
        widths: output channels of the three stages.
        classes: number of classes.
    """

    def __init__(self, widths: tuple[int, int, int] = (16, 32, 64), classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        )
        self.stage1 = ResidualBlock(widths[0], widths[0], 1)
        self.stage2 = ResidualBlock(widths[0], widths[1], 2)
        self.stage3 = ResidualBlock(widths[1], widths[2], 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(widths[2], classes)

    def forward(self, image: Tensor) -> Tensor:
        """image: float32 [N, 1, 28, 28], 0..1 -> logits float32 [N, classes]."""
        x = self.stage3(self.stage2(self.stage1(self.stem(image))))
        return self.head(torch.flatten(self.pool(x), 1))


def create() -> nn.Module:
    """The network with random weights; give the trained ones with ``--weights``."""
    return ResidualNet()


def example_inputs() -> tuple[Tensor, ...]:
    """One batch of the input's shape, for export."""
    return (torch.zeros(1, 1, 28, 28),)
