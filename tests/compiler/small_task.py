"""A small network with a small synthetic task: which quadrant of an 8 x 8 image is bright."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgekit.compiler.passes.base import PassContext, WorkModel
from edgekit.dataset.data import Dataset
from edgekit.errors import DataError
from edgekit.schema.target import Int8Rules, TargetProfile


class SmallNet(nn.Module):
    """Stem, one residual block, one wider convolution, linear head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.outer = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.wide = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.head = nn.Linear(2 * width, 4)

    def forward(self, picture: Tensor) -> Tensor:
        x = self.stem(picture)
        x = torch.relu(x + self.outer(self.inner(x)))
        return self.head(self.wide(x).mean((2, 3)))


def make_net(width: int = 16, seed: int = 3) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = SmallNet(width)
        for norm in (layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.running_mean, -0.1, 0.1)
    return net.eval()


def make_batch(generator: torch.Generator, size: int = 32) -> tuple[Tensor, Tensor]:
    images = torch.rand(size, 1, 8, 8, generator=generator) * 0.3
    labels = torch.randint(0, 4, (size,), generator=generator)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 0.6
    return images, labels


class SmallTask:
    """A TrainTask whose data can be missing, and whose training can be interrupted at the start of an epoch."""

    data_digest = "sha256:" + "1" * 64

    def __init__(self, trained_dir: Path | None = None, *, batches: int = 4) -> None:
        self.trained_dir = trained_dir
        self.batches = batches
        self.epochs_started: list[int] = []
        self.interrupt_at: int | None = None
        self.has_data = True

    def model(self) -> nn.Module:
        return make_net()

    def example_inputs(self) -> tuple[Tensor, ...]:
        return (torch.zeros(1, 1, 8, 8),)

    def train_batches(self, epoch: int, seed: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        if not self.has_data:
            raise DataError("data.missing", "no training data here.", hint="Fetch it.")
        self.epochs_started.append(epoch)
        if epoch == self.interrupt_at:
            raise KeyboardInterrupt
        generator = torch.Generator().manual_seed(seed * 100 + epoch)
        for _ in range(self.batches):
            images, labels = make_batch(generator)
            yield (images,), labels

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, labels)

    def metric(self, outputs: Tensor, labels: Tensor) -> float:
        return float((outputs.argmax(1) == labels).float().mean())


def make_context(work_dir: Path, *, task: object | None = None, multiple: int = 8, **changes: object) -> PassContext:
    images, labels = make_batch(torch.Generator().manual_seed(7), 64)
    target = TargetProfile(
        name="small",
        title="small",
        arch="x86-64",
        cpu="any",
        isa=(),
        cores=1,
        ram_mb=64,
        runtime="onnxruntime",
        int8=Int8Rules(),
        channel_multiple=multiple,
        sources={},
    )
    calibration = Dataset(
        inputs={"picture": images.numpy().astype(np.float32)},
        labels=labels.numpy(),
        class_names=(),
        digest="sha256:" + "2" * 64,
        source="small",
    )
    values: dict[str, object] = {"seed": 0, "effort": "default", "example_inputs": (torch.zeros(1, 1, 8, 8),), **changes}
    return PassContext(target=target, calibration=calibration, work_dir=work_dir, task=task, **values)  # type: ignore[arg-type]


def source_model(work_dir: Path, module: nn.Module | None = None) -> WorkModel:
    """A torch source before any export: the path does not exist."""
    return WorkModel(path=work_dir / "source.onnx", format="onnx", precision="fp32", lineage=(), module=module or make_net())
