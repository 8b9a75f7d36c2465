from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from small_graphs import convolutional, save

from edgekit.compiler.source import load_source, stem_of
from edgekit.compiler.task import TrainTask
from edgekit.errors import ArtifactError, EdgekitError, UsageError

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.body = nn.Linear(4, width)
    def forward(self, features):
        return self.body(features)

def create():
    return Net()

ready = Net()
number = 3

def broken():
    raise RuntimeError("no luck")

def wrong():
    return 42
"""
EXAMPLES = """
def example_inputs():
    return (torch.zeros(1, 4),)
"""


@pytest.fixture
def code(tmp_path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(CODE + EXAMPLES)
    return path


@pytest.fixture
def bare(tmp_path) -> Path:
    path = tmp_path / "bare.py"
    path.write_text(CODE)
    return path


def code_of(call) -> str:
    with pytest.raises(EdgekitError) as caught:
        call()
    assert caught.value.message
    return caught.value.code


def test_onnx_file(tmp_path):
    path = save(convolutional(), tmp_path / "small.onnx")
    source = load_source(str(path))
    assert (source.model.kind, source.stem, source.path) == ("onnx", "small", path)
    assert source.model.size_bytes == path.stat().st_size


def test_onnx_digest_covers_external_data(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save_model(convolutional(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    before = load_source(str(path)).model
    data = bytearray((tmp_path / "weights.bin").read_bytes())
    data[0] ^= 1
    (tmp_path / "weights.bin").write_bytes(data)
    after = load_source(str(path)).model
    assert before.digest != after.digest
    assert before.size_bytes > path.stat().st_size


def test_model_that_is_not_there_suggests_the_nearest(tmp_path):
    save(convolutional(), tmp_path / "small.onnx")
    with pytest.raises(UsageError) as caught:
        load_source(str(tmp_path / "smal.onnx"))
    assert caught.value.code == "model.not_found"
    assert "small.onnx" in caught.value.hint


def test_unsupported_file(tmp_path):
    (tmp_path / "model.pb").write_bytes(b"x")
    assert code_of(lambda: load_source(str(tmp_path / "model.pb"))) == "model.unsupported"


def test_weights_for_onnx_are_refused(tmp_path):
    path = save(convolutional(), tmp_path / "small.onnx")
    assert code_of(lambda: load_source(str(path), weights=path)) == "weights.not_for_onnx"


@pytest.mark.parametrize("name", ["create", "ready", "Net"])
def test_factory_module_and_class(code, name):
    source = load_source(f"{code}:{name}")
    assert source.model.kind == "torch"
    assert not source.module.training
    assert [tuple(example.shape) for example in source.example_inputs] == [(1, 4)]


def test_random_weights_follow_the_seed(code):
    first, second, other = (load_source(f"{code}:create", seed=seed).model.digest for seed in (1, 1, 2))
    assert first == second != other


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("number", "model.not_a_module"),
        ("wrong", "model.not_a_module"),
        ("broken", "model.import_failed"),
        ("creat", "model.not_found"),
    ],
)
def test_attribute_that_is_no_model(code, name, expected):
    assert code_of(lambda: load_source(f"{code}:{name}")) == expected


def test_missing_module_and_file(tmp_path):
    assert code_of(lambda: load_source("no_such_module_here:create")) == "model.not_found"
    assert code_of(lambda: load_source(f"{tmp_path}/no.py:create")) == "model.not_found"


def test_example_inputs_from_shapes_or_data(bare, tmp_path):
    data = tmp_path / "data.npz"
    np.savez(data, features=np.zeros((7, 4), np.float32), labels=np.zeros(7, np.int64))
    assert load_source(f"{bare}:create", input_shapes={"features": (2, 4)}).example_inputs[0].shape == (2, 4)
    source = load_source(f"{bare}:create", data=str(data))
    assert source.example_inputs[0].shape == (1, 4)
    assert "calibration data" in source.notes[0]


def test_no_example_inputs(bare):
    assert code_of(lambda: load_source(f"{bare}:create")) == "model.no_example_inputs"


def test_weights_are_loaded(code, tmp_path):
    state = {"body.weight": torch.ones(3, 4), "body.bias": torch.zeros(3)}
    for name, content in (("plain", state), ("wrapped", {"state_dict": {f"module.{k}": v for k, v in state.items()}})):
        path = tmp_path / f"{name}.pt"
        torch.save(content, path)
        module = load_source(f"{code}:create", weights=path).module
        assert torch.equal(module.body.weight, torch.ones(3, 4))


def test_weights_that_do_not_fit(code, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"body.wieght": torch.ones(3, 4), "body.bias": torch.zeros(5)}, path)
    with pytest.raises(ArtifactError) as caught:
        load_source(f"{code}:create", weights=path)
    assert caught.value.code == "weights.mismatch"
    for words in ("1 missing (body.weight)", "1 unexpected (body.wieght)", "body.bias is (5,), expected (3,)"):
        assert words in caught.value.message
    assert "renamed" in caught.value.hint


def test_weights_file_that_runs_code_is_refused(code, tmp_path):
    class Evil:
        def __reduce__(self):
            return (sys.exit, (3,))

    path = tmp_path / "evil.pt"
    torch.save({"body.weight": Evil()}, path)
    assert code_of(lambda: load_source(f"{code}:create", weights=path)) == "weights.unreadable"


def test_weights_file_is_missing_or_garbage(code, tmp_path):
    assert code_of(lambda: load_source(f"{code}:create", weights=tmp_path / "no.pt")) == "weights.not_found"
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    assert code_of(lambda: load_source(f"{code}:create", weights=tmp_path / "bad.pt")) == "weights.unreadable"


def test_train_task(sample_dir):
    source = load_source(f"{sample_dir}/task.py:task")
    assert isinstance(source.task, TrainTask)
    assert source.example_inputs[0].shape == (1, 1, 28, 28)
    assert source.stem == "fashion-mnist"


def test_stems():
    assert stem_of("a/b/net.onnx") == "net"
    assert stem_of("a/net.py:create") == "net"
    assert stem_of("package.nets:create") == "nets-create"
