"""The Python client against a real server: both kinds of sockets, tries, swaps, and every way to be refused."""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
import time

import numpy as np
import pytest

from edgekit.agent.client import Client
from edgekit.agent.http import Limits, Server, error_answer
from edgekit.agent.link import Model
from edgekit.agent.meter import Meter
from edgekit.agent.serve import Predictor, Service
from edgekit.errors import DataError, DeviceError, EnvironmentFault, UsageError
from edgekit.runtime.registry import open_session
from tests.agent.world import build_manifest, build_model


class Host:
    """A server in a thread, over TCP and a Unix socket; ``handler`` may be exchanged while it runs."""

    def __init__(self, folder):
        self.path = folder / "agent.sock"
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind(str(self.path))
        self.unix.listen()
        self.handler = lambda _request: error_answer(503, "nothing yet", code="agent.no_model", headers=(("retry-after", "0"),))
        self.is_ready = threading.Event()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_until_complete, args=(self._run(),))
        self.thread.start()
        self.is_ready.wait(5)

    async def _run(self):
        self.stop = asyncio.Event()
        self.servers = [Server(self._answer, Limits(drain_seconds=0.2)) for _ in range(2)]
        for server, listener in zip(self.servers, (self.tcp, self.unix), strict=True):
            server.start(listener)
        self.is_ready.set()
        await self.stop.wait()
        for server in self.servers:
            await server.drain(limit_seconds=2)

    def _answer(self, request):
        return self.handler(request)

    def close(self):
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join()
        self.loop.close()

    @property
    def urls(self):
        return {"tcp": f"http://127.0.0.1:{self.tcp.getsockname()[1]}", "unix": f"unix://{self.path}"}


@pytest.fixture
def host(tmp_path):
    made = Host(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """y = x W behind the real routes."""
    folder = tmp_path_factory.mktemp("model")
    data, weights = build_model(1)
    path = folder / "m.onnx"
    path.write_bytes(data)
    manifest = build_manifest()
    session = open_session(path)

    async def status():
        return b"{}"

    model = Model(manifest=manifest, variant=manifest.variants[0], blob_dir=str(folder))
    predictor = Predictor(model, session, Meter(model_digest=manifest.variants[0].model), golden_ms=0.1)
    yield Service(status, {"m": predictor}, absences={"old": "it was recalled"}), weights
    session.close()


X = np.random.default_rng(0).uniform(-1, 1, (5, 4)).astype(np.float32)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_prediction_with_exactly_one_model(host, service, kind):
    routes, weights = service
    host.handler = routes.handle
    with Client(host.urls[kind]) as client:
        assert client.is_ready()
        assert client.models() == ("m",)
        found = client.describe("m")
        assert (found.version, found.labels, found.inputs[0].shape) == ("1.0", ("a", "b", "c"), ("batch", 4))
        answer = client.predict("m", {"x": X}, outputs=["y"], prediction_id="mine")
        assert np.allclose(answer.outputs["y"], X @ weights, atol=1e-5)
        assert (answer.model, answer.version, answer.model_digest) == ("m", "1.0", found.digest)
        assert answer.prediction_id == "mine"
        given = [client.predict("m", {"x": X}).prediction_id for _ in range(3)]
        assert len(set(given)) == 3
        line = client._line
        assert client.predict("m", {"x": X[:, ::1].astype(">f4")}, version="1.0").outputs["y"].shape == (5, 3)
        assert client._line is line, "one connection is kept"


def test_wrong_requests_are_refused_with_the_agents_reason(host, service):
    host.handler = service[0].handle
    client = Client(host.urls["tcp"])
    with pytest.raises(DataError, match="shape"):
        client.predict("m", {"x": X[:, :2]})
    with pytest.raises(DataError, match="float64"):
        client.predict("m", {"x": X.astype(np.float64)})
    with pytest.raises(DataError, match="complex64"):
        client.predict("m", {"x": X.astype(np.complex64)})
    with pytest.raises(UsageError) as caught:
        client.predict("other", {"x": X})
    assert caught.value.code == "model.unknown"
    with pytest.raises(UsageError) as caught:
        client.predict("m", {"x": X}, version="9")
    assert caught.value.code == "model.unknown_version"
    started = time.monotonic()
    with pytest.raises(DeviceError, match="recalled"):
        client.predict("old", {"x": X})
    assert time.monotonic() - started < 5, "what was taken out of service is not waited for"
    client.close()


def test_full_queue_and_missing_model_are_waited_for(host, service):
    answers = itertools.chain(
        [
            error_answer(429, "full", code="agent.overloaded", headers=(("retry-after", "0"),)),
            error_answer(503, "no model is installed yet", code="agent.no_model", headers=(("retry-after", "1"),)),
        ],
        itertools.repeat(None),
    )
    host.handler = lambda request: next(answers) or service[0].handle(request)
    assert Client(host.urls["tcp"]).predict("m", {"x": X}).model == "m"
    host.handler = lambda _request: error_answer(429, "full", code="agent.overloaded", headers=(("retry-after", "0"),))
    with pytest.raises(DeviceError) as caught:
        Client(host.urls["tcp"], timeout_s=0.3).predict("m", {"x": X})
    assert caught.value.code == "agent.overloaded"


def test_connection_that_ends_between_or_in_calls_is_made_again(host, service):
    routes, _ = service
    host.handler = routes.handle
    client = Client(host.urls["unix"])
    client.predict("m", {"x": X})
    host.loop.call_soon_threadsafe(lambda: [c._transport.close() for s in host.servers for c in list(s.connections)])
    time.sleep(0.2)
    assert client.predict("m", {"x": X}).model == "m"
    cuts = iter([True, True])

    def cut(request):
        if next(cuts, False):
            for server in host.servers:
                for connection in list(server.connections):
                    connection._transport.abort()
        return routes.handle(request)

    host.handler = cut
    assert client.predict("m", {"x": X}).model == "m"


def test_nobody_there_fails_at_once(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    started = time.monotonic()
    for url in (f"http://127.0.0.1:{port}", f"unix://{tmp_path}/none.sock"):
        with pytest.raises(EnvironmentFault, match="no agent answers"):
            Client(url).predict("m", {"x": X})
        assert not Client(url).is_ready()
    assert time.monotonic() - started < 10
    for url in ("ftp://x", "unix://host/path", "http://x:port", "kws"):
        with pytest.raises(UsageError) as caught:
            Client(url)
        assert caught.value.code == "agent.bad_url"


@pytest.mark.parametrize(
    "said",
    [
        b"hello\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]",
        b'HTTP/1.1 200 OK\r\ncontent-length: 14\r\n\r\n{"outputs":[1]}'[:-1],
        b"x" * 70_000,
    ],
)
def test_something_else_that_listens_there_is_told(said):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            line, _ = listener.accept()
            with line:
                line.recv(65536)
                line.sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(DeviceError) as caught:
            Client(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=3).predict("m", {"x": X})
        thread.join()
    assert caught.value.code == "agent.bad_answer"
