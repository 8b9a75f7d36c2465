#!/usr/bin/env python3
"""The agent's figures on this machine: memory, start, idle CPU, size, added latency, the hot swap under load, telemetry volume.

    scripts/bench/agent.py                       everything, about eight minutes
    scripts/bench/agent.py --only memory,swap    some of it
    scripts/bench/agent.py --json                the figures as JSON on stdout

Needs the checkout's environment (extras optimize, agent, fleet) and the sample model. Everything runs on loopback. The agent
itself runs in an environment of its own with nothing but the extra ``agent``, as on a device: it is made the first time, in
``~/.cache/edgekit-bench`` (``EDGEKIT_BENCH_PYTHON`` names another interpreter).
"""

from __future__ import annotations

import argparse
import asyncio
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
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgekit import __version__
from edgekit.bundle.writer import pack_bundle
from edgekit.dataset.contract import infer_contract
from edgekit.dataset.load import load_dataset
from edgekit.repository.ceremony import init_repository
from edgekit.repository.publishing import publish
from edgekit.repository.server import RepositoryServer
from edgekit.runtime.ort import load_onnxruntime
from edgekit.runtime.registry import open_session
from edgekit.runtime.session import Session, SessionOptions
from edgekit.schema.artifact import ModelArtifact
from edgekit.schema.base import encode_json
from edgekit.schema.candidate import Candidate, SourceModel, Verdict
from edgekit.schema.digest import digest_bytes
from edgekit.telemetry.codec import decode
from edgekit.trust.signer import generate_signer

SAMPLE = Path(__file__).resolve().parents[2] / "sample_models" / "fashion-mnist"
ROOT = Path(__file__).resolve().parents[2]
DEVICE_VENV = Path.home() / ".cache" / "edgekit-bench" / "device"
DEVICE_PYTHON = os.environ.get("EDGEKIT_BENCH_PYTHON") or str(DEVICE_VENV / "bin" / "python")
"""The development environment has packages that a device has not (cryptography alone: 8 MB of memory)."""
LARGE_BYTES = 4_000_000
IDLE_SECONDS = 60.0
STARTS = 7
RUNTIME_PARTS = frozenset(
    {"numpy", "onnxruntime", "flatbuffers", "protobuf", "packaging", "ai-edge-litert", "pip", "setuptools"}
)
"""What is not edgekit's: numpy, the runtime and what the runtime needs, and what every environment has."""
MODEL = "fashion"
RATE = 500.0
BARE = """
import sys, numpy as np
from pathlib import Path
from edgekit.runtime.ort import load_onnxruntime
ort = load_onnxruntime()
settings = ort.SessionOptions()
settings.intra_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], settings, providers=["CPUExecutionProvider"])
x = np.zeros((1, 1, 28, 28), np.float32)
for _ in range(1 if len(sys.argv) > 2 else 50):
    session.run(None, {session.get_inputs()[0].name: x})
pss = next(line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
print(int(Path("/proc/self/statm").read_text().split()[1]) * 4096, int(pss.split()[1]) * 1024, flush=True)
"""


def device_environment() -> dict[str, str]:
    """This checkout's code, whatever environment the interpreter is of."""
    return os.environ | {"PYTHONPATH": str(ROOT)}


def make_device_environment() -> None:
    """The extra ``agent`` and nothing else."""
    if Path(DEVICE_PYTHON).exists():
        return
    say(f"making {DEVICE_VENV} ...")
    subprocess.run([sys.executable, "-m", "venv", str(DEVICE_VENV)], check=True)
    install = [DEVICE_PYTHON, "-m", "pip", "install", "-q", "--disable-pip-version-check", f"{ROOT}[agent]"]
    subprocess.run([*install, "--constraint", str(ROOT / "scripts" / "constraints.txt")], check=True)


def opener(model: Path, *, threads: int, is_optimized: bool) -> Session:
    """How the bundle writer opens the model for its golden samples."""
    return open_session(model, options=SessionOptions(threads=threads, is_optimized=is_optimized))


def say(text: str) -> None:
    """A line for people."""
    print(text, file=sys.stderr, flush=True)


def free_port() -> int:
    """A free loopback port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rss_mb(pid: int) -> float:
    """Resident memory of one process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def pss_mb(pid: int) -> float:
    """Resident memory of one process, what it shares with others counted in parts."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")) / 1e6


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Wait until it is truthy."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise SystemExit("timed out")


def padded_model(padding: int) -> onnx.ModelProto:
    """The sample model with that many bytes of weights more, which it runs through: x + 0 * mean(w)."""
    model = onnx.load(SAMPLE / "model.onnx")
    if not padding:
        return model
    graph, name = model.graph, model.graph.output[0].name
    weights = np.random.default_rng(0).normal(size=padding // 4).astype(np.float32)
    for node in graph.node:
        node.output[:] = ["before_padding" if each == name else each for each in node.output]
    zero = onnx.numpy_helper.from_array(np.zeros((), np.float32), "padding_zero")
    graph.initializer.extend([onnx.numpy_helper.from_array(weights, "padding"), zero])
    axes = {"keepdims": 0}
    graph.node.extend(
        [
            onnx.helper.make_node("Add", ["padding", "before_padding_0"], ["padding_sum"]),
            onnx.helper.make_node("ReduceMean", ["padding_sum"], ["padding_mean"], **axes),
            onnx.helper.make_node("Mul", ["padding_mean", "padding_zero"], ["padding_nothing"]),
            onnx.helper.make_node("Add", ["before_padding", "padding_nothing"], [name]),
        ]
    )
    graph.node.insert(
        len(graph.node) - 4, onnx.helper.make_node("ReduceMean", ["before_padding"], ["before_padding_0"], **axes)
    )
    return model


class World:
    """A repository with releases of the sample model, over HTTP."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repository = folder / "repository"
        init_repository(self.repository, keys_dir=folder / "keys")
        self.signer = generate_signer()
        self.server = RepositoryServer(self.repository, host="127.0.0.1", port=0)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def publish(self, version: str, *, padding: int = 0) -> None:
        """The sample model; a version's document string makes its bytes its own. ``padding`` bytes of weights are added."""
        model = padded_model(padding)
        model.doc_string = version
        folder = self.folder / f"candidate-{version}"
        folder.mkdir()
        path = folder / "model.onnx"
        path.write_bytes(model.SerializeToString())
        session = open_session(path)
        data = load_dataset(str(SAMPLE / "calibration.npz"), session.inputs, limit=64)
        contract = infer_contract(data, session.inputs, session.outputs)
        digest, size = digest_bytes(path.read_bytes()), path.stat().st_size
        candidate = Candidate(
            name="fp32",
            target="host",
            target_digest=digest_bytes(b"host"),
            source=SourceModel(spec="model.onnx", kind="onnx", digest=digest, size_bytes=size),
            contract=contract,
            verdict=Verdict(status="chosen", is_budget_met=True, reason="bench"),
            seed=0,
            created_at=datetime.now(UTC),
            edgekit_version=__version__,
            artifact=ModelArtifact(
                path="model.onnx", digest=digest, size_bytes=size, format="onnx", inputs=session.inputs, outputs=session.outputs
            ),
        )
        session.close()
        (folder / "candidate.json").write_bytes(encode_json(candidate))
        bundle = self.folder / f"{version}.edgekit"
        pack_bundle(folder, bundle, name=MODEL, version=version, signer=self.signer, open_session=opener)
        publish(self.repository, bundle, keys=[self.signer.public_key])


class Agent:
    """One agent process."""

    def __init__(self, world: World, name: str, *extra: str, is_waited_for: bool = True) -> None:
        self.port = free_port()
        self.log = (world.folder / f"{name}.log").open("wb")
        root = world.repository / "metadata" / "1.root.json"
        arguments = ["agent", "run", "--device", name, "--state-dir", str(world.folder / name), "--repository", world.url]
        arguments += ["--root", str(root), "--model", MODEL, "--port", str(self.port), "--poll-s", "1", *extra]
        command = [DEVICE_PYTHON, "-m", "edgekit", *arguments]
        self.process = subprocess.Popen(command, stderr=self.log, stdout=self.log, env=device_environment())
        if is_waited_for:
            wait_for(lambda: self.get("/v2/health/live"))

    def get(self, path: str) -> Any:
        """JSON, or None."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return json.loads(answer.read())
        except (OSError, urllib.error.URLError, ValueError):
            return None

    def wait_served(self, version: str) -> None:
        """Until the version answers."""
        wait_for(lambda: (self.get(f"/v2/models/{MODEL}") or {}).get("versions") == [version])

    def workers(self) -> list[int]:
        """Process ids of the workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"agent.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def memory(self) -> dict[str, float]:
        """Resident memory by process."""
        wait_for(lambda: len(self.workers()) == 1)
        supervisor, worker = self.process.pid, self.workers()[0]
        return {
            "supervisor_mb": rss_mb(supervisor),
            "worker_mb": rss_mb(worker),
            "sum_mb": rss_mb(supervisor) + rss_mb(worker),
            "sum_pss_mb": pss_mb(supervisor) + pss_mb(worker),
        }

    def stop(self) -> None:
        """End it."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


@contextmanager
def agent_of(world: World, name: str, *extra: str) -> Iterator[Agent]:
    """An agent that ends with the block."""
    agent = Agent(world, name, *extra)
    try:
        yield agent
    finally:
        agent.stop()


def image_bodies(count: int) -> tuple[list[np.ndarray], list[bytes], list[bytes]]:
    """Real images, as arrays, as JSON requests and as binary requests (whole HTTP messages)."""
    with np.load(SAMPLE / "field.npz") as data:
        images = [image[None].astype(np.float32) for image in data["image"][:count]]
    plain, binary = [], []
    for image in images:
        tensor: dict[str, Any] = {"name": "image", "shape": list(image.shape), "datatype": "FP32"}
        values = [round(float(v), 6) for v in image.ravel()]
        body = json.dumps({"inputs": [tensor | {"data": values}]}).encode()
        plain.append(_post(body))
        head = json.dumps(
            {
                "inputs": [tensor | {"parameters": {"binary_data_size": image.nbytes}}],
                "parameters": {"binary_data_output": True},
            }
        ).encode()
        binary.append(_post(head + image.tobytes(), f"inference-header-content-length: {len(head)}\r\n"))
    return images, plain, binary


def _post(body: bytes, more: str = "") -> bytes:
    return f"POST /v2/models/{MODEL}/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n{more}\r\n".encode() + body


class Wire:
    """A blocking keep-alive connection with as little client as possible."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, message: bytes) -> bytes:
        """Send and read one answer."""
        self.socket.sendall(message)
        data = b""
        while b"\r\n\r\n" not in data:
            data += self.socket.recv(65536)
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        while len(body) < length:
            body += self.socket.recv(65536)
        if not head.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"the agent said {head!r} {body!r}")
        return body


def percentiles(values: list[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(values)
    return {"p50_ms": ordered[len(ordered) // 2], "p99_ms": ordered[int(len(ordered) * 0.99)], "runs": len(ordered)}


def bench_memory(world: World) -> dict[str, Any]:
    """RSS and PSS without and with a model of 4 MB, beside a bare script's that loads and runs the same model."""
    model = world.folder / "bare.onnx"
    onnx.save(padded_model(LARGE_BYTES), model)
    command = [DEVICE_PYTHON, "-c", BARE, str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=device_environment())
    bare_rss, bare_pss = (int(value) / 1e6 for value in done.stdout.split())
    empty = World(Path(tempfile.mkdtemp(dir=world.folder)))
    with agent_of(empty, "idle") as agent:
        time.sleep(3)
        idle = agent.memory()
    large = World(Path(tempfile.mkdtemp(dir=world.folder)))
    large.publish("1.0.0", padding=LARGE_BYTES)
    with agent_of(large, "memory") as agent:
        agent.wait_served("1.0.0")
        _, plain, _ = image_bodies(50)
        wire = Wire(agent.port)
        for _ in range(10):
            for message in plain:
                wire.ask(message)
        time.sleep(2)
        serving = agent.memory()
    return {
        "bare_script": {"rss_mb": bare_rss, "pss_mb": bare_pss},
        "idle": idle,
        "serving": serving,
        "over_bare": {"rss_mb": serving["sum_mb"] - bare_rss, "pss_mb": serving["sum_pss_mb"] - bare_pss},
    }


def bench_idle(world: World) -> dict[str, Any]:
    """Processor time of supervisor and worker while nothing is asked of them, at default settings, percent of one core."""
    with agent_of(world, "quiet", "--poll-s", "60") as agent:
        agent.wait_served("1.0.0")
        time.sleep(15)
        pids = [agent.process.pid, *agent.workers()]
        before = [cpu_ticks(pid) for pid in pids]
        time.sleep(IDLE_SECONDS)
        used = [(cpu_ticks(pid) - old) / os.sysconf("SC_CLK_TCK") for pid, old in zip(pids, before, strict=True)]
        # What a start of the poll's child or of another process costs is in the supervisor's waited-for children.
    names = ["supervisor_percent", "worker_percent"]
    found = {name: 100 * seconds / IDLE_SECONDS for name, seconds in zip(names, used, strict=True)}
    return found | {"sum_percent": sum(found.values()), "seconds": IDLE_SECONDS}


def cpu_ticks(pid: int) -> int:
    """Of a process and the children that it waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(int(field) for field in fields[11:15])


def bench_start(world: World) -> dict[str, Any]:
    """From the start of the process to the first answer of an installed model, beside a bare script's first result."""
    _, plain, _ = image_bodies(1)
    model = world.folder / "start.onnx"
    onnx.save(padded_model(0), model)
    with agent_of(world, "cold") as agent:
        agent.wait_served("1.0.0")
    bare, served = [], []
    for _ in range(STARTS):
        started = time.perf_counter()
        child = subprocess.Popen(
            [DEVICE_PYTHON, "-c", BARE, str(model), "first"], stdout=subprocess.PIPE, text=True, env=device_environment()
        )
        assert child.stdout is not None
        child.stdout.readline()
        bare.append(time.perf_counter() - started)
        child.wait()
        started = time.perf_counter()
        agent = Agent(world, "cold", is_waited_for=False)
        try:
            while True:
                with contextlib.suppress(OSError, SystemExit, IndexError):
                    wire = Wire(agent.port)
                    wire.ask(plain[0])
                    break
                time.sleep(0.005)
            served.append(time.perf_counter() - started)
        finally:
            agent.stop()
    return {
        "bare_s": statistics.median(bare),
        "agent_s": statistics.median(served),
        "ratio": statistics.median(served) / statistics.median(bare),
        "starts": STARTS,
    }


SIZES = """
import importlib.metadata as m, json, os, sys
from pathlib import Path
found = {}
for each in m.distributions():
    files = [Path(each.locate_file(file)) for file in each.files or []]
    found[each.metadata["Name"]] = sum(file.stat().st_size for file in files if file.is_file())
print(json.dumps(found))
"""


def bench_size(_world: World) -> dict[str, Any]:
    """Installed bytes of edgekit and what it needs, compiled modules included, without numpy and the runtime."""
    done = subprocess.run([DEVICE_PYTHON, "-c", SIZES], capture_output=True, text=True, check=True)
    found = {name: size / 1e6 for name, size in json.loads(done.stdout).items() if name not in RUNTIME_PARTS}
    return {"sum_mb": sum(found.values())} | dict(sorted(found.items(), key=lambda item: -item[1]))


def bench_latency(world: World, rounds: int = 3000) -> dict[str, Any]:
    """What the agent adds to a bare InferenceSession.run: interleaved, one request of each kind a round."""
    ort = load_onnxruntime()
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    bare = ort.InferenceSession(str(SAMPLE / "model.onnx"), settings, providers=["CPUExecutionProvider"])
    name = bare.get_inputs()[0].name
    images, plain, binary = image_bodies(64)
    times: dict[str, list[float]] = {"bare": [], "bare_again": [], "json": [], "binary": [], "health": []}
    health = b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n"
    with agent_of(world, "latency") as agent:
        agent.wait_served("1.0.0")
        wire = Wire(agent.port)
        kinds: list[tuple[str, Callable[[int], Any]]] = [
            ("bare", lambda i: bare.run(None, {name: images[i]})),
            ("json", lambda i: wire.ask(plain[i])),
            ("bare_again", lambda i: bare.run(None, {name: images[i]})),
            ("binary", lambda i: wire.ask(binary[i])),
            ("health", lambda _i: wire.ask(health)),
        ]
        for number in range(rounds + 200):
            for kind, run in kinds:
                started = time.perf_counter()
                run(number % 64)
                if number >= 200:
                    times[kind].append((time.perf_counter() - started) * 1000)
    found = {kind: percentiles(values) for kind, values in times.items()}
    base = found["bare"]
    added = {
        kind: {"p50_ms": found[kind]["p50_ms"] - base["p50_ms"], "p99_ms": found[kind]["p99_ms"] - base["p99_ms"]}
        for kind in ("json", "binary")
    }
    noise = abs(found["bare_again"]["p50_ms"] / base["p50_ms"] - 1)
    return {"latency": found, "added": added, "noise": noise}


async def _one(
    pool: asyncio.Queue[list[Any]], port: int, message: bytes, due: float, results: list[tuple[float, float, str]]
) -> None:
    loop = asyncio.get_running_loop()
    slot = await pool.get()
    try:
        if slot[0] is None:
            slot[:] = await asyncio.open_connection("127.0.0.1", port)
        reader, writer = slot
        writer.write(message)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        await reader.readexactly(int(head.split("content-length: ")[1].split("\r\n")[0]))
        status = head.split()[1]
        digest = head.split("edgekit-model-digest: ")[1].split("\r\n")[0] if status == "200" else f"failed:{status}"
        if "connection: close" in head:
            writer.close()
            slot[:] = [None, None]
    except (OSError, asyncio.IncompleteReadError) as error:
        digest = f"failed:{error!r}"
        slot[:] = [None, None]
    results.append((due, (loop.time() - due) * 1000, digest))
    pool.put_nowait(slot)


async def _load(port: int, message: bytes, halt: asyncio.Event, results: list[tuple[float, float, str]]) -> None:
    """Open loop: each request has its due time, whatever the one before does."""
    pool: asyncio.Queue[list[Any]] = asyncio.Queue()
    for _ in range(16):
        pool.put_nowait([None, None])
    loop = asyncio.get_running_loop()
    due, tasks = loop.time(), []
    while not halt.is_set():
        due += 1 / RATE
        await asyncio.sleep(max(0.0, due - loop.time()))
        tasks.append(asyncio.ensure_future(_one(pool, port, message, due, results)))
    await asyncio.gather(*tasks)


def bench_swap(world: World, swaps: int = 3) -> dict[str, Any]:
    """Requests at 500/s while the model is swapped; latency counts from the due time."""
    _, plain, _ = image_bodies(1)
    results: list[tuple[float, float, str]] = []
    spans: list[tuple[float, float]] = []

    async def run(agent: Agent) -> None:
        halt = asyncio.Event()
        running = asyncio.ensure_future(_load(agent.port, plain[0], halt, results))
        await asyncio.sleep(5)
        loop = asyncio.get_running_loop()
        for number in range(2, 2 + swaps):
            await asyncio.to_thread(
                subprocess.run, [sys.executable, __file__, "--publish", f"{number}.0.0", str(world.folder)], check=True
            )
            started = loop.time()
            await asyncio.to_thread(agent.wait_served, f"{number}.0.0")
            spans.append((started, loop.time() + 1.0))
            await asyncio.sleep(7)
        halt.set()
        await running

    with agent_of(world, "swap") as agent:
        agent.wait_served("1.0.0")
        asyncio.run(run(agent))
    failed = [digest for _, _, digest in results if digest.startswith("failed")]
    first = results[0][0]
    before = [ms for due, ms, _ in results if first + 1 < due < first + 4.5]
    during = [ms for due, ms, _ in results if any(low <= due <= high for low, high in spans)]
    return {
        "rate": RATE,
        "swaps": swaps,
        "requests": len(results),
        "failed": len(failed),
        "failures": dict(Counter(failed)),
        "models": len({digest for _, _, digest in results} - set(failed)),
        "before": percentiles(before),
        "during": percentiles(during),
        "swap_s": statistics.mean(high - low - 1.0 for low, high in spans),
    }


def bench_telemetry(world: World, seconds: float = 120.0) -> dict[str, Any]:
    """Messages and bytes of a device that serves ten requests a second, at default settings, without the first minute."""
    import paho.mqtt.client as paho  # noqa: PLC0415 - only here

    from edgekit.fleet.broker import EmbeddedBroker  # noqa: PLC0415 - the same

    port = free_port()
    seen: list[tuple[float, str, str, int, int]] = []

    def take(_client: Any, _data: Any, message: Any) -> None:
        # On the wire: fixed header 2..3, topic length 2, packet id 2 (QoS 1), property length 1.
        size = len(message.payload) + len(message.topic)
        wire = size + (2 if size < 120 else 3) + 2 + (2 if message.topic.rsplit("/", 1)[1] != "hb" else 0) + 1
        kind = type(decode(message.payload)).__name__
        seen.append((time.monotonic(), message.topic, kind, len(message.payload), wire))

    broker = EmbeddedBroker(port)
    with contextlib.ExitStack() as stack:
        stack.callback(broker.stop)
        broker.start()
        client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id="bench", protocol=paho.MQTTv5)
        client.on_message = take
        client.on_connect = lambda *_: client.subscribe("ek/1/#", qos=1)
        client.connect("127.0.0.1", port)
        client.loop_start()
        with agent_of(world, "telemetry", "--broker", f"mqtt://127.0.0.1:{port}") as agent:
            wait_for(lambda: (agent.get(f"/v2/models/{MODEL}") or {}).get("versions"))
            _, plain, _ = image_bodies(16)
            wire, number = Wire(agent.port), 0
            begin = time.monotonic() + 5
            while time.monotonic() < begin + seconds:
                wire.ask(plain[number % 16])
                number += 1
                time.sleep(0.1)
        client.loop_stop()
    steady = [entry for entry in seen if begin <= entry[0] < begin + seconds]
    minutes = seconds / 60
    return {
        "seconds": seconds,
        "messages_per_minute": len(steady) / minutes,
        "payload_bytes_per_minute": sum(entry[3] for entry in steady) / minutes,
        "wire_bytes_per_minute": sum(entry[4] for entry in steady) / minutes,
        "by_kind": dict(Counter(entry[2] for entry in steady)),
        "birth_bytes": max(entry[3] for entry in seen if entry[2] == "Birth"),
        "window_bytes": max(entry[3] for entry in steady if entry[2] == "WindowBatch"),
    }


def show(found: dict[str, Any], indent: str = "") -> None:
    """The figures as an indented list."""
    for name, value in found.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            show(value, indent + "  ")
        else:
            print(f"{indent}{name}: {f'{value:.3f}' if isinstance(value, float) else value}")


BENCHES = {
    "memory": bench_memory,
    "start": bench_start,
    "idle": bench_idle,
    "size": bench_size,
    "latency": bench_latency,
    "swap": bench_swap,
    "telemetry": bench_telemetry,
}


def republish(version: str, folder: Path) -> None:
    """Publish one more release, in a process of its own: the load must not wait for the packing."""
    world = World.__new__(World)
    world.folder, world.repository, world.signer = folder, folder / "repository", generate_signer()
    world.publish(version)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(BENCHES), help=f"of {', '.join(BENCHES)}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--publish", nargs=2, metavar=("VERSION", "DIR"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.publish:
        republish(options.publish[0], Path(options.publish[1]))
        return
    make_device_environment()
    found: dict[str, Any] = {"edgekit": __version__, "machine": os.uname().machine, "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory(prefix="edgekit-bench-") as folder:
        world = World(Path(folder))
        world.publish("1.0.0")
        for name in options.only.split(","):
            say(f"{name} ...")
            found[name] = BENCHES[name](world)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


if __name__ == "__main__":
    main()
