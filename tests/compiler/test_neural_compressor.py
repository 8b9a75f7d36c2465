"""Neural Compressor's PT2E quantization as a pass: int8 in the file, the interface of our own export, honest obstacles."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import replace

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from small_task import make_context, make_net, source_model
from torch import Tensor, nn

from edgekit.compiler.graph import facts_of, open_plain, read_onnx
from edgekit.compiler.passes.base import WorkModel
from edgekit.compiler.passes.on_onnx.import_onnx import ImportOnnx
from edgekit.compiler.passes.on_torch import neural_compressor
from edgekit.compiler.passes.on_torch.export import ExportOnnx
from edgekit.compiler.passes.on_torch.neural_compressor import NeuralCompressorStatic, interleaved_batches, signal_to_noise_db
from edgekit.compiler.qdq import count_quantized
from edgekit.dataset.data import make_dataset
from edgekit.errors import ArtifactError


def exported(folder, module=None, **changes):
    context = make_context(folder, **changes)
    return ExportOnnx().run(source_model(folder, module), context), context


def with_rules(context, **rules):
    return replace(
        context, target=msgspec.structs.replace(context.target, int8=msgspec.structs.replace(context.target.int8, **rules))
    )


def answers(path, feeds):
    return open_plain(path.read_bytes()).run(None, feeds)


def noise_db(source, result, feeds) -> float:
    """Least SQNR of the outputs without what is the same for every sample, which would hide errors."""
    pairs = list(zip(answers(source.path, feeds), answers(result.path, feeds), strict=True))
    return min(signal_to_noise_db(left - left.mean(0), right - left.mean(0)) for left, right in pairs)


def weights_of(path) -> list[np.ndarray]:
    """int8 tensors of more than one axis: the weights of convolutions and linear layers."""
    tensors = read_onnx(path).graph.initializer
    return [numpy_helper.to_array(item) for item in tensors if item.data_type == TensorProto.INT8 and len(item.dims) > 1]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compressor")
    source, context = exported(folder)
    before = {name: value.clone() for name, value in source.module.state_dict().items()}
    compressor = NeuralCompressorStatic()
    assert compressor.find_obstacle(source, context) is None
    result = compressor.run(source, context)
    assert all(torch.equal(value, before[name]) for name, value in source.module.state_dict().items())
    return result, source, context


def test_answers_near_float32(quantized):
    result, source, context = quantized
    assert 20 < noise_db(source, result, dict(context.calibration.inputs)) < 80


def test_weights_stored_as_int8(quantized):
    result, source, _ = quantized
    assert result.path.stat().st_size < 0.5 * source.path.stat().st_size
    assert sum(item.size for item in weights_of(result.path)) == sum(
        layer.weight.numel() for layer in source.module.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))
    )
    assert max(int(np.abs(item.astype(int)).max()) for item in weights_of(result.path)) >= 127


def test_every_layer_int8_and_every_convolution_answers_quantized(quantized):
    proto = read_onnx(quantized[0].path)
    assert count_quantized(proto) == (5, 5)
    onnx.checker.check_model(proto)
    readers = {name: node for node in proto.graph.node for name in node.input}
    for node in proto.graph.node:
        if node.op_type == "Conv":
            after = readers[node.output[0]]
            after = readers[after.output[0]] if after.op_type == "Relu" else after
            assert after.op_type == "QuantizeLinear", node.name
    assert facts_of(proto).foreign_domains == ()


def test_interface_is_the_exports(quantized):
    new, old = (read_onnx(model.path).graph for model in quantized[:2])
    assert list(new.input) == list(old.input)
    assert list(new.output) == list(old.output)
    assert new.input[0].type.tensor_type.shape.dim[0].dim_param
    feeds = {"picture": np.zeros((5, 1, 8, 8), np.float32)}
    assert answers(quantized[0].path, feeds)[0].shape == (5, 4)


def test_step_says_what_was_done(quantized):
    result, source, _ = quantized
    step = result.lineage[-1]
    assert (result.format, result.precision, step.name) == ("onnx", "int8", "neural-compressor-pt2e")
    assert step.versions["neural-compressor"] == importlib.metadata.version("neural-compressor")
    assert step.parent == source.lineage[-1].output
    assert (step.settings["algorithm"], step.settings["samples"], step.settings["is_per_channel"]) == ("pt2e-static", 64, True)
    assert "2 quantizer(s) added where ONNX Runtime would compute a convolution in float32" in step.notes


def test_same_bytes_again_and_no_traces(quantized, tmp_path, capfd):
    result, source, context = quantized
    capfd.readouterr()
    again = NeuralCompressorStatic().run(source, replace(context, work_dir=tmp_path))
    assert capfd.readouterr() == ("", "")
    assert again.path.read_bytes() == result.path.read_bytes()
    assert b"site-packages" not in result.path.read_bytes()
    assert b".py" not in result.path.read_bytes()


def test_target_rules_followed(quantized, tmp_path):
    _, source, context = quantized
    rules = {"activations": "int8", "activation_symmetric": True, "per_channel": False, "reduce_range": True}
    changed = with_rules(replace(context, work_dir=tmp_path, effort="fast"), **rules)
    result = NeuralCompressorStatic(method="kl").run(source, changed)
    proto = read_onnx(result.path)
    assert not any(item.data_type == TensorProto.UINT8 for item in proto.graph.initializer)
    constants = {item.name: numpy_helper.to_array(item) for item in proto.graph.initializer}
    quantizers = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    assert all(constants[node.input[2]] == 0 for node in quantizers)
    assert max(int(np.abs(item.astype(int)).max()) for item in weights_of(result.path)) == 64
    assert all(constants[node.input[1]].size == 1 for node in proto.graph.node if node.input[0].startswith("quantize_per_"))
    assert noise_db(source, result, dict(context.calibration.inputs)) > 12


def test_seven_bits_per_channel(quantized, tmp_path):
    _, source, context = quantized
    result = NeuralCompressorStatic().run(source, with_rules(replace(context, work_dir=tmp_path), reduce_range=True))
    assert max(int(np.abs(item.astype(int)).max()) for item in weights_of(result.path)) == 64
    assert noise_db(source, result, dict(context.calibration.inputs)) > 12


class FixedTwoEnds(nn.Module):
    """Two inputs and outputs, a batch of exactly three."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, picture: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.net(picture).reshape(3, 4)
        return logits + shift, logits - 2 * shift


def test_fixed_batch_two_inputs_two_outputs(tmp_path):
    examples = (torch.zeros(3, 1, 8, 8), torch.zeros(3, 4))
    source, context = exported(tmp_path, FixedTwoEnds().eval(), example_inputs=examples)
    shift = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    data = make_dataset({"shift": shift, **context.calibration.inputs}, source="small")
    result = NeuralCompressorStatic().run(source, replace(context, calibration=data))
    assert list(read_onnx(result.path).graph.input) == list(read_onnx(source.path).graph.input)
    feeds = {name: array[:3] for name, array in data.inputs.items()}
    assert noise_db(source, result, feeds) > 20


class Untraceable(nn.Module):
    """Exported once, then its forward pass depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()
        self.is_wild = False

    def forward(self, picture: Tensor) -> Tensor:
        if self.is_wild and picture.sum().item() > 1:
            return self.net(picture) * 2
        return self.net(picture)


def test_module_that_cannot_be_traced(tmp_path):
    source, context = exported(tmp_path, Untraceable().eval())
    source.module.is_wild = True
    with pytest.raises(ArtifactError, match="Untraceable: Neural Compressor cannot quantize it") as caught:
        NeuralCompressorStatic().run(source, context)
    assert caught.value.code == "quantization.failed"


def test_onnx_source_is_an_obstacle(quantized, tmp_path):
    _, source, context = quantized
    model = ImportOnnx().run(replace(source, module=None), replace(context, work_dir=tmp_path))
    assert NeuralCompressorStatic().find_obstacle(model, context) == (
        "the source is an ONNX file; Neural Compressor 3 quantizes torch models"
    )


def test_model_or_target_that_does_not_fit(quantized):
    result, source, context = quantized
    compressor = NeuralCompressorStatic()
    assert "example inputs" in compressor.find_obstacle(source, replace(context, example_inputs=()))
    assert "already quantized" in compressor.find_obstacle(result, context)
    assert "int8 as litert" in compressor.find_obstacle(source, with_rules(context, format="litert"))
    assert "symmetric int8" in compressor.find_obstacle(source, with_rules(context, weights="uint8"))
    two = replace(context, example_inputs=(*context.example_inputs, torch.zeros(1)))
    assert compressor.find_obstacle(source, two) == "the ONNX file has 1 inputs, the torch model takes 2"


def test_package_missing_or_of_another_version(quantized, monkeypatch):
    _, source, context = quantized
    compressor = NeuralCompressorStatic()
    real = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None if name == "neural_compressor" else real(name))
        obstacle = compressor.find_obstacle(source, context)
    assert obstacle == "needs the package neural-compressor, which is not installed: pip install 'edgekit[inc]'"
    for found, fits in (("3.9.2", False), ("3.10", True), ("3.12.1", True), ("4.0", False)):
        monkeypatch.setattr(neural_compressor, "version", lambda _name, found=found: found)
        obstacle = compressor.find_obstacle(source, context)
        assert (obstacle is None) == fits
        assert fits or f"installed is {found}: pip install 'edgekit[inc]'" in obstacle


def test_every_batch_spans_the_data():
    data = make_dataset({"x": np.arange(40)}, source="here")
    batches = [feeds["x"] for _, feeds in interleaved_batches(data, 16, is_fixed=False)]
    assert sorted(np.concatenate(batches)) == list(range(40))
    assert all(batch.min() < 3 and batch.max() > 36 for batch in batches)
    fixed = [feeds["x"] for _, feeds in interleaved_batches(data, 64, is_fixed=True)]
    assert [len(batch) for batch in fixed] == [64]


def test_file_that_answers_otherwise_is_refused(quantized, tmp_path, monkeypatch):
    _, source, context = quantized
    real = neural_compressor._fold

    def damaged(proto):
        folded = real(proto)
        weight = next(item for item in folded.graph.initializer if item.data_type == TensorProto.INT8 and len(item.dims) == 4)
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[::-1].copy(), weight.name))
        return folded

    monkeypatch.setattr(neural_compressor, "_fold", damaged)
    with pytest.raises(ArtifactError) as caught:
        NeuralCompressorStatic().run(source, replace(context, work_dir=tmp_path))
    assert caught.value.code == "model.export_mismatch"


def test_nothing_to_quantize(tmp_path):
    class Scale(nn.Module):
        def forward(self, picture: Tensor) -> Tensor:
            return torch.relu(picture) * 2

    source, context = exported(tmp_path, Scale().eval())
    assert "nothing to quantize" in NeuralCompressorStatic().find_obstacle(source, context)
    assert isinstance(source, WorkModel)
