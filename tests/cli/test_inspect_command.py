"""``edgekit inspect`` and ``edgekit explain`` as a user meets them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgekit.cli import inspect as inspect_command
from edgekit.cli.main import main
from tests.compiler import small_graphs

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


def test_inspect_writes_what_can_be_mended(capsys, tmp_path):
    model = with_loose_pairs(tmp_path, 2)
    before = model.read_bytes()
    assert main(["inspect", str(model), "--repaired", str(tmp_path / "better.onnx")]) == 0
    assert "pairs between two float32 sides removed: 2" in capsys.readouterr().err
    assert {node.op_type for node in onnx.load(tmp_path / "better.onnx").graph.node} == {"Tanh"}
    assert main(["inspect", str(tmp_path / "better.onnx"), "--repaired", str(tmp_path / "again.onnx")]) == 0
    assert not (tmp_path / "again.onnx").exists()
    assert main(["inspect", str(model), "--repaired", str(model)]) == 2
    assert model.read_bytes() == before


def test_inspect_refuses_what_it_cannot_read(capsys, tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    assert main(["inspect", str(broken)]) != 0
    assert "not an ONNX model" in capsys.readouterr().err


def with_loose_pairs(folder: Path, pairs: int) -> Path:
    """Tanh after Tanh, with Q and DQ between them."""
    nodes, source = [], "x"
    for index in range(pairs):
        nodes.append(helper.make_node("Tanh", [source], [f"t{index}"], name=f"tanh{index}"))
        nodes.append(helper.make_node("QuantizeLinear", [f"t{index}", "s", "z"], [f"q{index}"], name=f"Q{index}"))
        source = f"d{index}"
        nodes.append(helper.make_node("DequantizeLinear", [f"q{index}", "s", "z"], [source], name=f"DQ{index}"))
    nodes.append(helper.make_node("Tanh", [source], ["y"], name="last"))
    weights = [numpy_helper.from_array(np.float32(0.01), "s"), numpy_helper.from_array(np.uint8(128), "z")]
    inputs, outputs = [small_graphs.value("x", ["batch", 4])], [small_graphs.value("y", ["batch", 4])]
    return small_graphs.save(small_graphs.build(nodes, inputs, outputs, weights), folder / "pairs.onnx")


def test_inspect_sums_what_runs(capsys):
    assert main(["inspect", str(SAMPLE / "model.onnx"), "--data", str(SAMPLE / "calibration.npz"), "--threads", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith(("Conv ", "ReorderOutput ", "Gemm ", "all "))]
    assert [row[1] for row in rows if row[0] == "ReorderOutput"] == ["conversion"]
    assert [row[2] for row in rows if row[0] == "Conv"] == ["9"]
    assert any(line.startswith("time by precision: fp32 ") for line in lines)


def test_inspect_strict_counts_findings(capsys, tmp_path):
    path = with_loose_pairs(tmp_path, 2)
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "unfused-pair x 2  converted and converted back: " in shown
    assert "Q1 quantizes and DQ1 takes it back, float32 on both sides" in shown
    assert shown.count("repair: take QuantizeLinear and DequantizeLinear out") == 1
    assert main(["inspect", str(path), "--strict"]) == 1
    assert "--strict: 2 findings" in capsys.readouterr().err
    assert main(["inspect", str(path), "--strict", "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["findings"]) == 2


def test_inspect_shortens_what_has_one_repair(capsys, tmp_path):
    path = with_loose_pairs(tmp_path, inspect_command.MOST + 3)
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("takes it back") == inspect_command.MOST
    assert "and 3 more; --json has all" in shown


def test_inspect_lists_nodes(capsys, tmp_path):
    path = with_loose_pairs(tmp_path, 1)
    assert main(["inspect", str(path), "--nodes"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[1:] for row in rows if row[-1:] == ["DQ0"]] == [["conversion", "DequantizeLinear", "DQ0"]]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_inspect_stays_within_the_terminal(columns, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["inspect", str(with_loose_pairs(tmp_path, 2)), "--nodes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= columns
    assert not [line for line in lines if line.endswith((" 2", " 3"))]


def test_inspect_of_a_model_that_the_runtime_refuses(capsys, tmp_path):
    proto = small_graphs.weightless()
    proto.graph.node[0].domain = "com.example"
    proto.opset_import.append(helper.make_opsetid("com.example", 1))
    path = tmp_path / "foreign.onnx"
    onnx.save(proto, path)
    assert main(["inspect", str(path)]) == 3
    shown = capsys.readouterr()
    assert "com.example.Softmax: not an operator of ONNX or ONNX Runtime" in shown.out
    assert "ONNX Runtime refuses this model" in shown.err
    assert main(["inspect", str(path), "--strict"]) == 1


def test_inspect_knows_no_litert(capsys, tmp_path):
    (tmp_path / "model.tflite").write_bytes(b"TFL3")
    assert main(["inspect", str(tmp_path / "model.tflite")]) == 2
    assert "only ONNX models can be inspected" in capsys.readouterr().err


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


def test_strict_optimize_fails_on_what_was_not_meant(finished):
    from edgekit.cli.optimize import _find_unmeant
    from edgekit.compiler.findings import AuditFinding, Findings, RuntimeAudit
    from edgekit.compiler.result import OptimizeResult
    from edgekit.schema.base import decode_json

    result = decode_json((finished / "report.json").read_bytes(), OptimizeResult, name="report.json")
    assert result.chosen.name in result.findings.audits
    found = (
        AuditFinding(kind="float-island", node="a", op_type="Conv", text="a runs in float32"),
        AuditFinding(kind="conversion", node="", op_type="Cast", text="casts cost"),
    )
    audit = RuntimeAudit(model="model.onnx", kernels=(), findings=found)
    changed = msgspec.structs.replace(result, findings=Findings(audits={result.chosen.name: audit}))
    assert _find_unmeant(changed) == ["a runs in float32"]
