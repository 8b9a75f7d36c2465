"""What the fleet hears: over a real broker, present, absent, and gone in between."""

from __future__ import annotations

import math
import signal
import zlib

import numpy as np
import pytest

from edgekit.agent.feedback import unpack_tensor
from edgekit.agent.windows import METRICS, SKETCHES
from edgekit.counts import decode_counts
from edgekit.monitor.sketch import build_profile
from edgekit.schema.base import encode_json
from edgekit.schema.message import Birth, Death, Event, Heartbeat, InputSample, Label, Reported, WindowBatch
from edgekit.telemetry.codec import schema_crc, unpack_values
from edgekit.telemetry.histogram import LatencyHistogram
from tests.agent.world import Listener, free_port, wait_for


@pytest.fixture
def listener(tmp_path):
    made = Listener(free_port())
    yield made
    made.stop()


def settings(listener, **more):
    return {"broker": f"mqtt://127.0.0.1:{listener.port}", "window_s": 0.5, "heartbeat_s": 0.5} | more


def windows_of(listener):
    return [window for batch in listener.of(WindowBatch) for window in batch.windows]


def values_of(window):
    return dict(zip((spec.name for spec in METRICS), unpack_values(window.values), strict=True))


def test_life_of_a_device_as_the_fleet_hears_it(world, make_agent, listener):
    listener.start()
    world.publish("1.0", seed=1)
    agent = make_agent(**settings(listener)).start()
    agent.wait_served("1.0")
    for _ in range(20):
        assert agent.infer([0.1, 0.2, 0.3, 0.4])[0] == 200
    agent.infer([5, 0, 0, 0])
    agent.infer([1, 2], shape=[1, 2])
    world.publish("2.0", seed=2, broken=True)
    wait_for(lambda: [e for e in listener.of(Event) if e.kind == "install_refused"], what="the refusal")

    def all_counted():
        return sum(values_of(window)["requests"] for window in windows_of(listener)) >= 22

    wait_for(all_counted, what="all windows")
    wait_for(lambda: listener.of(Heartbeat), what="a heartbeat")
    assert agent.stop() == 0
    wait_for(lambda: listener.of(Death), what="the goodbye")

    births = listener.of(Birth)
    assert (births[0].metrics, births[0].sketches) == (METRICS, SKETCHES)
    assert births[0].url == f"http://127.0.0.1:{agent.port}"
    assert births[0].cores > 0
    assert births[0].arch
    (death,) = listener.of(Death)
    assert death.is_clean
    assert {message.boot for _, message, _ in listener.messages} == {births[0].boot}

    windows = windows_of(listener)
    totals = [sum(values_of(window)[name] for window in windows) for name in ("requests", "errors", "rejected", "out_of_range")]
    assert totals == [22, 0, 1, 1]
    merged = LatencyHistogram()
    for window in windows:
        if window.sketches:
            merged.merge(LatencyHistogram.decode(window.sketches[0]))
    assert merged.count == 22
    busy = next(values_of(window) for window in windows if values_of(window)["requests"])
    assert 0 < busy["latency_p50_ms"] <= busy["latency_p99_ms"]
    assert 1 / 3 <= busy["confidence_mean"] <= 1
    assert busy["rss_mb"] > 10
    idle = [values_of(window) for window in windows if not values_of(window)["requests"]]
    assert all(math.isnan(values["latency_p50_ms"]) for values in idle)
    assert {batch.schema for batch in listener.of(WindowBatch)} == {schema_crc(METRICS, SKETCHES)}

    kinds = [event.kind for event in listener.of(Event)]
    for kind in ("agent_started", "release_found", "install_started", "install_finished", "install_refused", "agent_stopped"):
        assert kind in kinds
    refused = next(event for event in listener.of(Event) if event.kind == "install_refused")
    assert (refused.code, refused.model, refused.version) == ("selftest.mismatch", "m", "2.0")
    last = max(listener.of(Reported), key=lambda reported: reported.seq)
    assert (last.last_error_code, len(last.refused)) == ("selftest.mismatch", 1)
    (seqs,) = listener.seqs().values()
    assert sorted(seqs) == list(range(1, max(seqs) + 1))


def is_whole(listener):
    """Whether every seq of every boot has arrived."""
    return all(sorted(set(seqs)) == list(range(1, max(seqs) + 1)) for seqs in listener.seqs().values())


def test_broker_absent_then_present_loses_nothing(world, make_agent, listener):
    world.publish("1.0", seed=1)
    agent = make_agent(**settings(listener, window_s=0.2)).start()
    agent.wait_served("1.0")
    assert agent.infer([0, 0, 0, 0])[0] == 200
    waiting = agent.wait_status(lambda body: body["outbox_messages"] > 16)
    assert not waiting["is_broker_connected"]
    agent.process.send_signal(signal.SIGKILL)
    agent.process.wait()
    agent.start()
    agent.wait_served("1.0")
    assert agent.infer([0, 0, 0, 0])[0] == 200
    assert agent.status()["outbox_messages"] >= waiting["outbox_messages"]
    listener.start()
    agent.wait_status(lambda body: body["is_broker_connected"] and body["outbox_messages"] <= 1, what="the drained spool")
    agent.stop()
    wait_for(lambda: listener.of(Death), what="the goodbye")
    wait_for(lambda: is_whole(listener), what="every seq")
    assert len(listener.seqs()) == 2
    late = [batch for batch in listener.of(WindowBatch) if batch.is_late]
    assert max(len(batch.windows) for batch in late) > 1
    newest = listener.of(Birth)[-1].boot
    assert listener.of(Death)[-1].boot == newest
    assert listener.of(Reported)[-1].boot == newest


def test_broker_that_goes_and_comes_back(world, make_agent, listener):
    world.publish("1.0", seed=1)
    listener.start()
    agent = make_agent(**settings(listener, window_s=0.2)).start()
    agent.wait_served("1.0")
    agent.wait_status(lambda body: body["is_broker_connected"])
    listener.stop()
    agent.wait_status(lambda body: not body["is_broker_connected"] and body["outbox_messages"] > 3)
    assert agent.infer([0, 0, 0, 0])[0] == 200
    births = len(listener.of(Birth))
    listener.start()
    agent.wait_status(lambda body: body["is_broker_connected"] and body["outbox_messages"] <= 1, what="the drained spool")
    wait_for(lambda: len(listener.of(Birth)) > births, what="the new birth")
    agent.stop()
    wait_for(lambda: listener.of(Death), what="the goodbye")
    wait_for(lambda: is_whole(listener), what="every seq")
    assert len(listener.seqs()) == 1


def test_killed_agent_leaves_its_will(make_agent, listener):
    listener.start()
    agent = make_agent(**settings(listener)).start()
    wait_for(lambda: listener.of(Birth), what="the birth")
    agent.process.kill()
    agent.process.wait()
    wait_for(lambda: listener.of(Death), what="the will", seconds=15)
    (death,) = listener.of(Death)
    assert not death.is_clean
    assert death.boot == listener.of(Birth)[0].boot


def test_sketches_labels_and_samples_of_a_live_model(world, make_agent, listener):
    """A release with a reference profile: windows carry its sketches and the labels' score; redacted inputs come, too."""
    reference = np.random.default_rng(0).uniform(-1, 1, size=(6000, 4)).astype(np.float32)
    profile = build_profile({"x": reference}, {"y": reference[:, :3]}, scores="y")
    world.publish("1.0", seed=1, baseline=encode_json(profile))
    listener.start()
    sampling = {"per_day": 86_400 * 4, "redact": ["drop:x.0"], "k_min": 0}
    agent = make_agent(**settings(listener, samples=sampling)).start()
    agent.wait_served("1.0")
    ids = []
    for row in reference[:40]:
        status, _, body = agent.infer(row.tolist())
        assert status == 200
        ids.append((body["parameters"]["prediction_id"], int(np.argmax(body["outputs"][0]["data"]))))
    agent.infer([9.0, 0.0, 0.0, 0.0])
    labels = [
        {"prediction_id": name, "label": predicted if place else (predicted + 1) % 3}
        for place, (name, predicted) in enumerate(ids)
    ]
    labels.append({"prediction_id": "long-ago", "label": "b"})
    status, body = agent.post("/v2/models/m/labels", {"labels": labels})
    assert (status, body) == (202, {"counted": 40, "forwarded": 1})

    def score():
        models = [model for window in windows_of(listener) for model in window.models]
        return (
            sum(model.requests for model in models),
            sum(model.labelled for model in models),
            sum(model.right for model in models),
        )

    wait_for(lambda: score() == (41, 40, 39), what="requests and labels in the windows")
    models = [model for window in windows_of(listener) for model in window.models]
    assert {model.profile for model in models} == {zlib.crc32(encode_json(profile))}
    assert sum(model.sketched for model in models) == 41
    first = profile.streams[0]
    counts = np.zeros(len(first.edges) + 2, dtype=int)
    for model in models:
        if model.sketches:
            counts += decode_counts(model.sketches[0], cells=counts.size)
    assert counts.sum() == 41
    assert counts[-2] == 1, "9.0 is above everything in the reference"
    wait_for(lambda: listener.of(InputSample) or (agent.infer([0.5, 0.1, 0.1, 0.1]) and None), what="a sample")
    sample = listener.of(InputSample)[0]
    array = unpack_tensor(sample.tensors[0])
    assert np.isnan(array[0, 0])
    assert np.isfinite(array[0, 1:]).all()
    assert sample.redacted == ("drop:x.0",)
    (label,) = [label for label in listener.of(Label) if not label.is_counted]
    assert (label.prediction_id, label.label) == ("long-ago", "b")
    agent.stop()
    wait_for(lambda: listener.of(Death))
    wait_for(lambda: is_whole(listener), what="every seq")


def test_profile_that_cannot_be_read_keeps_no_model_from_serving(world, make_agent, listener):
    world.publish("1.0", seed=1, baseline=b"{no profile")
    listener.start()
    agent = make_agent(**settings(listener)).start()
    agent.wait_served("1.0")
    assert agent.infer([0.1, 0.2, 0.3, 0.4])[0] == 200
    wait_for(lambda: agent.logged("event=profile_unreadable"), what="the complaint")
    wait_for(lambda: [model for window in windows_of(listener) for model in window.models if model.requests], what="the window")


def test_full_spool_merges_old_windows_and_loses_nothing(world, make_agent, listener):
    world.publish("1.0", seed=1)
    agent = make_agent(**settings(listener, window_s=0.02, outbox_bytes=24_000)).start()
    agent.wait_served("1.0")
    for _ in range(30):
        assert agent.infer([0.1, 0.2, 0.3, 0.4])[0] == 200
    agent.wait_status(lambda body: body["uptime_s"] > 6)
    assert agent.status()["outbox_bytes"] <= 25_000
    listener.start()
    agent.wait_status(lambda body: body["is_broker_connected"] and body["outbox_messages"] < 5)
    agent.stop()
    wait_for(lambda: listener.of(Death), what="the goodbye")
    wait_for(lambda: is_whole(listener), what="every seq")
    merged = [window for window in windows_of(listener) if window.merged]
    assert merged
    assert not [event for event in listener.of(Event) if event.kind == "messages_dropped"]
    assert sum(values_of(window)["requests"] for window in windows_of(listener)) == 30
    latencies = LatencyHistogram()
    for window in windows_of(listener):
        latencies.merge(LatencyHistogram.decode(window.sketches[0]) if window.sketches else LatencyHistogram())
    assert latencies.count == 30
    assert len({model.model_digest for window in windows_of(listener) for model in window.models}) == 1
    assert sum(model.requests for window in windows_of(listener) for model in window.models) == 30
    answers = [decode_counts(model.sketches[0], cells=60) for window in windows_of(listener) for model in window.models]
    assert sum(map(sum, answers)) == 30
