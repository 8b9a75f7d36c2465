"""Real small things for the agent's tests: models, a repository over HTTP, a broker, the agent as a process."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle.golden import tensor_data
from edgekit.bundle.writer import write_bundle
from edgekit.fleet.broker import EmbeddedBroker
from edgekit.repository.ceremony import init_repository
from edgekit.repository.publishing import publish
from edgekit.repository.server import RepositoryServer
from edgekit.schema.base import encode_msgpack
from edgekit.schema.candidate import Candidate, SourceModel, Verdict
from edgekit.schema.contract import Contract, InputSpec
from edgekit.schema.digest import digest_bytes, hex_of
from edgekit.schema.manifest import BlobRef, GoldenSample, GoldenSet, Manifest, Requires, Variant
from edgekit.schema.tensor import TensorSpec
from edgekit.trust.signer import generate_signer

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CONTRACT = Contract(
    inputs=(InputSpec(name="x", dtype="float32", shape=("batch", 4), minimum=-1.0, maximum=1.0),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 3)),),
    task="classification",
    labels=("a", "b", "c"),
)


def build_manifest(*, version="1.0", requires=None, blobs=None, name="m"):
    """A manifest whose blobs are given as {(variant index, role): bytes}, or made up."""
    requires = requires or [Requires(runtime="onnxruntime")]
    blobs = blobs or {(i, role): f"{version}{i}{role}".encode() for i in range(len(requires)) for role in ("model", "golden")}
    refs = {
        key: BlobRef(path=f"v{key[0]}/{key[1]}", role=key[1], digest=digest_bytes(data), size_bytes=len(data))
        for key, data in blobs.items()
    }
    variants = tuple(
        Variant(
            name=f"v{i}",
            format="onnx",
            precision="fp32",
            model=refs[i, "model"].digest,
            golden=refs[i, "golden"].digest,
            requires=need,
        )
        for i, need in enumerate(requires)
    )
    candidate = Candidate(
        name="c",
        target="host",
        target_digest=digest_bytes(b"t"),
        source=SourceModel(spec="m.onnx", kind="onnx", digest=digest_bytes(b"s"), size_bytes=1),
        contract=CONTRACT,
        verdict=Verdict(status="chosen", is_budget_met=True, reason="r"),
        seed=0,
        created_at=NOW,
        edgekit_version="0",
    )
    return Manifest(
        name=name,
        version=version,
        created_at=NOW,
        target="host",
        contract=CONTRACT,
        variants=variants,
        blobs=tuple(refs.values()),
        candidate=candidate,
        edgekit_version="0",
    )


def build_model(seed: int, padding: int = 0) -> tuple[bytes, np.ndarray]:
    """y = x W, with the weights of a seed; as many bytes larger as padding says."""
    weights = np.random.default_rng(seed).normal(size=(4, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    model.doc_string = "x" * padding
    return model.SerializeToString(), weights


def build_golden(weights: np.ndarray) -> bytes:
    """Two samples with the outputs of these weights."""
    samples = []
    for seed in range(2):
        x = np.random.default_rng(seed).uniform(-1, 1, size=(1, 4)).astype(np.float32)
        samples.append(GoldenSample(inputs={"x": tensor_data(x)}, outputs={"y": tensor_data(x @ weights)}))
    return encode_msgpack(GoldenSet(samples=tuple(samples), atol=1e-4, rtol=1e-4))


def wait_for(condition, *, seconds=30.0, what="it"):
    """Wait until the condition is truthy and return its value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.03)
    raise AssertionError(f"{what} did not happen within {seconds} s")


class World:
    """A signed repository served over loopback HTTP."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "repository"
        self.bundles = folder / "bundles"
        self.bundles.mkdir()
        init_repository(self.folder, keys_dir=folder / "keys")
        self.signer = generate_signer()
        self.server: RepositoryServer | None = None
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def root(self) -> Path:
        return self.folder / "metadata" / "1.root.json"

    def start(self) -> None:
        self.server = RepositoryServer(self.folder, host="127.0.0.1", port=self.port)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server = None

    def publish(
        self,
        version: str,
        *,
        seed: int,
        broken: bool = False,
        model: bytes | None = None,
        requires=None,
        padding=0,
        name: str = "m",
        golden: bytes | None = None,
        baseline: bytes = b"",
    ):
        """Publish a release; a broken one has golden samples of other weights."""
        made, weights = build_model(seed, padding)
        golden = golden or build_golden(weights[::-1] if broken else weights)
        blobs = {(0, "model"): model or made, (0, "golden"): golden} | ({(0, "baseline"): baseline} if baseline else {})
        manifest = build_manifest(version=version, blobs=blobs, requires=requires, name=name)
        out = self.bundles / f"{name}-{version}.edgekit"
        write_bundle(manifest, {digest_bytes(data): data for data in blobs.values()}, signer=self.signer, out=out)
        return publish(self.folder, out, keys=[self.signer.public_key])

    def blob_of(self, seed: int) -> Path:
        return self.folder / "blobs" / "sha256" / hex_of(digest_bytes(build_model(seed)[0]))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def toml(values: dict, prefix: str = "") -> str:
    """Settings as TOML; a dict becomes a table, a list of dicts an array of tables."""
    arrays = {name: value for name, value in values.items() if isinstance(value, list) and value and isinstance(value[0], dict)}
    tables = {name: value for name, value in values.items() if isinstance(value, dict)}
    plain = {name: value for name, value in values.items() if name not in arrays and name not in tables}
    lines = [f"{name} = {json.dumps(value)}" for name, value in plain.items()]
    for name, table in tables.items():
        lines += [f"[{prefix}{name}]", toml(table, f"{prefix}{name}.")]
    for name, array in arrays.items():
        for table in array:
            lines += [f"[[{prefix}{name}]]", toml(table, f"{prefix}{name}.")]
    return "\n".join(lines)


class Agent:
    """The agent as a process."""

    def __init__(self, folder: Path, **settings) -> None:
        self.port = free_port()
        self.state_dir = folder / "state"
        self.log = folder / "agent.log"
        values = {
            "device": "cam",
            "site": "lab",
            "state_dir": str(self.state_dir),
            "port": self.port,
            "model": "m",
            "poll_s": 0.2,
        }
        values |= {"drain_s": 0.5, "probation": {"seconds": 0.1}} | settings
        self.config = folder / "agent.toml"
        self.config.write_text(toml(values))
        self.process: subprocess.Popen | None = None

    def start(self, *, prefix: tuple[str, ...] = (), **environment: str) -> Agent:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "edgekit", "agent", "run", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | environment,
            )
        return self

    def stop(self, seconds: float = 15.0) -> int:
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def post(self, path: str, body):
        """Status and JSON of a request with a JSON body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            connection.request("POST", path, json.dumps(body))
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def get(self, path: str):
        """Status and JSON; (0, None) when nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())
        except (OSError, http.client.HTTPException):
            return 0, None

    def served(self, name: str = "m") -> str:
        """The version that is served, or an empty string."""
        status, body = self.get(f"/v2/models/{name}")
        return body["versions"][0] if status == 200 else ""

    def wait_served(self, version: str, name: str = "m") -> None:
        try:
            wait_for(lambda: self.served(name) == version, what=f"serving {name} {version}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log.read_text()[-6000:]}") from error

    def wait_committed(self, version: str, name: str = "m") -> None:
        """Served, and past its probation."""

        def is_committed(body: dict) -> bool:
            found = next((model for model in body["models"] if model["name"] == name), None)
            return found is not None and found["version"] == version and found["state"]["probation"] is None

        self.wait_status(is_committed, what=f"the commit of {name}@{version}")

    def status(self) -> dict:
        status, body = self.get("/status")
        assert status == 200, self.log.read_text()[-3000:]
        return body

    def wait_status(self, condition, *, what="the status"):
        def check():
            status, body = self.get("/status")
            return body if status == 200 and condition(body) else None

        try:
            return wait_for(check, what=what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log.read_text()[-6000:]}") from error

    def infer(self, data, *, model: str = "m", **more):
        """Status, headers and JSON of an inference."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": data} | more
        with contextlib.closing(connection):
            connection.request("POST", f"/v2/models/{model}/infer", json.dumps({"inputs": [tensor]}))
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), json.loads(answer.read())

    def logged(self, text: str) -> bool:
        return text in self.log.read_text()

    def worker_pids(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"edgekit.agent.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def assert_serves(agent: Agent, *seeds: int, name: str = "m") -> None:
    """Invariant I0: what is served is whole and right: it answers a golden sample as one of these models would."""
    x = np.random.default_rng(0).uniform(-1, 1, size=(1, 4)).astype(np.float32)
    status, headers, body = agent.infer(x[0].tolist(), model=name)
    assert status == 200, body
    answer = np.array(body["outputs"][0]["data"])
    digests = {digest_bytes(build_model(seed)[0]): build_model(seed)[1] for seed in seeds}
    assert body["parameters"]["model_digest"] == headers["edgekit-model-digest"]
    np.testing.assert_allclose(answer, (x @ digests[headers["edgekit-model-digest"]])[0], atol=1e-4)


class Gate:
    """A door in front of a TCP server: shut, every connection through it is cut and no new one is let in."""

    def __init__(self, port: int, behind: int) -> None:
        self.behind = behind
        self.sockets: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                outer, _address = self.listener.accept()
                inner = socket.create_connection(("127.0.0.1", self.behind))
            except OSError:
                return
            self.sockets += [outer, inner]
            for source, sink in ((outer, inner), (inner, outer)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def shut(self) -> None:
        for end in (self.listener, *self.sockets):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


class Listener:
    """An embedded MQTT 5 broker with a subscriber that keeps every message of ours.

    Agents come through a gate that opens after the subscription and is shut before the broker ends, so that the subscriber
    misses nothing that the broker confirmed.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.inner_port = free_port()
        self.gate: Gate | None = None
        self.broker = EmbeddedBroker(self.inner_port)
        self.messages: list[tuple[str, object, int]] = []
        self.client = None

    def start(self) -> Listener:
        import paho.mqtt.client as paho

        self.broker.start()
        client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id="listener", protocol=paho.MQTTv5)
        subscribed = threading.Event()
        client.on_connect = lambda *_: client.subscribe("ek/1/#", qos=1)
        client.on_subscribe = lambda *_: subscribed.set()
        client.on_message = lambda _client, _data, message: self._take(message.topic, message.payload)
        client.connect("127.0.0.1", self.inner_port)
        client.loop_start()
        assert subscribed.wait(10)
        self.client = client
        self.gate = Gate(self.port, self.inner_port)
        return self

    def _take(self, topic: str, payload: bytes) -> None:
        from edgekit.telemetry.codec import decode

        self.messages.append((topic, decode(payload), len(payload)))

    def of(self, kind) -> list:
        return [message for _, message, _ in self.messages if isinstance(message, kind)]

    def seqs(self) -> dict[int, list[int]]:
        """Every stored seq that arrived, by boot."""
        found: dict[int, list[int]] = {}
        for _, message, _ in list(self.messages):
            if hasattr(message, "windows"):
                for window in message.windows:
                    ends = window.merged or (window.seq, window.seq)
                    for at in range(0, len(ends), 2):
                        found.setdefault(message.boot, []).extend(range(ends[at], ends[at + 1] + 1))
            elif hasattr(message, "seq") and type(message).__name__ != "Heartbeat":
                found.setdefault(message.boot, []).append(message.seq)
        return found

    def stop(self) -> None:
        if self.gate is not None:
            self.gate.shut()
            self.gate = None
            time.sleep(0.3)  # what the broker confirmed is on its way to the subscriber
        if self.client is not None:
            self.client.disconnect()
            self.client.loop_stop()
            self.client = None
        self.broker.stop()
