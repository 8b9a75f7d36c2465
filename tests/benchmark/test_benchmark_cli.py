"""``edgekit benchmark`` as it is typed, on real models."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from edgekit.cli.main import main
from edgekit.schema.base import decode_json
from edgekit.schema.measurement import LatencyReport

QUICK = ["--seconds", "0", "--runs", "5"]


@pytest.fixture
def model(sample_dir) -> str:
    return str(sample_dir / "model.onnx")


def write_linear(path, *, width: int, name: str = "x") -> str:
    import onnx
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Relu", [name], ["y"])],
        "relu",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", width])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return str(path)


def test_table_on_stdout_and_host_on_stderr(model, capfd):
    assert main(["benchmark", model, model, *QUICK]) == 0
    captured = capfd.readouterr()
    header, first, second = captured.out.splitlines()
    for column in ("p50 ms", "p90 ms", "p99 ms", "ratio", "noise", "verdict", "peak RSS"):
        assert column in header
    assert first.startswith("model.onnx ")
    assert first.endswith("baseline")
    assert second.startswith("model.onnx (2)")
    assert second.split()[-1] in {"tie", "faster", "slower"}
    assert "measured on" in captured.err
    assert "onnxruntime" in captured.err


def test_json_is_the_records_and_nothing_else(model, capfd):
    assert main(["benchmark", model, model, *QUICK, "--json"]) == 0
    captured = capfd.readouterr()
    reports = {name: decode_json(json.dumps(value), LatencyReport) for name, value in json.loads(captured.out).items()}
    assert list(reports) == ["model.onnx", "model.onnx (2)"]
    assert reports["model.onnx"].ratio is None
    assert reports["model.onnx (2)"].ratio is not None
    assert all(report.runs == 5 and report.peak_rss_mb > 20 for report in reports.values())
    assert captured.err == ""


@pytest.mark.parametrize("by_path", [True, False])
def test_baseline_by_name_or_path(model, tmp_path, capsys, by_path):
    other = shutil.copy(model, tmp_path / "other.onnx")
    wanted = str(other) if by_path else "other.onnx"
    assert main(["benchmark", model, str(other), *QUICK, "--baseline", wanted, "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert [name for name, report in reports.items() if report["ratio"] is None] == ["other.onnx"]


def test_data_of_the_user(model, sample_dir, capsys):
    assert main(["benchmark", model, *QUICK, "--data", str(sample_dir / "calibration.npz"), "--batch", "3"]) == 0
    assert "model.onnx" in capsys.readouterr().out


def test_models_with_other_input_names(tmp_path, capsys):
    models = [write_linear(tmp_path / f"{name}.onnx", width=8, name=name) for name in ("a", "b")]
    assert main(["benchmark", *models, *QUICK]) == 0
    assert "b.onnx" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["{model}", "--baseline", "gone.onnx"], "gone.onnx: not among the models."),
        (["{folder}/gone.onnx"], "there is no such file"),
        (["{folder}/model.pb"], "is no model format"),
        (["{model}", "--data", "{folder}/gone.npz"], "gone.npz"),
        (["{model}", "--data", "{folder}/wrong.npz"], "wrong.npz"),
        (["{folder}/narrow.onnx", "{folder}/wide.onnx"], "one request must fit both"),
    ],
)
def test_bad_input_is_exit_2_and_named(model, tmp_path, capsys, arguments, text):
    np.savez(tmp_path / "wrong.npz", image=np.zeros((4, 3, 3), np.float32))
    write_linear(tmp_path / "narrow.onnx", width=4)
    write_linear(tmp_path / "wide.onnx", width=6)
    filled = [argument.format(model=model, folder=tmp_path) for argument in arguments]
    assert main(["benchmark", *filled, *QUICK]) == 2
    captured = capsys.readouterr()
    assert text in captured.err
    assert captured.out == ""


def test_damaged_model_is_exit_3(model, tmp_path, capsys):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    assert main(["benchmark", model, str(broken), *QUICK]) == 3
    assert "broken.onnx" in capsys.readouterr().err
