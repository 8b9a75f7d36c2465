"""``edgekit inspect`` and ``edgekit explain`` as a user meets them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from edgekit.cli.main import main

SAMPLE = Path(__file__).parents[2] / "sample_models/fashion-mnist"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("explain")
    arguments = ["optimize", str(SAMPLE / "model.onnx"), "--target", "host", "--data", str(SAMPLE / "calibration.npz")]
    assert main([*arguments, "--out", str(folder / "out"), "--effort", "fast", "--quiet"]) in (0, 1)
    return folder / "out"


def test_inspect_shows_what_runs(capsys):
    assert main(["inspect", str(SAMPLE / "model.onnx")]) == 0
    shown = capsys.readouterr().out
    assert "parameters, float32" in shown
    assert "Conv" in shown
    assert "ReorderOutput" in shown


def test_inspect_as_json_names_every_kernel(capsys, finished):
    assert main(["inspect", str(finished / "candidates" / "int8-per-channel" / "model.onnx"), "--json"]) == 0
    audit = json.loads(capsys.readouterr().out)
    assert {"QLinearConv", "QGemm"} <= {kernel["op_type"] for kernel in audit["kernels"]}


def test_inspect_refuses_what_it_cannot_read(capsys, tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    assert main(["inspect", str(broken)]) != 0
    assert "not an ONNX model" in capsys.readouterr().err


def test_explain_shows_every_step(capsys, finished):
    assert main(["explain", str(finished), "--candidate", "int8-per-channel"]) == 0
    shown = capsys.readouterr().out
    assert "quantize-static" in shown
    assert "is_per_channel = True" in shown
    assert "gives sha256:" in shown


@pytest.mark.parametrize("name", ["int8-per-channel", "int8-mixed"])
def test_explain_makes_the_same_bytes_again(capsys, finished, name):
    assert main(["explain", str(finished), "--again", "--quiet", "--candidate", name]) == 0
    assert f"{name}: made again, bit for bit" in capsys.readouterr().out


def test_explain_says_which_step_differs(capsys, finished, tmp_path):
    report = json.loads((finished / "report.json").read_text())
    record = next(item for item in report["candidates"] if item["name"] == "int8-per-channel")
    record["lineage"][-1]["settings"]["method"] = "mse"
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert main(["explain", str(tmp_path), "--again", "--quiet", "--candidate", "int8-per-channel"]) == 1
    shown = capsys.readouterr().out
    assert "quantize-static: differs" in shown
    assert "import-onnx: same bytes" in shown


def test_explain_names_the_candidates_it_has(capsys, finished):
    assert main(["explain", str(finished), "--candidate", "int9"]) == 2
    assert "int8-per-channel" in capsys.readouterr().err


def test_explain_wants_an_output_folder(capsys, tmp_path):
    assert main(["explain", str(tmp_path)]) != 0
    assert os.fspath(tmp_path) in capsys.readouterr().err
