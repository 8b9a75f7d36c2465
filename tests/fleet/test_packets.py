"""The MQTT codec: what goes in comes out, however it is cut; whatever else comes is one kind of error."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.fleet.packets import (
    ConnAck,
    ConnectOptions,
    Disconnect,
    Filter,
    PacketError,
    PacketReader,
    PingResponse,
    PubAck,
    Publish,
    SubAck,
    Will,
    describe_reason,
    encode_connect,
    encode_disconnect,
    encode_puback,
    encode_publish,
    encode_subscribe,
    encode_unsubscribe,
)

TOPICS = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
messages = st.builds(
    Publish,
    topic=TOPICS,
    payload=st.binary(max_size=400),
    packet_id=st.integers(1, 65_535),
    qos=st.just(1),
    is_retained=st.booleans(),
    is_duplicate=st.booleans(),
)


def to_bytes(item: Publish, version=5, expiry_s=0) -> bytes:
    return encode_publish(
        item.topic,
        item.payload,
        qos=item.qos,
        packet_id=item.packet_id,
        is_retained=item.is_retained,
        is_duplicate=item.is_duplicate,
        version=version,
        expiry_s=expiry_s,
    )


@given(st.lists(messages, max_size=5), st.sampled_from((4, 5)), st.integers(0, 9), st.lists(st.integers(1, 60), max_size=20))
def test_messages_come_out_as_they_went_in_however_they_are_cut(items, version, expiry_s, cuts):
    data = b"".join(to_bytes(item, version, expiry_s) for item in items)
    reader, found, at = PacketReader(version=version), [], 0
    for cut in [*cuts, len(data)]:
        found += reader.feed(data[at : at + cut])
        at += cut
    assert found == items


@settings(max_examples=300)
@given(st.binary(max_size=200), st.sampled_from((4, 5)))
def test_any_bytes_are_packets_or_our_error(data, version):
    with contextlib.suppress(PacketError):
        PacketReader(version=version).feed(data)


@settings(max_examples=300)
@given(messages, st.data())
def test_damaged_message_is_a_message_or_our_error(item, data):
    raw = bytearray(to_bytes(item, expiry_s=3))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(PacketError):
        PacketReader().feed(bytes(raw))


@pytest.mark.parametrize(
    ("raw", "version", "packet"),
    [
        ("200300 00 00", 5, ConnAck(reason=0)),
        ("20020101", 4, ConnAck(reason=0x84, is_session_present=True)),
        ("2009018706 1f0003 6e6f21", 5, ConnAck(reason=0x87, is_session_present=True, reason_text="no!")),
        ("200b000008 210064 2700100000", 5, ConnAck(reason=0, receive_maximum=100, maximum_packet_bytes=1 << 20)),
        ("40020007", 5, PubAck(packet_id=7)),
        ("4003000787", 5, PubAck(packet_id=7, reason=0x87)),
        ("900500010001 87", 5, SubAck(packet_id=1, reasons=(1, 0x87))),
        ("9003000101", 4, SubAck(packet_id=1, reasons=(1,))),
        ("d000", 5, PingResponse()),
        ("e000", 5, Disconnect()),
        ("e0018e", 5, Disconnect(reason=0x8E)),
        ("30090001610526000000 00", 5, Publish("a", b"")),
    ],
)
def test_packet_of_the_standard_is_read(raw, version, packet):
    assert PacketReader(version=version).feed(bytes.fromhex(raw)) == [packet]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("3405000161 0001", "QoS 2"),
        ("3206000161000000", "packet identifier"),
        ("30ffffffff7f", "more than four bytes"),
        ("30060003 61ff6200", "UTF-8"),
        ("3001 00", "without a topic"),
        ("3003 000961", "ends in its topic"),
        ("2006000003 ff0000", "property"),
        ("1000", "no broker sends that"),
        ("4100", "flags"),
    ],
)
def test_packet_that_breaks_the_standard_is_named(raw, words):
    with pytest.raises(PacketError, match=words) as caught:
        PacketReader().feed(bytes.fromhex(raw))
    assert caught.value.code == "mqtt.malformed"


def test_packet_that_is_too_long_is_refused_by_its_length():
    with pytest.raises(PacketError) as caught:
        PacketReader(max_bytes=1000).feed(bytes.fromhex("30e907"))
    assert caught.value.code == "mqtt.too_large"


def test_text_that_is_too_long_for_mqtt_is_refused():
    with pytest.raises(UsageError) as caught:
        encode_publish("a" * 70_000, b"")
    assert caught.value.code == "mqtt.too_large"


def test_connect_is_that_of_the_standard():
    options = ConnectOptions(
        client_id="a",
        is_clean_start=False,
        keep_alive_s=30,
        session_s=60,
        receive_maximum=9,
        username="u",
        password="p",
        will=Will(topic="t", payload=b"x", is_retained=True, delay_s=5),
    )
    expected = "10 2d 0004 4d515454 05 ec 001e 08 110000003c 210009 000161 05 1800000005 000174 000178 000175 000170"
    body = bytes.fromhex(expected)
    assert encode_connect(options)[2:] == body[2:]
    old = encode_connect(ConnectOptions(client_id="a", version=4))
    assert old == bytes.fromhex("100d 0004 4d515454 04 02 003c 000161")


def test_other_packets_are_those_of_the_standard():
    assert encode_subscribe(2, [Filter(pattern="a", retain_handling=1)]) == bytes.fromhex("8207 0002 00 000161 11")
    assert encode_subscribe(2, [Filter(pattern="a", qos=0)], version=4) == bytes.fromhex("8206 0002 000161 00")
    assert encode_unsubscribe(3, ["a"]) == bytes.fromhex("a206 0003 00 000161")
    assert encode_puback(258) == bytes.fromhex("40020102")
    assert encode_disconnect() == bytes.fromhex("e000")
    assert encode_disconnect(session_s=0) == bytes.fromhex("e007 00 05 1100000000")
    assert describe_reason(0x8E) == "0x8e session taken over"
