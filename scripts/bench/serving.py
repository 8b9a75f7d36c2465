#!/usr/bin/env python3
"""What serving costs: latency added to a bare run of the model, requests a second, memory; beside FastAPI and MLServer.

    scripts/bench/serving.py                        everything, about three minutes
    scripts/bench/serving.py --rounds 5 --json      quicker, as JSON
    scripts/bench/serving.py --without mlserver     leave one out

One model (y = x W, 3 kB of float32 in, 40 bytes out), one machine, one run: all ways take turns, a few hundred requests each,
and every figure is of all rounds. Latencies are of one client that waits for each answer, its own work included: edgekit's
Python client, and for the others the same bare socket code with the body that they take. Requests a second are of processes
that keep several connections busy with bodies made beforehand; their cost is on the same two cores. The first line says how far
two halves of the bare runs differ, which is the noise. MLServer is installed into .venv/peers/mlserver when it is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from edgekit.agent.client import Client
from edgekit.bundle.writer import pack_bundle
from edgekit.repository.ceremony import init_repository
from edgekit.repository.publishing import publish
from edgekit.repository.server import RepositoryServer
from edgekit.runtime.registry import open_session
from edgekit.runtime.session import SessionOptions
from edgekit.schema.artifact import ModelArtifact
from edgekit.schema.base import encode_json
from edgekit.schema.candidate import Candidate, SourceModel, Verdict
from edgekit.schema.contract import Contract, InputSpec
from edgekit.schema.digest import digest_bytes
from edgekit.schema.tensor import TensorSpec
from edgekit.trust.signer import generate_signer

INPUTS, OUTPUTS = 768, 10
FASTAPI = """
import os, numpy as np, onnxruntime, uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
options = onnxruntime.SessionOptions(); options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])
app = FastAPI()
@app.get("/ready")
async def ready(): return {}
@app.post("/json")
async def as_json(request: Request):
    body = await request.json()
    x = np.array(body["inputs"][0]["data"], dtype=np.float32).reshape(body["inputs"][0]["shape"])
    y = session.run(None, {"x": x})[0]
    return JSONResponse({"outputs": [{"name": "y", "shape": y.shape, "datatype": "FP32", "data": y.ravel().tolist()}]})
@app.post("/raw")
async def as_raw(request: Request):
    x = np.frombuffer(await request.body(), dtype=np.float32).reshape(1, -1)
    return Response(session.run(None, {"x": x})[0].tobytes())
uvicorn.run(app, host="127.0.0.1", port=int(os.environ["PORT"]), log_level="error", access_log=False)
"""
MLSERVER = """
import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse
class Onnx(MLModel):
    async def load(self):
        options = onnxruntime.SessionOptions(); options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(self.settings.parameters.uri, options, providers=["CPUExecutionProvider"])
        return True
    async def predict(self, payload):
        x = NumpyCodec.decode_input(payload.inputs[0]).astype("float32")
        y = self.session.run(None, {"x": x})[0]
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("y", y)])
"""
LOAD = """
import socket, sys, time
address, connections, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
request = sys.stdin.buffer.read()
lines = []
for _ in range(connections):
    if address.startswith("/"):
        line = socket.socket(socket.AF_UNIX); line.connect(address)
    else:
        line = socket.create_connection(("127.0.0.1", int(address))); line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    lines.append(line)
def answer(line):
    data = b""
    while b"\\r\\n\\r\\n" not in data: data += line.recv(65536)
    head, _, body = data.partition(b"\\r\\n\\r\\n")
    length = int(next(part.split(b":")[1] for part in head.lower().split(b"\\r\\n") if part.startswith(b"content-length")))
    while len(body) < length: body += line.recv(65536)
    assert b" 200 " in head.split(b"\\r\\n")[0], head
for line in lines: line.sendall(request)
count, end = 0, time.monotonic() + seconds
while time.monotonic() < end:
    for line in lines:
        answer(line); line.sendall(request); count += 1
print(count)
"""


def make_model(path: Path) -> None:
    """One matrix: y = x W."""
    weights = np.random.default_rng(0).normal(size=(INPUTS, OUTPUTS)).astype(np.float32) / 30
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "trivial",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", OUTPUTS])],
        [numpy_helper.from_array(weights, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def publish_model(folder: Path, model: Path) -> Path:
    """A repository with the model's release; the root's path."""
    out = folder / "candidate"
    out.mkdir()
    data = model.read_bytes()
    (out / "model.onnx").write_bytes(data)
    specs = (
        TensorSpec(name="x", dtype="float32", shape=("batch", INPUTS)),
        TensorSpec(name="y", dtype="float32", shape=("batch", OUTPUTS)),
    )
    contract = Contract(
        inputs=(InputSpec(name="x", dtype="float32", shape=("batch", INPUTS), minimum=-9.0, maximum=9.0),), outputs=(specs[1],)
    )
    artifact = ModelArtifact(
        path="model.onnx",
        digest=digest_bytes(data),
        size_bytes=len(data),
        format="onnx",
        inputs=(specs[0],),
        outputs=(specs[1],),
        precision="fp32",
    )
    candidate = Candidate(
        name="fp32",
        target="host",
        target_digest=digest_bytes(b"host"),
        source=SourceModel(spec="model.onnx", kind="onnx", digest=digest_bytes(data), size_bytes=len(data)),
        contract=contract,
        verdict=Verdict(status="chosen", is_budget_met=True, reason="benchmark"),
        seed=0,
        created_at=datetime.now(UTC),
        edgekit_version="0",
        artifact=artifact,
    )
    (out / "candidate.json").write_bytes(encode_json(candidate))
    for name in ("report.html", "report.json"):
        (out / name).write_text("{}")
    signer, bundle = generate_signer(), folder / "m.edgekit"

    def opener(path: Path, *, threads: int, is_optimized: bool) -> Any:
        return open_session(path, options=SessionOptions(threads=threads, is_optimized=is_optimized))

    pack_bundle(out, bundle, name="m", version="1.0", signer=signer, open_session=opener)
    init_repository(folder / "repository", keys_dir=folder / "keys")
    publish(folder / "repository", bundle, keys=[signer.public_key])
    return folder / "repository" / "metadata" / "1.root.json"


def free_port() -> int:
    """One that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], *, ready: Callable[[], bool], log: Path, env: dict[str, str] | None = None) -> Iterator[int]:
    """A process from when it is ready until the end of the block; its process id."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | (env or {}))
    try:
        deadline = time.monotonic() + 60
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{command[0]} did not start; see:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()


def answers(url: str) -> Callable[[], bool]:
    """Whether a URL answers 200."""

    def ask() -> bool:
        try:
            with urllib.request.urlopen(url, timeout=1) as answer:  # noqa: S310 - loopback
                return bool(answer.status == 200)
        except OSError:
            return False

    return ask


def family(pid: int) -> list[int]:
    """A process and all below it."""
    below = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and _parent(entry) == pid]
    return [pid, *(one for child in below for one in family(child))]


def _parent(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError):
        return -1


def memory_mb(pid: int, name: str) -> float:
    """Rss or Pss of a process and all below it."""
    total = 0.0
    for each in family(pid):
        for line in Path(f"/proc/{each}/smaps_rollup").read_text().splitlines():
            if line.startswith(f"{name}:"):
                total += int(line.split()[1]) / 1000
    return total


class Line:
    """The same bare client for all: one request, one answer."""

    def __init__(self, port: int, path: str, body: bytes, content_type: str) -> None:
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
        self.request = head.encode() + body
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self) -> bytes:
        """Send and receive."""
        self.socket.sendall(self.request)
        data = self.socket.recv(65536)
        while (end := data.find(b"\r\n\r\n")) < 0:
            data += self.socket.recv(65536)
        head = data[:end].lower()
        length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
        while len(data) < end + 4 + length:
            data += self.socket.recv(65536)
        if b" 200 " not in head.split(b"\r\n")[0]:
            raise SystemExit(data.decode(errors="replace"))
        return data[end + 4 :]


def timed(work: Callable[[], object], count: int) -> list[float]:
    """Milliseconds of each call."""
    found = []
    for _ in range(count):
        started = time.perf_counter()
        work()
        found.append((time.perf_counter() - started) * 1000)
    return found


def throughput(address: str, request: bytes, *, processes: int, connections: int, seconds: float) -> float:
    """Requests a second of some client processes."""
    command = [sys.executable, "-c", LOAD, address, str(connections), str(seconds)]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(processes)]
    feeders = [threading.Thread(target=_feed, args=(process, request)) for process in started]
    for feeder in feeders:
        feeder.start()
    for feeder in feeders:
        feeder.join()
    return sum(int(process.stdout.read()) for process in started if process.stdout) / seconds


def _feed(process: subprocess.Popen[bytes], request: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(request)
    process.stdin.close()
    process.wait()


def quantile(values: list[float], q: float) -> float:
    """By rank."""
    return float(np.quantile(values, q))


def install_mlserver() -> Path | None:
    """Its interpreter; None where it cannot be installed."""
    home = ROOT / ".venv" / "peers" / "mlserver"
    python = home / "bin" / "python"
    if not (home / "bin" / "mlserver").exists():
        print("installing MLServer into .venv/peers/mlserver", file=sys.stderr)
        made = subprocess.run([sys.executable, "-m", "venv", home], check=False).returncode
        wanted = ROOT / "scripts" / "bench" / "mlserver.txt"
        if made or subprocess.run([python, "-m", "pip", "install", "-qq", "-r", wanted], check=False).returncode:
            return None
    return python


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Serving beside a bare run, FastAPI and MLServer.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--requests", type=int, default=200, help="of each way in each round")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement of requests a second")
    parser.add_argument("--without", action="append", default=[], choices=["fastapi", "mlserver", "throughput"])
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:  # noqa: PLR0915 - one story, told in order
    """Measure and print."""
    options = parse()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgekit-serving-")))
        model = folder / "model.onnx"
        make_model(model)
        root = publish_model(folder, model)
        repository = stack.enter_context(RepositoryServer(folder / "repository", "127.0.0.1", 0))
        port, path = free_port(), folder / "agent.sock"
        config = folder / "agent.toml"
        config.write_text(
            f'model = "m"\nrepository = "http://127.0.0.1:{repository.server_address[1]}"\nroot = "{root}"\n'
            f'state_dir = "{folder / "state"}"\nport = {port}\nsocket = "{path}"\npoll_s = 600\n'
        )
        command = [str(Path(sys.executable).with_name("edgekit")), "agent", "run", "--config", str(config)]
        ready = answers(f"http://127.0.0.1:{port}/v2/health/ready")
        pids = {"edgekit": stack.enter_context(running(command, ready=ready, log=folder / "agent.log"))}

        x = np.random.default_rng(1).normal(size=(1, INPUTS)).astype(np.float32)
        session = open_session(model, options=SessionOptions(threads=1))
        local, remote = Client(f"unix://{path}"), Client(f"http://127.0.0.1:{port}")
        body = json.dumps(
            {"inputs": [{"name": "x", "shape": [1, INPUTS], "datatype": "FP32", "data": x.ravel().tolist()}]}
        ).encode()
        ways: dict[str, Callable[[], object]] = {
            "bare run": lambda: session.run({"x": x}),
            "edgekit, Unix socket, binary": lambda: local.predict("m", {"x": x}),
            "edgekit, TCP, binary": lambda: remote.predict("m", {"x": x}),
        }
        lines = {"edgekit, TCP, JSON": Line(port, "/v2/models/m/infer", body, "application/json")}
        if "fastapi" not in options.without:
            other = free_port()
            env = {"MODEL": str(model), "PORT": str(other)}
            up = running(
                [sys.executable, "-c", FASTAPI], ready=answers(f"http://127.0.0.1:{other}/ready"), log=folder / "f", env=env
            )
            pids["FastAPI"] = stack.enter_context(up)
            lines["FastAPI, TCP, JSON"] = Line(other, "/json", body, "application/json")
            lines["FastAPI, TCP, raw bytes"] = Line(other, "/raw", x.tobytes(), "application/octet-stream")
        python = install_mlserver() if "mlserver" not in options.without else None
        if python is not None:
            other, home = free_port(), folder / "mlserver"
            home.mkdir()
            (home / "runtime_onnx.py").write_text(MLSERVER)
            settings = {"name": "m", "implementation": "runtime_onnx.Onnx", "parameters": {"uri": str(model)}}
            (home / "model-settings.json").write_text(json.dumps(settings))
            ports = {"http_port": other, "grpc_port": free_port(), "metrics_port": free_port()}
            (home / "settings.json").write_text(
                json.dumps({"host": "127.0.0.1", "parallel_workers": 0, "debug": False} | ports)
            )
            ready = answers(f"http://127.0.0.1:{other}/v2/models/m/ready")
            up = running(
                [str(python.with_name("mlserver")), "start", str(home)],
                ready=ready,
                log=folder / "m",
                env={"PYTHONPATH": str(home)},
            )
            pids["MLServer"] = stack.enter_context(up)
            lines["MLServer, TCP, JSON"] = Line(other, "/v2/models/m/infer", body, "application/json")
        ways |= {name: line.ask for name, line in lines.items()}
        for work in ways.values():
            timed(work, 100)
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, work in ways.items():
                found[name] += timed(work, options.requests)
        rates: dict[str, float] = {}
        if "throughput" not in options.without:
            load = {"edgekit, TCP, JSON": (str(port), lines["edgekit, TCP, JSON"].request)}
            load["edgekit, Unix socket, binary"] = (str(path), _binary_request(x))
            load |= {name: (str(line.socket.getpeername()[1]), line.request) for name, line in lines.items()}
            for _ in range(2):
                for name, (address, request) in load.items():
                    rate = throughput(address, request, processes=1, connections=8, seconds=options.seconds)
                    rates[name] = max(rate, rates.get(name, 0.0))
        memory = {name: {kind: memory_mb(pid, kind) for kind in ("Rss", "Pss")} for name, pid in pids.items()}
        local.close()
        remote.close()
        session.close()
    report(found, rates, memory, options)


def _binary_request(x: Any) -> bytes:
    """The bytes that edgekit's client sends."""
    head = json.dumps(
        {
            "inputs": [{"name": "x", "shape": list(x.shape), "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    length = len(head) + x.nbytes
    lines = f"POST /v2/models/m/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n"
    return f"{lines}inference-header-content-length: {len(head)}\r\n\r\n".encode() + head + x.tobytes()


def report(
    found: dict[str, list[float]], rates: dict[str, float], memory: dict[str, dict[str, float]], options: argparse.Namespace
) -> None:
    """Print everything."""
    bare = found["bare run"]
    base = {q: quantile(bare, q) for q in (0.5, 0.99)}
    noise = abs(statistics.median(bare[::2]) - statistics.median(bare[1::2]))
    rows = {
        name: {
            "p50_ms": quantile(values, 0.5),
            "p99_ms": quantile(values, 0.99),
            "added_p50_ms": quantile(values, 0.5) - base[0.5],
            "added_p99_ms": quantile(values, 0.99) - base[0.99],
            "requests_s": rates.get(name),
        }
        for name, values in found.items()
    }
    if options.json:
        print(json.dumps({"ways": rows, "memory_mb": memory, "noise_ms": noise, "load": os.getloadavg()}, indent=2))
        return
    print(f"{len(bare)} requests each, taking turns; noise of the bare run {noise:.4f} ms; load {os.getloadavg()[0]:.1f}")
    print(f"{'':32} {'p50 ms':>8} {'p99 ms':>8} {'added':>8} {'added p99':>10} {'requests/s':>11}")
    for name, row in rows.items():
        rate = f"{row['requests_s']:.0f}" if row["requests_s"] else ""
        latency = f"{row['p50_ms']:8.3f} {row['p99_ms']:8.3f} {row['added_p50_ms']:8.3f} {row['added_p99_ms']:10.3f}"
        print(f"{name:32} {latency} {rate:>11}")
    for name, kinds in memory.items():
        print(f"{name:32} {kinds['Rss']:6.0f} MB resident, {kinds['Pss']:.0f} MB proportional")


if __name__ == "__main__":
    main()
