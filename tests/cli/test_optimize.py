"""``edgekit optimize`` as the user calls it: exit codes, what is on stdout, what a refusal says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edgekit.cli.main import main
from edgekit.compiler import pipeline
from edgekit.schema.base import decode_json
from edgekit.schema.candidate import Candidate
from edgekit.schema.digest import digest_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "compiler"))
from small_graphs import convolutional, images, save


@pytest.fixture(autouse=True)
def short_timing(monkeypatch):
    monkeypatch.setattr(pipeline, "TIMING_SECONDS", {"fast": 0.02, "default": 0.02, "max": 0.02})


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save(convolutional(), tmp_path / "net.onnx")
    labels = np.random.default_rng(0).integers(0, 4, 40)
    np.savez(tmp_path / "data.npz", **images(40), labels=labels)
    return tmp_path


def call(*arguments: str) -> int:
    return main(["optimize", "net.onnx", "--target", "x86-64-avx2", "--data", "data.npz", "--effort", "fast", *arguments])


def test_table_and_verdict(place, capsys):
    assert call("--eval", "data.npz", "--budget", "top1_drop<=0.9") == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split()[:3] == ["candidate", "top1", "drop"]
    assert [line.split()[0] for line in lines[1:4]] == ["fp32", "fp32-optimized", "int8-per-channel"]
    assert "(host)" in lines[0]
    assert "chosen" in out
    assert "Budget met" in out
    assert "edgekit-out/net-x86-64-avx2" in out
    assert (place / "edgekit-out" / "net-x86-64-avx2" / "report.html").is_file()
    assert "evaluating" in err
    assert "warning:" in err


def test_json_is_the_record_and_nothing_else(place, capsys):
    assert call("--json", "--out", "result", "--quiet") == 0
    out, _err = capsys.readouterr()
    record = decode_json(out, Candidate)
    assert record.verdict.status == "chosen"
    assert digest_file(place / "result" / record.artifact.path) == record.artifact.digest
    assert out.encode() == (place / "result" / "candidate.json").read_bytes()


def test_budget_missed_is_exit_1(place, capsys):
    assert call("--budget", "latency_ms<=0.000001", "--out", "result") == 1
    assert "Budget not met" in capsys.readouterr().out
    assert (place / "result" / "model.onnx").is_file()


def test_dry_run_writes_no_result(place, capsys):
    assert call("--dry-run", "--out", "result") == 0
    out = capsys.readouterr().out
    assert "int8-per-channel" in out
    assert "quantize-static(is_per_channel=True)" in out
    assert not (place / "result").exists()


def test_dry_run_as_json_is_only_json(place, capsys):
    assert call("--dry-run", "--json", "--out", "result") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["candidates"][0]["name"] == "fp32"
    assert plan["output"] == "result"
    assert not (place / "result").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget", "latency_ms<5"], "^"),
        (["--budget", "top1_drop<=0.01", "--metric", "agreement"], "the metric is agreement"),
        (["--target", "raspbery-pi-4"], "raspberry-pi-4"),
        (["--effort", "huge"], "fast, default, max"),
        (["--data", "no.npz"], "no.npz"),
        (["--input", "x"], "name=shape"),
        (["--labels", "no.txt"], "no.txt"),
        (["--weights", "net.onnx"], "--weights is for torch models"),
        (["--metric", "top2"], "top2"),
        (["--threads", "0"], "threads"),
    ],
)
@pytest.mark.usefixtures("place")
def test_wrong_argument_is_exit_2(arguments, words, capsys):
    assert call(*arguments) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert out == ""


def test_model_that_does_not_load_is_exit_3(place, capsys):
    (place / "net.onnx").write_bytes(b"nothing")
    assert call() == 3
    assert "net.onnx: not an ONNX model" in capsys.readouterr().err


def test_class_names_come_from_a_file(place):
    (place / "names.txt").write_text("cat\ndog\nbird\nfish\n")
    assert call("--labels", "names.txt", "--out", "result") in (0, 1)
    record = decode_json((place / "result" / "candidate.json").read_bytes(), Candidate)
    assert record.contract.labels == ("cat", "dog", "bird", "fish")


def test_no_identifier_file_is_left(place):
    (place / "home").mkdir()
    (place / "tiny.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def create():\n    return nn.Sequential(nn.Flatten(), nn.Linear(144, 4))\n"
        "def example_inputs():\n    return (torch.zeros(1, 1, 12, 12),)\n"
    )
    np.savez(place / "plain.npz", inputs=images(40)["x"])
    code = "from edgekit.cli.main import run; run()"
    arguments = ["optimize", "tiny.py:create", "--target", "host", "--data", "plain.npz", "--effort", "fast", "--out", "result"]
    home = {"HOME": str(place / "home"), "XDG_CACHE_HOME": str(place / "home" / ".cache")}
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"} | home
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=place, env=environment, capture_output=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    assert [path for path in (place / "home").rglob("*") if "onnxruntime" in path.name.lower() or path.name == "deviceid"] == []


def test_interrupt_keeps_the_work(place):
    code = "from edgekit.cli.main import run; run()"
    arguments = ["optimize", "net.onnx", "--target", "host", "--data", "data.npz", "--effort", "max", "--out", "result"]
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True, cwd=place) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "timing" in line:
                break
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(30) == 130
    assert "the same command goes on" in rest
    assert list((place / "result" / ".work" / "steps").glob("*/step.json"))
    assert not (place / "result" / "candidate.json").exists()
