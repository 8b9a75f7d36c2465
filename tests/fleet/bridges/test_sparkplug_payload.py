"""Our protobuf beside the reference implementation's."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sparkplug_world import PAYLOAD, parse, value_of

from edgekit.errors import ArtifactError
from edgekit.fleet.bridges.payload import DataType, Metric, Payload, decode_payload, encode_payload

INTS = {
    DataType.INT8: (-128, 127), DataType.INT16: (-(2**15), 2**15 - 1), DataType.INT32: (-(2**31), 2**31 - 1),
    DataType.INT64: (-(2**63), 2**63 - 1), DataType.UINT8: (0, 255), DataType.UINT16: (0, 2**16 - 1),
    DataType.UINT32: (0, 2**32 - 1), DataType.UINT64: (0, 2**64 - 1),
}  # fmt: skip
VALUES = st.one_of(
    *[st.tuples(st.just(kind), st.integers(low, high)) for kind, (low, high) in INTS.items()],
    st.tuples(st.just(DataType.FLOAT), st.floats(width=32, allow_nan=False)),
    st.tuples(st.just(DataType.DOUBLE), st.floats(allow_nan=False)),
    st.tuples(st.just(DataType.BOOLEAN), st.booleans()),
    st.tuples(st.just(DataType.STRING), st.text(max_size=40)),
    st.tuples(st.just(DataType.BYTES), st.binary(max_size=40)),
    st.tuples(st.sampled_from(DataType), st.none()),
)
STAMP = st.one_of(st.none(), st.integers(0, 2**63))
METRICS = st.builds(
    lambda typed, name, alias, stamp: Metric(name=name, alias=alias, timestamp=stamp, datatype=typed[0], value=typed[1]),
    VALUES,
    st.text(min_size=1, max_size=20),
    STAMP,
    STAMP,
)
PAYLOADS = st.builds(
    lambda metrics, stamp, seq: Payload(timestamp=stamp, metrics=tuple(metrics), seq=seq),
    st.lists(METRICS, max_size=5),
    STAMP,
    st.one_of(st.none(), st.integers(0, 255)),
)


@given(PAYLOADS)
def test_reference_reads_what_we_write(payload):
    found = parse(encode_payload(payload))
    assert (found.timestamp if found.HasField("timestamp") else None) == payload.timestamp
    assert (found.seq if found.HasField("seq") else None) == payload.seq
    for theirs, ours in zip(found.metrics, payload.metrics, strict=True):
        assert (theirs.name, theirs.datatype) == (ours.name, ours.datatype)
        bits = 64 if ours.datatype in {DataType.INT64, DataType.UINT64} else 32
        expected = ours.value % 2**bits if type(ours.value) is int else ours.value
        assert value_of(theirs) == expected


@given(PAYLOADS)
def test_we_read_what_the_reference_writes(payload):
    data = parse(encode_payload(payload)).SerializeToString()
    found = decode_payload(data)
    assert (found.timestamp, found.seq, len(found.metrics)) == (payload.timestamp, payload.seq, len(payload.metrics))
    assert [metric.name for metric in found.metrics] == [metric.name for metric in payload.metrics]


@given(st.binary(max_size=200))
def test_garbage_raises_our_error_or_nothing(data):
    with contextlib.suppress(ArtifactError):
        decode_payload(data)


def test_fields_that_are_not_known_are_passed_over():
    data = PAYLOAD(timestamp=5, uuid="x", body=b"abc")
    data.metrics.add(name="m", is_historical=True, float_value=1.5)
    found = decode_payload(data.SerializeToString())
    assert found.timestamp == 5
    assert math.isclose(found.metrics[0].value, 1.5)


@pytest.mark.parametrize(
    ("kind", "value"), [(DataType.INT32, "x"), (DataType.DOUBLE, "1"), (DataType.UNKNOWN, 1), (DataType.BYTES, "x")]
)
def test_value_that_its_type_cannot_hold_is_refused(kind, value):
    with pytest.raises(ArtifactError):
        encode_payload(Payload(metrics=(Metric(name="m", datatype=kind, value=value),)))


def test_too_large_is_refused():
    with pytest.raises(ArtifactError):
        decode_payload(b"\0" * (1 << 20 | 1))
