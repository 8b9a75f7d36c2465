"""The sample model with the way it is trained, for ``edgekit optimize sample_models/fashion-mnist/task.py:task``.

The training images come from Debian's package dataset-fashion-mnist, or from the folder that ``EDGEKIT_FASHION_MNIST`` names
(four IDX ``.gz`` files). They are needed for training only: students that were trained before are kept in ``trained/``.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from model import HERE, create
from model import example_inputs as _example_inputs
from train import DEBIAN_FOLDER, as_input, augment, load_images

from edgekit.errors import DataError

BATCH_SIZE = 128
DATA_DIGEST = "sha256:16d82e2b505296aa2b78bd5ea0992634f30419a4c97def7c907d154a35ac6157"
"""Of the unpacked training images followed by the training labels."""


@cache
def load_training_data(folder: Path) -> tuple[Tensor, Tensor]:
    """Images float32 [60000, 1, 28, 28], 0..1, and labels int64 [60000], checked against the digest."""
    try:
        images, labels = load_images(folder, "train")
    except FileNotFoundError as error:
        raise DataError(
            "data.missing",
            f"{folder}: no Fashion-MNIST training data here (train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz).",
            hint='Install Debian\'s package "dataset-fashion-mnist", or name a folder by EDGEKIT_FASHION_MNIST.',
        ) from error
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise DataError("data.unreadable", f"{folder}: the training data cannot be read: {error}.") from error
    digest = "sha256:" + hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    if digest != DATA_DIGEST:
        raise DataError(
            "data.digest_mismatch",
            f"{folder}: the training data's digest is {digest}, expected {DATA_DIGEST}.",
            hint="The files are damaged, or of another data set.",
        )
    return torch.from_numpy(as_input(images)), torch.from_numpy(labels.astype(np.int64))


class FashionMnist:
    """The task; see ``edgekit.compiler.task.TrainTask``."""

    data_digest = DATA_DIGEST
    trained_dir: Path | None = HERE / "trained"

    def model(self) -> nn.Module:
        """The trained network, in eval mode."""
        model = create()
        model.load_state_dict(torch.load(HERE / "weights.pt", weights_only=True))
        return model.eval()

    def example_inputs(self) -> tuple[Tensor, ...]:
        """One grey image."""
        return _example_inputs()

    def train_batches(self, epoch: int, seed: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """Batches of 128, shuffled, flipped and shifted; the last, smaller one is left out."""
        images, labels = load_training_data(Path(os.environ.get("EDGEKIT_FASHION_MNIST") or DEBIAN_FOLDER))
        generator = torch.Generator().manual_seed(seed * 1009 + epoch)
        order = torch.randperm(len(images), generator=generator)
        for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]
            yield (augment(images[chosen], generator),), labels[chosen]

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(outputs, labels)

    def metric(self, outputs: Tensor, labels: Tensor) -> float:
        """Top-1 accuracy, 0..1."""
        return float((outputs.argmax(1) == labels).float().mean())


task = FashionMnist()
