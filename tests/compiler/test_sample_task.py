"""The sample model's task: kept students are found without the training data, and are worth keeping."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from small_task import make_context

from edgekit.compiler.passes.base import WorkModel
from edgekit.compiler.passes.on_torch.prune_distill import PruneAndDistill
from edgekit.compiler.passes.on_torch.pruning import count_macs, widths_of
from edgekit.compiler.task import TrainTask
from edgekit.errors import DataError

SAMPLE = Path(__file__).resolve().parents[2] / "sample_models" / "fashion-mnist"
LARGEST_DROP = 0.01
"""One point of top-1: the budget that the students were trained for."""


@pytest.fixture(scope="module")
def sample():
    spec = importlib.util.spec_from_file_location("fashion_mnist_task", SAMPLE / "task.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def accuracy(module: torch.nn.Module, data: dict[str, np.ndarray]) -> float:
    with torch.inference_mode():
        return float((module(torch.from_numpy(data["image"])).argmax(1).numpy() == data["labels"]).mean())


@pytest.mark.parametrize("multiple", [8, 16])
def test_kept_student_needs_no_data_and_holds_the_accuracy(sample, multiple, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKIT_FASHION_MNIST", str(tmp_path))
    assert isinstance(sample.task, TrainTask)
    parent = sample.task.model()
    model = WorkModel(path=SAMPLE / "model.onnx", format="onnx", precision="fp32", lineage=(), module=parent)
    examples = sample.task.example_inputs()
    context = make_context(tmp_path / "work", task=sample.task, multiple=multiple, example_inputs=examples)
    assert PruneAndDistill().find_obstacle(model, context) is None
    student = PruneAndDistill().run(model, context)
    assert student.lineage[-1].notes[0].startswith("weights trained earlier")
    assert all(width % multiple == 0 for name, width in widths_of(student.module).items() if name != "head")
    assert count_macs(student.module, examples) < 0.6 * count_macs(parent, examples)
    data = dict(np.load(SAMPLE / "evaluation.npz"))
    assert accuracy(student.module, data) > accuracy(parent, data) - LARGEST_DROP


def test_training_data_missing_names_the_package(sample, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKIT_FASHION_MNIST", str(tmp_path))
    with pytest.raises(DataError) as caught:
        next(iter(sample.task.train_batches(0, 0)))
    assert caught.value.code == "data.missing"
    assert "dataset-fashion-mnist" in caught.value.hint


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_training_data_of_another_set_is_refused(sample, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKIT_FASHION_MNIST", str(tmp_path))
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", np.zeros((5, 28, 28), np.uint8))
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.zeros(5, np.uint8))
    with pytest.raises(DataError) as caught:
        next(iter(sample.task.train_batches(0, 0)))
    assert caught.value.code == "data.digest_mismatch"


def test_training_data_damaged_is_refused(sample, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKIT_FASHION_MNIST", str(tmp_path))
    for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"):
        (tmp_path / name).write_bytes(b"not gzip")
    with pytest.raises(DataError) as caught:
        next(iter(sample.task.train_batches(0, 0)))
    assert caught.value.code == "data.unreadable"
