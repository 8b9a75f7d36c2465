"""What a candidate may not do while it proves itself: real models in real worker processes, under real limits."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import msgspec
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.agent.child import SelfTestFailed
from edgekit.agent.config import AgentConfig, SelfTestConfig
from edgekit.agent.hosting import Hosting
from edgekit.agent.limits import LATENCY_SLACK_MS, make_budget
from edgekit.agent.link import Model, Proof
from edgekit.agent.vitals import cpu_seconds
from edgekit.agent.workers import Workers
from edgekit.bundle.golden import tensor_data
from edgekit.schema.base import encode_msgpack
from edgekit.schema.digest import digest_bytes, hex_of
from edgekit.schema.manifest import GoldenSample, GoldenSet, Requires
from edgekit.schema.measurement import HostFingerprint, LatencyReport
from tests.agent.test_agent_state import FACTS
from tests.agent.world import build_golden, build_manifest, build_model

X = np.ones((1, 4), np.float32)
FAST = SelfTestConfig()


def onnx_model(nodes, *, outputs=(("y", (1, 3)),), initializers=()):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs],
        list(initializers),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


def onnx_linear(weights):
    """y is x W."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(np.asarray(weights, np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


def loop_model(times):
    """As many rounds of next to nothing: y is x W whatever happens."""
    number = helper.make_tensor_value_info("i", TensorProto.INT64, [])
    going = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["c"], ["c2"]),
            helper.make_node("Add", ["v", "one"], ["v2"]),
        ],
        "body",
        [number, going, helper.make_tensor_value_info("v", TensorProto.FLOAT, [])],
        [helper.make_tensor_value_info("c2", TensorProto.BOOL, []), helper.make_tensor_value_info("v2", TensorProto.FLOAT, [])],
        [numpy_helper.from_array(np.float32(1), "one")],
    )
    weights = np.ones((4, 3), np.float32)
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Loop", ["times", "", "s"], ["total"], body=body),
        helper.make_node("Mul", ["total", "zero"], ["nothing"]),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Add", ["h", "nothing"], ["y"]),
    ]
    initializers = [
        numpy_helper.from_array(np.int64(times), "times"),
        numpy_helper.from_array(np.float32(0), "zero"),
        numpy_helper.from_array(weights, "w"),
    ]
    return onnx_model(nodes, initializers=initializers), X @ weights


def hungry_model(mega):
    """Takes so many megabytes while it runs."""
    rows = mega * 1_000_000 // 4 // 4
    weights = np.ones((4, 3), np.float32)
    nodes = [
        helper.make_node("Expand", ["x", "shape"], ["large"]),
        helper.make_node("Exp", ["large"], ["larger"]),
        helper.make_node("ReduceSum", ["larger"], ["s"], keepdims=0),
        helper.make_node("Mul", ["s", "zero"], ["nothing"]),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Add", ["h", "nothing"], ["y"]),
    ]
    initializers = [
        numpy_helper.from_array(np.array([rows, 4], np.int64), "shape"),
        numpy_helper.from_array(np.float32(0), "zero"),
        numpy_helper.from_array(weights, "w"),
    ]
    return onnx_model(nodes, initializers=initializers), X @ weights


def golden_of(expected):
    sample = GoldenSample(inputs={"x": tensor_data(X)}, outputs={"y": tensor_data(expected.astype(np.float32))})
    return encode_msgpack(GoldenSet(samples=(sample,) * 3, atol=1e-3, rtol=1e-3))


def lay_out(folder, model, golden, *, version="2.0", requires=None):
    folder.mkdir(parents=True, exist_ok=True)
    for data in (model, golden):
        (folder / hex_of(digest_bytes(data))).write_bytes(data)
    manifest = build_manifest(version=version, blobs={(0, "model"): model, (0, "golden"): golden}, requires=requires)
    return Model(manifest=manifest, variant=manifest.variants[0], blob_dir=str(folder))


def prove(model, *, active_ms=0.0, **settings):
    """The code that a candidate is refused with, and whether for good; an empty code when it is not."""

    async def main():
        listener = socket.create_server(("127.0.0.1", 0))
        config = AgentConfig(device="d", model="m", **({"drain_s": 0.1, "request_timeout_s": 0.1} | settings))
        workers = Workers((listener,), config, lambda: b"{}", lambda _worker: None)
        unit = types.SimpleNamespace(
            config=config, proof=Proof(golden_ms=active_ms) if active_ms else None, served=None, name="m"
        )
        hosting = Hosting(config, [unit], workers, None, lambda: FACTS, lambda _work: None, None)
        try:
            proven = await asyncio.wait_for(hosting.prove(unit, model), 60)
            assert proven.worker.is_running
        except SelfTestFailed as failed:
            return failed.error.code, failed.is_final
        else:
            return "", True
        finally:
            await workers.stop()
            assert workers.pids == []
            listener.close()

    return asyncio.run(main())


@pytest.mark.fault("F13")
def test_answers_that_are_not_finite_refused(tmp_path):
    model = onnx_model(
        [
            helper.make_node("Slice", ["x", "from", "to", "axis"], ["h"]),
            helper.make_node("Neg", ["h"], ["less"]),
            helper.make_node("Log", ["less"], ["y"]),
        ],
        initializers=[numpy_helper.from_array(np.array([v], np.int64), n) for n, v in (("from", 0), ("to", 3), ("axis", 1))],
    )
    assert prove(lay_out(tmp_path, model, golden_of(np.zeros((1, 3))))) == ("selftest.mismatch", True)


@pytest.mark.fault("F13")
def test_answers_of_another_shape_refused(tmp_path):
    model = onnx_model([helper.make_node("Identity", ["x"], ["y"])], outputs=(("y", (1, 4)),))
    assert prove(lay_out(tmp_path, model, golden_of(np.ones((1, 3))))) == ("selftest.mismatch", True)


@pytest.mark.fault("F13")
def test_ten_times_the_latency_refused(tmp_path):
    model, expected = loop_model(400_000)
    laid = lay_out(tmp_path, model, golden_of(expected))
    assert prove(laid, active_ms=0.5) == ("selftest.latency", True)


@pytest.mark.fault("F13")
def test_more_memory_than_the_release_says_refused(tmp_path):
    model, expected = hungry_model(400)
    requires = [Requires(runtime="onnxruntime", ram_mb=90)]
    assert prove(lay_out(tmp_path, model, golden_of(expected), requires=requires)) == ("selftest.memory", True)
    enough = [Requires(runtime="onnxruntime", ram_mb=900)]
    assert prove(lay_out(tmp_path, model, golden_of(expected), requires=enough))[0] == ""


@pytest.mark.fault("F13")
@pytest.mark.parametrize(("fault", "code"), [("segv", "selftest.crashed"), ("hang", "selftest.timeout")])
def test_process_that_dies_or_hangs_while_it_loads(tmp_path, monkeypatch, fault, code):
    model, weights = build_model(1)
    monkeypatch.setenv("EDGEKIT_FAULT", f"{fault}:load m@2.0")
    assert prove(lay_out(tmp_path, model, build_golden(weights)), selftest_timeout_s=4.0) == (code, True)


@pytest.mark.fault("F13")
def test_inference_that_never_ends_refused(tmp_path):
    model, expected = loop_model(2**62)
    assert prove(lay_out(tmp_path, model, golden_of(expected)), selftest_timeout_s=4.0) == ("selftest.timeout", True)


def test_killed_from_outside_says_nothing_about_the_model(tmp_path, monkeypatch):
    model, weights = build_model(1)
    monkeypatch.setenv("EDGEKIT_FAULT", "kill:load m@2.0")
    assert prove(lay_out(tmp_path, model, build_golden(weights))) == ("selftest.crashed", False)


def report(p50_ms, cpu="c"):
    host = HostFingerprint(
        arch="x86-64", cpu=cpu, isa=(), cores=1, ram_mb=1, os="L", python="3", runtime="onnxruntime", runtime_version="1"
    )
    return LatencyReport(
        host=host, is_on_target=True, threads=1, warmup_runs=1, runs=1, p50_ms=p50_ms, p90_ms=p50_ms, p99_ms=p50_ms,
        mean_ms=p50_ms, p50_low_ms=p50_ms, p50_high_ms=p50_ms, noise=0.0, peak_rss_mb=70.0,
    )  # fmt: skip


def budget(*, latency=None, active_ms=0.0, **changes):
    manifest = build_manifest(version="1")
    manifest = msgspec.structs.replace(manifest, candidate=msgspec.structs.replace(manifest.candidate, latency=latency))
    settings = {"free_mb": 500.0, "ram_factor": 2.0, "ram_limit_mb": 0.0, "latency_factor": 5.0, "latency_limit_ms": 0.0}
    return make_budget(manifest, manifest.variants[0], FACTS, active_ms=active_ms, **(settings | changes))


def test_budgets_by_what_is_known():
    assert budget(latency=report(20.0)).latency_ms == 100.0
    assert budget(latency=report(20.0, cpu="another"), active_ms=10.0).latency_ms == 50.0
    assert budget(active_ms=0.1).latency_ms == 0.1 + LATENCY_SLACK_MS
    assert budget().latency_ms == 0
    assert budget(active_ms=10.0, latency_limit_ms=7.0).latency_ms == 7.0
    assert budget(latency=report(1.0)).ram_mb == 140.0
    assert budget(latency=report(1.0), ram_limit_mb=64.0).ram_mb == 64.0
    assert budget().ram_mb == 500.0


def test_orphan_that_hangs_gives_the_port_back(tmp_path):
    """A model that hangs in native code must not keep its port from the next agent."""
    model, expected = loop_model(2**62)
    laid = lay_out(tmp_path / "blobs", model, golden_of(expected))
    script = f"""
import asyncio, socket, msgspec
from edgekit.agent.child import WorkerProcess
from edgekit.agent.link import Model, Start
from edgekit.schema.manifest import Manifest
async def main():
    listener = socket.create_server(("127.0.0.1", 0))
    model = msgspec.msgpack.decode(open({str(tmp_path / "model")!r}, "rb").read(), type=Model)
    start = Start(models=(model,), threads=1, max_request_bytes=1000, request_timeout_s=1, drain_s=1)
    worker = await WorkerProcess.spawn((listener,), start, lambda: b"")
    print(worker.pid, listener.getsockname()[1], flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    (tmp_path / "model").write_bytes(msgspec.msgpack.encode(laid))
    supervisor = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pid, port = map(int, supervisor.stdout.readline().split())
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if cpu_seconds(pid) > 1.5:
            break  # it has been busy for more than its start takes: it hangs in the loop
        time.sleep(0.1)
    supervisor.send_signal(signal.SIGKILL)
    supervisor.wait()
    while time.monotonic() < deadline and Path(f"/proc/{pid}").exists():
        time.sleep(0.1)
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))
