"""LiteRT: fp32 conversion keeps names and answers, int8 is full-integer with float or int8 ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_task import make_context, make_net, source_model
from torch import Tensor, nn

from edgekit.compiler.passes.base import WorkModel
from edgekit.compiler.passes.on_litert import convert
from edgekit.compiler.passes.on_litert.convert import ConvertToLiteRT, captured_output, open_tflite
from edgekit.compiler.passes.on_litert.quantize import QuantizeLiteRT
from edgekit.errors import ArtifactError

pytest.importorskip("litert_torch")
pytest.importorskip("ai_edge_quantizer")


class TwoEnds(nn.Module):
    """Two inputs, two outputs, so that the order and the names matter."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, picture: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.net(picture)
        return logits + shift, logits - 2 * shift


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("litert")
    model, context = source_model(folder), make_context(folder)
    assert ConvertToLiteRT().find_obstacle(model, context) is None
    return ConvertToLiteRT().run(model, context), context


def test_convert_keeps_contract_and_answers(converted):
    model, context = converted
    run = open_tflite(model.path.read_bytes())
    details = run.get_input_details()
    assert list(details) == ["picture"]
    assert tuple(details["picture"]["shape"]) == (1, 1, 8, 8)
    images = context.calibration.inputs["picture"]
    with torch.no_grad():
        expected = model.module(torch.from_numpy(images)).numpy()
    found = np.concatenate([run(picture=image[None])["logits"].copy() for image in images])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert (model.format, model.precision) == ("tflite", "fp32")


def test_convert_two_inputs_and_outputs_by_name(tmp_path):
    module = TwoEnds().eval()
    examples = (torch.zeros(2, 1, 8, 8), torch.zeros(2, 4))
    context = make_context(tmp_path, example_inputs=examples)
    model = ConvertToLiteRT().run(source_model(tmp_path, module), context)
    x, s = torch.randn(1, 1, 8, 8), torch.randn(1, 4)
    found = open_tflite(model.path.read_bytes())(shift=s.numpy(), picture=x.numpy())
    with torch.no_grad():
        first, second = module(x, s)
    np.testing.assert_allclose(found["output_0"], first.numpy(), atol=1e-4)
    np.testing.assert_allclose(found["output_1"], second.numpy(), atol=1e-4)


def test_convert_leaks_nothing(converted):
    model, _ = converted
    data = model.path.read_bytes()
    assert b"site-packages" not in data
    assert b".py" not in data


def test_int8_with_float_ends(converted):
    model, context = converted
    assert QuantizeLiteRT().find_obstacle(model, context) is None
    result = QuantizeLiteRT().run(model, context)
    run = open_tflite(result.path.read_bytes())
    assert run.get_input_details()["picture"]["dtype"] is np.float32
    fp32 = open_tflite(model.path.read_bytes())
    images = context.calibration.inputs["picture"]
    expected = np.concatenate([fp32(picture=image[None])["logits"].copy() for image in images])
    found = np.concatenate([run(picture=image[None])["logits"].copy() for image in images])
    sqnr = 10 * np.log10((expected**2).sum() / ((found - expected) ** 2).sum())
    assert 25 < sqnr < 70
    assert result.path.stat().st_size < model.path.stat().st_size
    assert [step.name for step in result.lineage] == ["convert-to-litert", "quantize-litert-int8"]


def test_int8_is_integer_throughout(converted, tmp_path):
    """Between the first QUANTIZE and the last DEQUANTIZE no tensor is float, and weights are per channel and symmetric."""
    from ai_edge_litert.interpreter import Interpreter

    model, _ = converted
    result = QuantizeLiteRT().run(model, make_context(tmp_path))
    details = Interpreter(model_path=str(result.path)).get_tensor_details()
    floats = [tensor["name"] for tensor in details if tensor["dtype"] is np.float32]
    assert len(floats) == 2, floats
    assert not any("float32" in note for note in result.lineage[-1].notes)
    scales = [tensor["quantization_parameters"] for tensor in details if len(tensor["quantization_parameters"]["scales"]) > 1]
    assert len(scales) >= 4
    assert all((parameters["zero_points"] == 0).all() for parameters in scales)


class WithMaximum(nn.Module):
    """The maximum over an axis has no int8 form in the quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, picture: Tensor) -> Tensor:
        return self.net.head(self.net.wide(self.net.stem(picture)).amax((2, 3)))


def test_int8_float_island_is_noted(tmp_path):
    context = make_context(tmp_path)
    model = ConvertToLiteRT().run(source_model(tmp_path, WithMaximum().eval()), context)
    notes = QuantizeLiteRT().run(model, context).lineage[-1].notes
    assert any("stay float32" in note for note in notes)


def test_int8_range_is_true_min_max(converted, tmp_path):
    """One bright sample among many sets the input's range: an averaged range would clip it."""
    model, _ = converted
    context = make_context(tmp_path)
    context.calibration.inputs["picture"][3] *= 10
    result = QuantizeLiteRT(io="int8").run(model, context)
    scale, zero_point = open_tflite(result.path.read_bytes()).get_input_details()["picture"]["quantization"]
    top = context.calibration.inputs["picture"].max()
    assert (127 - zero_point) * scale == pytest.approx(top, rel=0.02)


def test_int8_ends(converted, tmp_path):
    model, _ = converted
    result = QuantizeLiteRT(io="int8").run(model, make_context(tmp_path))
    run = open_tflite(result.path.read_bytes())
    assert run.get_input_details()["picture"]["dtype"] is np.int8
    assert run.get_output_details()["logits"]["dtype"] is np.int8


def test_int8_same_bytes_twice(converted, tmp_path):
    model, _ = converted
    first = QuantizeLiteRT().run(model, make_context(tmp_path / "a"))
    second = QuantizeLiteRT().run(model, make_context(tmp_path / "b"))
    assert first.path.read_bytes() == second.path.read_bytes()


def test_unconvertible_is_an_artifact_error(tmp_path):
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if float(x.sum()) > 0 else x - 1

    with pytest.raises(ArtifactError) as caught:
        ConvertToLiteRT().run(source_model(tmp_path, Branching()), make_context(tmp_path))
    assert caught.value.code == "model.conversion_failed"


def test_obstacles_say_why(tmp_path, monkeypatch):
    onnx_only = WorkModel(path=tmp_path / "a.onnx", format="onnx", precision="fp32", lineage=())
    context = make_context(tmp_path)
    assert ConvertToLiteRT().find_obstacle(onnx_only, context) == "LiteRT conversion needs a torch source"
    assert "tflite" in (QuantizeLiteRT().find_obstacle(onnx_only, context) or "")
    int8 = WorkModel(path=tmp_path / "a.tflite", format="tflite", precision="int8", lineage=())
    assert "fp32" in (QuantizeLiteRT().find_obstacle(int8, context) or "")
    monkeypatch.setattr(convert.importlib.util, "find_spec", lambda _name: None)
    assert "edgekit[litert]" in (ConvertToLiteRT().find_obstacle(source_model(tmp_path), context) or "")


def test_native_output_goes_to_the_log(tmp_path, capfd):
    import os

    with captured_output(tmp_path / "litert.log"):
        os.write(2, b"from native code\n")
    os.write(2, b"after\n")
    assert (tmp_path / "litert.log").read_text() == "from native code\n"
    assert capfd.readouterr().err == "after\n"


def test_conversion_is_silent(tmp_path, capfd):
    ConvertToLiteRT().run(source_model(tmp_path), make_context(tmp_path))
    QuantizeLiteRT()
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
