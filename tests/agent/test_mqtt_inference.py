"""Messages that are run through a model, over a real broker and a real agent."""

from __future__ import annotations

import json

import numpy as np
import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edgekit.agent.config import AgentConfig, InferenceTopic, check_config
from edgekit.agent.mqtt import Incoming
from edgekit.agent.mqtt_inference import MAX_WAITING, InferenceDesk, fill_topic
from edgekit.errors import UsageError
from edgekit.fleet.broker import EmbeddedBroker
from tests.agent.world import build_model, free_port, wait_for

X = np.array([[0.1, 0.2, 0.3, 0.4]], dtype=np.float32)


@pytest.fixture
def broker():
    made = EmbeddedBroker(free_port())
    made.start()
    yield made
    made.stop()


@pytest.fixture
def sensor(broker):
    """Somebody who publishes, and hears the answers."""
    client = paho.Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
    client.answers = []

    def heard(_client, _data, message):
        client.answers.append((message.topic, json.loads(message.payload), getattr(message.properties, "CorrelationData", b"")))

    client.on_message = heard
    client.connect("127.0.0.1", broker.port)
    client.loop_start()
    for topic in ("predictions/#", "mine/answers"):
        client.subscribe(topic, qos=1)
    yield client
    client.disconnect()
    client.loop_stop()


def test_messages_in_answers_out(world, make_agent, broker, sensor, tmp_path):
    world.publish("1.0", seed=1)
    topics = [
        {"subscribe": "sensors/+/frame", "publish": "predictions/{1}", "format": "tensor"},
        {"subscribe": "requests", "format": "v2"},
    ]
    agent = make_agent(broker=f"mqtt://127.0.0.1:{broker.port}", socket=str(tmp_path / "s"), inference_topics=topics).start()
    agent.wait_served("1.0")
    expected = X @ build_model(1)[1]

    def answered(topic):
        sensor.publish("sensors/hall/frame", X.tobytes(), qos=1)
        return [body for where, body, _ in sensor.answers if where == topic]

    body = wait_for(lambda: answered("predictions/hall"), what="an answer")[0]
    assert np.allclose(body["outputs"][0]["data"], expected.ravel(), atol=1e-4)
    assert body["parameters"]["model_digest"].startswith("sha256:")

    properties = Properties(PacketTypes.PUBLISH)
    properties.ResponseTopic, properties.CorrelationData = "mine/answers", b"\x09"
    request = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": X.ravel().tolist()}], "id": "r1"}
    sensor.publish("requests", json.dumps(request), qos=1, properties=properties)
    wait_for(lambda: [1 for where, _, _ in sensor.answers if where == "mine/answers"], what="the response")
    _, body, correlation = next(each for each in sensor.answers if each[0] == "mine/answers")
    assert (body["id"], correlation) == ("r1", b"\x09")

    sensor.publish("sensors/wet/frame", b"short", qos=1)
    wait_for(lambda: [1 for where, _, _ in sensor.answers if where == "predictions/wet"], what="the refusal")
    body = next(each[1] for each in sensor.answers if each[0] == "predictions/wet")
    assert "needs 16 B" in body["error"]

    world.publish("2.0", seed=2)
    wait_for(
        lambda: [b for b in answered("predictions/hall") if b.get("model_version") == "2.0"], what="the new release's answer"
    )
    assert all("outputs" in body for where, body, _ in sensor.answers if where == "predictions/hall"), "none failed in the swap"


def test_oldest_message_goes_when_the_model_is_slow():
    desk = InferenceDesk((), ("127.0.0.1", 1), "", lambda *_a, **_k: True)
    topic = InferenceTopic(subscribe="a")
    for number in range(MAX_WAITING + 5):
        desk.hear(topic, Incoming(topic="a", payload=str(number).encode()))
    assert desk.dropped == 5
    assert desk._waiting[0][1].payload == b"5"


def test_agent_that_cannot_be_asked_is_answered_with_that():
    import asyncio

    bodies = []

    def send(_where, body, *, correlation=b""):
        bodies.append((json.loads(body), correlation))
        return True

    async def story():
        desk = InferenceDesk((), ("127.0.0.1", free_port()), "", send)
        desk.start()
        desk.hear(
            InferenceTopic(subscribe="a", model="m"), Incoming(topic="a", payload=b"", response_topic="r", correlation=b"7")
        )
        for _ in range(500):
            if bodies:
                break
            await asyncio.sleep(0.02)
        assert (desk.failed, desk.answered) == (1, 0)
        desk.stop()

    asyncio.run(story())
    assert bodies[0][0]["code"] == "agent.unreachable"
    assert bodies[0][1] == b"7"


def test_wildcards_fill_the_answers_topic():
    topic = InferenceTopic(subscribe="site/+/cam/+/raw", publish="out/{2}/{1}")
    assert fill_topic(topic, "site/a/cam/b/raw") == "out/b/a"
    assert fill_topic(InferenceTopic(subscribe="a"), "a") == ""


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"subscribe": "a/#/b"}, "topic filter"),
        ({"subscribe": "a+/b"}, "topic filter"),
        ({"subscribe": "a", "model": "other"}, "none of this agent's"),
        ({"subscribe": "a", "publish": "b/+"}, "wildcard"),
        ({"subscribe": "a/#", "publish": "a/out"}, "come back in"),
        ({"subscribe": "+/+", "publish": "out/{1}"}, "come back in"),
    ],
)
def test_topics_that_cannot_work_are_refused(changes, text):
    config = AgentConfig(device="d", broker="mqtt://127.0.0.1", model="m", inference_topics=(InferenceTopic(**changes),))
    with pytest.raises(UsageError, match=text):
        check_config(config)
    with pytest.raises(UsageError, match="no broker"):
        check_config(AgentConfig(device="d", model="m", inference_topics=(InferenceTopic(subscribe="a"),)))
