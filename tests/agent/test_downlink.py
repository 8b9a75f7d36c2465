"""What the broker delivers to the device: filters, retained messages, requests with answers, and a listener that fails."""

from __future__ import annotations

import asyncio
import time

import paho.mqtt.client as paho
import pytest
from paho.mqtt import publish
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edgekit.agent.config import AgentConfig
from edgekit.agent.courier import Courier
from edgekit.agent.journal import Journal
from edgekit.agent.outbox import Outbox
from edgekit.agent.plan import DeviceFacts
from edgekit.fleet.broker import EmbeddedBroker
from tests.agent.world import free_port

FACTS = DeviceFacts(arch="x", cpu="", isa=(), cores=1, ram_mb=1, os="", runtimes={})


@pytest.fixture
def broker():
    made = EmbeddedBroker(free_port())
    made.start()
    yield made
    made.stop()


@pytest.fixture
def office(broker):
    """Somebody else on the same broker, and what was answered."""
    client = paho.Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
    answers = []
    client.on_message = lambda _c, _d, message: answers.append((message.payload, message.properties.CorrelationData))
    client.connect("127.0.0.1", broker.port)
    client.loop_start()
    client.subscribe("office/answers", qos=1)
    yield client, answers
    client.disconnect()
    client.loop_stop()


async def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def run(tmp_path, broker, story):
    async def main():
        outbox = Outbox(tmp_path / "o.db", max_bytes=1 << 20)
        journal = Journal(outbox, AgentConfig(device="d", broker=f"mqtt://127.0.0.1:{broker.port}"), "0")
        courier = Courier(outbox, journal, lambda: journal.birth(FACTS, runtime="", runtime_version=""))
        try:
            await story(courier)
        finally:
            await courier.stop()
            outbox.close()

    asyncio.run(main())


def test_request_is_heard_and_answered(tmp_path, broker, office):
    client, answers = office
    client.publish("ek/1/default/d/des", b"kept", qos=1, retain=True).wait_for_publish(5)

    async def story(courier):
        heard, failed = [], []
        courier.listen("ek/1/default/d/des", heard.append)
        courier.start()
        await until(lambda: heard)
        assert (heard[0].payload, heard[0].is_retained, heard[0].response_topic) == (b"kept", True, "")

        def fail(message):
            failed.append(message)
            raise RuntimeError("a bug in a listener")

        courier.listen("sensors/+/raw", fail)
        courier.listen("ek/1/default/d/cmd", lambda m: courier.answer(m.response_topic, b"yes", correlation=m.correlation))
        await asyncio.sleep(0.2)
        properties = Properties(PacketTypes.PUBLISH)
        properties.ResponseTopic, properties.CorrelationData = "office/answers", b"\x07"
        client.publish("sensors/hall/raw", b"x", qos=1)
        client.publish("ek/1/default/other/cmd", b"not for us", qos=1)
        client.publish("ek/1/default/d/cmd", b"do", qos=1, properties=properties)
        await until(lambda: answers)
        assert answers == [(b"yes", b"\x07")]
        assert [message.topic for message in failed] == ["sensors/hall/raw"]

    run(tmp_path, broker, story)


def test_filters_are_asked_for_again_on_the_next_connection(tmp_path, broker):
    async def story(courier):
        heard = []
        courier.listen("ek/1/default/d/cmd", heard.append)
        assert courier.answer("office/answers", b"nobody is there yet") is False
        courier.start()
        await until(lambda: courier.is_connected)
        broker.stop()  # it forgets every session
        broker.start()
        for _ in range(50):
            await asyncio.sleep(0.2)
            say = {"hostname": "127.0.0.1", "port": broker.port, "qos": 1, "protocol": MQTTProtocolVersion.MQTTv5}
            await asyncio.to_thread(publish.single, "ek/1/default/d/cmd", b"again", **say)
            if heard:
                break
        assert heard
        assert {message.payload for message in heard} == {b"again"}

    run(tmp_path, broker, story)
