"""Slow models: shared runs, bounded queues, timeouts; what Prometheus reads; connections above the bound; the Unix socket."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import stat
import threading
import time

import numpy as np
import pytest

from edgekit.agent.batching import MAX_BATCH, Waiting, join, largest_batch, split
from edgekit.agent.client import Client
from edgekit.agent.http import Limits, Request, Server
from edgekit.agent.link import Model
from edgekit.agent.listeners import bind_unix
from edgekit.agent.meter import Meter
from edgekit.agent.serve import MAX_QUEUED, Predictor, Service
from edgekit.bundle.golden import array_of
from edgekit.errors import EnvironmentFault
from edgekit.schema.base import decode_msgpack
from edgekit.schema.manifest import GoldenSet
from edgekit.schema.tensor import TensorSpec
from tests.agent.world import build_golden, build_manifest, build_model, wait_for

W = build_model(1)[1]
GOLDEN = decode_msgpack(build_golden(W), GoldenSet)
SAMPLES = [{name: array_of(data) for name, data in sample.inputs.items()} for sample in GOLDEN.samples]


class Slow:
    """y = x W, in a time that depends on the batch; ``gate`` closed: it hangs."""

    runtime, runtime_version = "onnxruntime", "0"

    def __init__(self, each=0.0, call=0.0, batch="batch"):
        self.each, self.call, self.sizes, self.gate = each, call, [], threading.Event()
        self.inputs = (TensorSpec(name="x", dtype="float32", shape=(batch, 4)),)
        self.outputs = (TensorSpec(name="y", dtype="float32", shape=(batch, 3)),)
        self.gate.set()

    def run(self, feeds):
        self.sizes.append(len(feeds["x"]))
        self.gate.wait(20)
        time.sleep(self.call + self.each * len(feeds["x"]))
        return {"y": feeds["x"] @ W}

    def close(self):
        pass


class Leaking(Slow):
    """Looks at the whole batch, as dynamic quantization does."""

    def run(self, feeds):
        return {"y": super().run(feeds)["y"] + np.float32(0.1) * np.abs(feeds["x"]).max()}


def predictor(session, **more):
    manifest = build_manifest()
    model = Model(manifest=manifest, variant=manifest.variants[0], blob_dir="")
    return Predictor(model, session, Meter(model_digest=manifest.variants[0].model), golden_ms=50.0, **more)


def asked(rows, *, name="x"):
    import json

    body = json.dumps(
        {"inputs": [{"name": name, "shape": [len(rows), 4], "datatype": "FP32", "data": np.ravel(rows).tolist()}]}
    ).encode()
    return Request("POST", "/v2/models/m/infer", {}, body, time.monotonic(), is_keep_alive=True)


def values(answer):
    import json

    return np.array(json.loads(answer.body)["outputs"][0]["data"]).reshape(-1, 3)


def test_batch_pays_only_where_it_was_measured_to_and_changes_nothing():
    assert largest_batch(Slow(call=0.01), GOLDEN, SAMPLES, precision="fp32") == MAX_BATCH
    assert largest_batch(Slow(each=0.01), GOLDEN, SAMPLES, precision="fp32") == 1
    assert largest_batch(Leaking(call=0.01), GOLDEN, SAMPLES, precision="fp32") == 1
    assert largest_batch(Slow(call=0.01), GOLDEN, SAMPLES, precision="int8-dynamic") == 1
    assert largest_batch(Slow(call=0.01, batch=1), GOLDEN, SAMPLES, precision="fp32") == 1
    assert largest_batch(Slow(call=0.01), GOLDEN, [], precision="fp32") == 1


def test_batches_are_joined_and_split_in_order():
    parts = [{"x": np.full((size, 4), size, dtype=np.float32)} for size in (1, 3, 2)]
    outputs = {"y": join(parts)["x"] * 2}
    assert [part["y"].mean() for part in split(outputs, [1, 3, 2])] == [2.0, 6.0, 4.0]
    waiting = Waiting(4)
    jobs = [{"x": np.zeros(shape)} for shape in ((1, 4), (2, 4), (2, 4), (1, 5), (9, 4))] + [None]
    for job in jobs:
        waiting.put(job)
    taken = [waiting.take(lambda job: job) for _ in range(6)]
    assert [len(batch) for batch in taken] == [2, 1, 1, 1, 1, 0]


def test_requests_that_wait_share_a_run_and_each_gets_its_own_answer():
    session = Slow()
    served = predictor(session, max_batch=8)

    async def story():
        session.gate.clear()
        rows = [np.full((1 + i % 2, 4), i, dtype=np.float32) for i in range(7)]
        calls = [asyncio.ensure_future(served.infer(asked(each))) for each in rows]
        calls.append(asyncio.ensure_future(served.infer(asked([[1, 2, 3, 4]], name="wrong"))))
        await asyncio.sleep(0.2)
        session.gate.set()
        answers = await asyncio.gather(*calls)
        for answer in answers:
            answer.after()
        for row, answer in zip(rows, answers[:-1], strict=True):
            assert np.allclose(values(answer), row @ W, atol=1e-4)
        assert answers[-1].status == 400

    asyncio.run(story())
    assert session.sizes[0] in {1, 2}
    assert len(session.sizes) <= 4
    assert sum(session.sizes) == 10
    assert served.meter.total_requests == 8
    assert served.meter.total_rejected == 1
    assert served.meter.total_samples == 10


def test_lone_request_runs_at_once():
    session = Slow()
    served = predictor(session, max_batch=8)

    async def story():
        for _ in range(3):
            assert (await served.infer(asked([[1, 2, 3, 4]]))).status == 200

    asyncio.run(story())
    assert session.sizes == [1, 1, 1]


def test_full_queue_pushes_back_and_health_is_answered_meanwhile():
    session = Slow()
    served = predictor(session)

    async def story():
        session.gate.clear()
        calls = [asyncio.ensure_future(served.infer(asked([[0, 0, 0, 0]]))) for _ in range(MAX_QUEUED)]
        await asyncio.sleep(0.05)
        refused = served.infer(asked([[0, 0, 0, 0]]))
        assert refused.status == 429
        assert int(dict(refused.headers)["retry-after"]) >= 3
        session.gate.set()
        assert {answer.status for answer in await asyncio.gather(*calls)} == {200}

    asyncio.run(story())


def test_hanging_model_answers_in_time_that_it_does_not():
    session = Slow()
    served = predictor(session, timeout_s=0.2, max_batch=4)

    async def story():
        session.gate.clear()
        calls = [asyncio.ensure_future(served.infer(asked([[0, 0, 0, 0]]))) for _ in range(3)]
        answers = await asyncio.gather(*calls)
        assert {answer.status for answer in answers} == {504}
        session.gate.set()
        assert (await served.infer(asked([[1, 0, 0, 0]]))).status == 200

    asyncio.run(story())
    assert len(session.sizes) == 2, "what nobody waits for any more is not run"


# --- metrics ----------------------------------------------------------------------------------------------------------------

_SAMPLE = re.compile(r'([a-z_:][a-z0-9_:]*)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\.)*",?)*)\})? (\S+)$')


def parse_page(text):
    """Strictly: every sample after its family's HELP and TYPE, families together, no series twice."""
    families, samples, current = {}, {}, None
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# HELP "):
            current = line.split(" ", 3)[2]
            assert current not in families
            families[current] = None
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name == current
            families[name] = kind
        else:
            name, labels, value = _SAMPLE.match(line).groups()
            assert re.sub(r"_(bucket|sum|count)$", "", name) == current if families[current] == "histogram" else name == current
            assert (name, labels) not in samples
            samples[name, labels or ""] = float(value)
    return families, samples


def test_metrics_page_counts_what_was_asked():
    session = Slow()
    served = predictor(session)

    async def status():
        return b'{"uptime_s":12.5,"rss_mb":70.25,"requests":9,"errors":1,"is_broker_connected":true,"outbox_messages":3}'

    service = Service(status, {"m": served})

    async def story():
        for row in ([0.5] * 4, [7.0] * 4):
            answer = await service.handle(asked([row]))
            answer.after()
        wrong = await service.handle(asked([[1, 2, 3, 4]], name="wrong"))
        wrong.after()
        return await service.handle(Request("GET", "/metrics", {}, b"", time.monotonic(), is_keep_alive=True))

    page = asyncio.run(story())
    assert page.content_type.startswith("text/plain; version=0.0.4")
    families, samples = parse_page(page.body.decode())
    label = 'model="m",version="1.0"'
    assert samples["edgekit_inference_requests_total", label] == 3
    assert samples["edgekit_inference_rejected_total", label] == 1
    assert samples["edgekit_inference_samples_total", label] == 2
    assert samples["edgekit_input_out_of_range_total", label] == 1
    assert samples["edgekit_agent_resident_memory_bytes", ""] == 70.25e6
    assert samples["edgekit_broker_connected", ""] == 1
    assert families["edgekit_inference_duration_seconds"] == "histogram"
    buckets = [value for (name, _), value in samples.items() if name == "edgekit_inference_duration_seconds_bucket"]
    assert buckets == sorted(buckets)
    assert buckets[-1] == samples["edgekit_inference_duration_seconds_count", label] == 2
    assert samples["edgekit_request_duration_seconds_count", label] == 3
    assert samples["edgekit_request_duration_seconds_sum", label] > 0


def test_histogram_buckets_are_exact_at_their_bounds():
    from edgekit.agent.metrics_page import render

    meter = Meter()
    for latency in (0.125, 0.126, 1.0, 1.001, 16384.0, 20000.0):
        meter.count(latency_ms=latency, bytes_in=0, is_error=False, is_rejected=False)
    meter.take()
    _, samples = parse_page(render({('a"b\\c', "1", "d"): meter}, None).decode())
    found = {
        labels.rsplit('le="', 1)[1][:-1]: value
        for (name, labels), value in samples.items()
        if name == "edgekit_request_duration_seconds_bucket"
    }
    assert [found[bound] for bound in ("0.000125", "0.00025", "0.001", "0.002", "16.384", "+Inf")] == [1, 2, 3, 4, 5, 6]


# --- sockets ----------------------------------------------------------------------------------------------------------------


def test_connections_above_the_bound_are_told_and_closed():
    from edgekit.agent.http import Answer

    async def story():
        server = Server(lambda _request: Answer(200, b"{}"), Limits(max_connections=2))
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        server.start(listener)
        kept = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        await asyncio.sleep(0.05)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        said = await reader.read()
        assert said.startswith(b"HTTP/1.1 503")
        assert b"connection: close" in said
        assert server.refused_connections == 1
        writer.close()
        kept.pop()[1].close()
        await asyncio.sleep(0.1)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        for _, each in (*kept, (reader, writer)):
            each.close()
        await server.drain(limit_seconds=2)

    asyncio.run(story())


def test_unix_socket_is_private_and_replaces_only_what_is_dead(tmp_path):
    path = tmp_path / "agent.sock"
    first = bind_unix(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(EnvironmentFault) as caught:
        bind_unix(path)
    assert caught.value.code == "socket.in_use"
    first.close()
    second = bind_unix(path, mode=0o660)
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    second.close()
    path.unlink()
    path.write_text("somebody's file")
    with pytest.raises(EnvironmentFault, match="no socket"):
        bind_unix(path)
    assert path.read_text() == "somebody's file"
    with pytest.raises(EnvironmentFault, match="107"):
        bind_unix(tmp_path / ("x" * 120))
    with pytest.raises(EnvironmentFault, match="cannot listen"):
        bind_unix(tmp_path / "absent" / "agent.sock")


def test_agent_serves_on_its_socket_and_takes_it_away(world, make_agent, tmp_path):
    path = tmp_path / "a.sock"
    world.publish("1.0", seed=1)
    agent = make_agent(socket=str(path)).start()
    agent.wait_served("1.0")
    with Client(f"unix://{path}") as client:
        x = np.array([[0.1, 0.2, 0.3, 0.4]], dtype=np.float32)
        answer = client.predict("m", {"x": x})
        assert np.allclose(answer.outputs["y"], x @ build_model(1)[1], atol=1e-4)
        world.publish("2.0", seed=2)
        wait_for(lambda: client.predict("m", {"x": x}).version == "2.0", what="the new release on the socket")
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{agent.port}/metrics") as page:
        parse_page(page.read().decode())
    assert agent.stop() == 0
    assert not os.path.lexists(path)
