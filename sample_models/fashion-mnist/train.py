#!/usr/bin/env python3
"""Train the sample model on Fashion-MNIST and write everything that this folder keeps.

The data comes from Debian's package dataset-fashion-mnist (MIT licence) or from any folder with the four IDX .gz files.
Everything is seeded; on the same CPU and torch version two runs give the same weights.

    python sample_models/fashion-mnist/train.py --data /usr/share/datasets/fashion-mnist

writes weights.pt, model.onnx, calibration.npz, evaluation.npz, field.npz and metrics.json beside this script. The splits:
calibration = 400 images of the training set; evaluation = test images 0..2,499; field = test images 2,500..4,499.
``--splits-only`` skips the training.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from model import HERE, LABELS, ResidualNet, example_inputs

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
CALIBRATION_SAMPLES = 400
EVALUATION = slice(0, 2500)
FIELD = slice(2500, 4500)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read one gzip-compressed IDX file of unsigned bytes (the format of the original MNIST files)."""
    raw = gzip.decompress(path.read_bytes())
    dims = raw[3]
    shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims))
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def load_images(folder: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images uint8 [N, 28, 28] and labels uint8 [N] of ``train`` or ``t10k``."""
    return read_idx(folder / f"{split}-images-idx3-ubyte.gz"), read_idx(folder / f"{split}-labels-idx1-ubyte.gz")


def as_input(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 [N, 28, 28] -> the model's input: float32 [N, 1, 28, 28], 0..1."""
    return (images[:, None].astype(np.float32) / np.float32(255.0)).astype(np.float32)


def augment(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Random horizontal flips and shifts of up to two pixels, per image."""
    n = batch.shape[0]
    flip = torch.rand(n, generator=generator) < 0.5
    batch = torch.where(flip[:, None, None, None], batch.flip(3), batch)
    padded = nn.functional.pad(batch, (2, 2, 2, 2))
    rows = torch.randint(0, 5, (n,), generator=generator)[:, None] + torch.arange(28)
    columns = torch.randint(0, 5, (n,), generator=generator)[:, None] + torch.arange(28)
    index = torch.arange(n)[:, None, None]
    return padded[index, 0, rows[:, :, None], columns[:, None, :]][:, None]


def accuracy(model: nn.Module, images: NDArray[np.float32], labels: NDArray[np.uint8]) -> float:
    """Top-1 accuracy in 0..1."""
    model.eval()
    with torch.inference_mode():
        parts = [model(torch.from_numpy(images[i : i + 500])).argmax(1).numpy() for i in range(0, len(images), 500)]
    return float((np.concatenate(parts) == labels).mean())


def train(images: NDArray[np.float32], labels: NDArray[np.uint8], *, epochs: int, seed: int) -> nn.Module:
    """One-cycle SGD with label smoothing; prints a line an epoch."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = ResidualNet().to(memory_format=torch.channels_last)
    batch_size = 128
    steps = len(images) // batch_size
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=epochs * steps, pct_start=0.25)
    loss_function = nn.CrossEntropyLoss(label_smoothing=0.05)
    x, y = torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(x), generator=generator)
        started, total = time.monotonic(), 0.0
        for step in range(steps):
            chosen = order[step * batch_size : (step + 1) * batch_size]
            loss = loss_function(model(augment(x[chosen], generator)), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        seconds = time.monotonic() - started
        left = seconds * (epochs - epoch - 1) / 60
        print(f"epoch {epoch + 1}/{epochs}: loss {total / steps:.4f}, {seconds:.0f} s, {left:.1f} min left", flush=True)
    return model.to(memory_format=torch.contiguous_format).eval()


def export_onnx(model: nn.Module, path: Path) -> None:
    """Write the fp32 ONNX file with a named, dynamic batch axis and no traces of this machine."""
    import onnx

    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        model,
        tuple(torch.cat([t, t]) for t in example_inputs()),
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: batch},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    del proto.metadata_props[:], proto.graph.metadata_props[:]
    for item in [*proto.graph.node, *proto.graph.value_info, *proto.graph.input, *proto.graph.output]:
        del item.metadata_props[:]
        item.doc_string = ""
    onnx.checker.check_model(proto)
    path.write_bytes(proto.SerializeToString())


def write_splits(folder: Path, seed: int) -> None:
    """Write calibration.npz, evaluation.npz and field.npz: images as uint8, to stay small."""
    train_images, train_labels = load_images(folder, "train")
    test_images, test_labels = load_images(folder, "t10k")
    chosen = np.sort(np.random.default_rng(seed).choice(len(train_images), CALIBRATION_SAMPLES, replace=False))
    for name, images, labels in (
        ("calibration", train_images[chosen], train_labels[chosen]),
        ("evaluation", test_images[EVALUATION], test_labels[EVALUATION]),
        ("field", test_images[FIELD], test_labels[FIELD]),
    ):
        arrays = {"image": as_input(images), "labels": labels.astype(np.int64), "class_names": np.array(LABELS)}
        np.savez_compressed(HERE / f"{name}.npz", **arrays)


def main() -> None:
    """Train, evaluate on all 10,000 test images and write the folder's files."""
    parser = argparse.ArgumentParser(description="Train the Fashion-MNIST sample model.")
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder with the four IDX .gz files")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--splits-only", action="store_true", help="write the npz splits, keep the weights")
    arguments = parser.parse_args()
    if not (arguments.data / "train-images-idx3-ubyte.gz").is_file():
        sys.exit(f"{arguments.data}: no Fashion-MNIST here; install Debian's dataset-fashion-mnist or give --data")
    write_splits(arguments.data, arguments.seed)
    if arguments.splits_only:
        return
    torch.use_deterministic_algorithms(True)
    images, labels = load_images(arguments.data, "train")
    model = train(as_input(images), labels, epochs=arguments.epochs, seed=arguments.seed)
    test_images, test_labels = load_images(arguments.data, "t10k")
    top1 = accuracy(model, as_input(test_images), test_labels)
    torch.save(model.state_dict(), HERE / "weights.pt")
    export_onnx(model, HERE / "model.onnx")
    digest = hashlib.sha256((HERE / "weights.pt").read_bytes()).hexdigest()
    record = {"top1_test_10000": top1, "epochs": arguments.epochs, "seed": arguments.seed, "weights_sha256": digest}
    (HERE / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"top-1 on 10,000 test images: {top1:.4f}")


if __name__ == "__main__":
    main()
