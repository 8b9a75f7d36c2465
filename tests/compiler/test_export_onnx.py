"""Export: dynamic batch, names, no traces of the machine, the same bytes each time, verified against torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from small_task import make_context, make_net, source_model
from torch import Tensor, nn

from edgekit.compiler import export
from edgekit.compiler.export import check_match, export_onnx
from edgekit.compiler.passes.on_torch.export import ExportOnnx
from edgekit.errors import ArtifactError, DataError
from edgekit.schema.digest import digest_file

EXAMPLE = (torch.zeros(1, 1, 8, 8),)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    return export_onnx(make_net(), EXAMPLE, path)


def test_inputs_that_the_module_cannot_take_are_the_callers(tmp_path):
    with pytest.raises(DataError) as caught:
        export_onnx(make_net(), (torch.zeros(1, 3, 8, 8),), tmp_path / "model.onnx")
    assert caught.value.code == "data.example_inputs"
    assert "[2, 3, 8, 8]" in caught.value.message
    assert not (tmp_path / "model.onnx").exists()


def test_export_names_and_dynamic_batch(exported):
    graph = onnx.load(exported.path).graph
    assert [item.name for item in graph.input] == ["picture"]
    assert [item.name for item in graph.output] == ["logits"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert exported.is_batch_dynamic
    assert not exported.notes


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_export_answers_as_torch(exported, batch):
    x = torch.randn(batch, 1, 8, 8)
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        np.testing.assert_allclose(session.run(None, {"picture": x.numpy()})[0], make_net()(x).numpy(), atol=1e-4)


def test_export_leaks_nothing(exported):
    data = exported.path.read_bytes()
    for trace in (b"site-packages", b".py", b"stack_trace", str(Path(__file__).parent).encode(), str(Path.home()).encode()):
        assert trace not in data


def test_export_same_bytes_twice(exported, tmp_path):
    again = export_onnx(make_net(), EXAMPLE, tmp_path / "again.onnx")
    assert again.path.read_bytes() == exported.path.read_bytes()


def test_export_keeps_mode_and_weights(tmp_path):
    net = make_net().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    export_onnx(net, EXAMPLE, tmp_path / "model.onnx")
    assert net.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


class FixedBatch(nn.Module):
    """Cannot take another batch: the first axis is part of a reshape to a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(3, 4) * 2


def test_export_batch_not_free_falls_back(tmp_path):
    result = export_onnx(FixedBatch(), (torch.zeros(3, 4),), tmp_path / "fixed.onnx")
    assert not result.is_batch_dynamic
    assert "batch size is fixed at 3" in result.notes[0]
    assert onnx.load(result.path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if float(x.sum()) > 0 else x - 1


def test_export_impossible_is_an_artifact_error(tmp_path):
    with pytest.raises(ArtifactError) as caught:
        export_onnx(Branching(), (torch.zeros(2, 4),), tmp_path / "never.onnx")
    assert caught.value.code == "model.export_failed"
    assert not (tmp_path / "never.onnx").exists()


def test_export_mismatch_is_found(tmp_path, monkeypatch):
    """A graph whose last weight is wrong must not be written."""
    real = export._run_exporter

    def damaged(*args):
        proto = real(*args)
        for item in proto.graph.initializer:
            values = onnx.numpy_helper.to_array(item)
            if values.dtype == np.float32 and values.ndim == 1:
                item.CopyFrom(onnx.numpy_helper.from_array(values + 1, item.name))
        return proto

    monkeypatch.setattr(export, "_run_exporter", damaged)
    with pytest.raises(ArtifactError) as caught:
        export_onnx(make_net(), EXAMPLE, tmp_path / "wrong.onnx")
    assert caught.value.code == "model.export_mismatch"
    assert not (tmp_path / "wrong.onnx").exists()


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ([np.ones(3)], []),
        ([np.ones(3)], [np.ones(4)]),
        ([np.ones(3)], [np.array([1, 1, np.nan])]),
        ([np.ones(3)], [np.ones(3) * 1.1]),
    ],
)
def test_match_refuses(left, right):
    with pytest.raises(ArtifactError):
        check_match(left, right, what="file")


@pytest.mark.parametrize("examples", [(), (torch.tensor(1.0),), (torch.zeros(0, 3),)])
def test_example_inputs_wrong(examples, tmp_path):
    with pytest.raises(DataError) as caught:
        export_onnx(make_net(), examples, tmp_path / "model.onnx")
    assert caught.value.code == "data.example_inputs"


def test_export_pass_keeps_names_and_lineage(tmp_path):
    model = source_model(tmp_path)
    export_onnx(model.module, EXAMPLE, model.path, input_names=["a"], output_names=["b"])
    context = make_context(tmp_path / "work")
    assert ExportOnnx().find_obstacle(model, context) is None
    result = ExportOnnx().run(model, context)
    graph = onnx.load(result.path).graph
    assert (graph.input[0].name, graph.output[0].name) == ("a", "b")
    step = result.lineage[-1]
    assert (step.parent, step.output) == (digest_file(model.path), digest_file(result.path))
    assert step.parent == step.output


def test_export_pass_without_module_says_why(tmp_path):
    model = source_model(tmp_path)
    assert ExportOnnx().find_obstacle(model, make_context(tmp_path, example_inputs=())) is not None
    file_only = type(model)(path=model.path, format="onnx", precision="fp32", lineage=())
    assert "torch source" in (ExportOnnx().find_obstacle(file_only, make_context(tmp_path)) or "")
