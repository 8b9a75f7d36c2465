"""Topics, codec and histogram: what every later version must keep reading."""

from __future__ import annotations

import contextlib
import math
import zlib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import ArtifactError, UsageError
from edgekit.schema.message import (
    Birth,
    Death,
    Event,
    Heartbeat,
    InputSample,
    Label,
    MetricSpec,
    ModelWindow,
    Reported,
    SampleTensor,
    SketchSpec,
    SlotReport,
    Window,
    WindowBatch,
)
from edgekit.telemetry.codec import MAX_BYTES, compress, decode, encode, pack_values, schema_crc, unpack_values
from edgekit.telemetry.histogram import PER_OCTAVE, LatencyHistogram, bounds_of, index_of
from edgekit.telemetry.topics import VERBS, parse_topic, subscription, topic

FIXTURES = Path(__file__).parent / "fixtures"
METRICS = (MetricSpec(name="requests", kind="count"), MetricSpec(name="latency_p50_ms", unit="ms", kind="quantile"))
SKETCHES = (SketchSpec(name="latency_ms", unit="ms", bins="log2:3"),)
MESSAGES = {
    "birth": Birth(boot=2**62 + 1, seq=1, time_ms=1_790_000_000_000, metrics=METRICS, sketches=SKETCHES, labels={"room": "1"}),
    "death": Death(boot=2**62 + 1, is_clean=True, time_ms=5),
    "heartbeat": Heartbeat(boot=7, seq=9, time_ms=5, outbox=2),
    "windows": WindowBatch(
        boot=7,
        windows=(
            Window(seq=2, start_ms=1, duration_ms=60_000, values=pack_values([1.0, math.nan]), sketches=(b"\x01\x02\x03",)),
        ),
        is_late=True,
        schema=schema_crc(METRICS, SKETCHES),
    ),
    "event": Event(boot=7, seq=3, time_ms=5, kind="install_refused", detail="d", code="selftest.mismatch", fields={"x": 1.5}),
    "merged": WindowBatch(
        boot=7,
        windows=(
            Window(
                seq=9,
                start_ms=1,
                duration_ms=600_000,
                values=pack_values([1.0, math.nan]),
                sketches=(b"\x01\x02\x03",),
                models=(
                    ModelWindow(
                        model_digest="ab" * 6,
                        requests=4,
                        samples=4,
                        sketched=3,
                        sketches=(b"\x03", b""),
                        verdicts={"clip x": 2},
                        labelled=2,
                        right=1,
                        profile=77,
                    ),
                ),
                merged=(2, 7, 9, 9),
            ),
        ),
    ),
    "label": Label(boot=7, seq=5, time_ms=5, model_digest="ab" * 6, prediction_id="p-1", label="cat", predicted="dog"),
    "sample": InputSample(
        boot=7,
        seq=6,
        time_ms=5,
        model_digest="ab" * 6,
        prediction_id="p-1",
        tensors=(SampleTensor(name="x", dtype="uint8", shape=(2,), data=b"ab"),),
        redacted=("blur:x:2",),
    ),
    "reported": Reported(boot=7, seq=4, time_ms=5, slots=(SlotReport(name="a", status="active", version="1"),), active="a"),
}


@pytest.mark.parametrize("name", list(MESSAGES))
def test_message_of_the_first_release_is_read_for_ever(name):
    """The files in fixtures/ were written by version 0.1.0 and never change."""
    assert decode((FIXTURES / f"{name}.msgpack").read_bytes()) == MESSAGES[name]


@pytest.mark.parametrize("message", MESSAGES.values(), ids=list(MESSAGES))
def test_later_field_is_ignored_and_missing_field_is_its_default(message):
    items = msgspec.msgpack.decode(encode(message))
    assert decode(msgspec.msgpack.encode([*items, "later", 1])) == message
    shorter = decode(msgspec.msgpack.encode(items[:-1]))
    assert type(shorter) is type(message)


@given(st.binary(max_size=300))
def test_garbage_is_our_error(data):
    with contextlib.suppress(ArtifactError):
        decode(data)


@given(st.sampled_from(list(MESSAGES)), st.data())
def test_changed_message_is_a_message_or_our_error(name, data):
    """Bytes that are nearly right reach further into the decoder than noise does."""
    original = encode(MESSAGES[name])
    at = data.draw(st.integers(0, len(original) - 1))
    changed = original[:at] + data.draw(st.binary(max_size=3)) + original[at + data.draw(st.integers(0, 3)) :]
    with contextlib.suppress(ArtifactError):
        assert type(decode(changed)) in {type(message) for message in MESSAGES.values()}


def test_too_large_is_refused_before_decoding():
    with pytest.raises(ArtifactError, match="largest"):
        decode(b"\x00" * (MAX_BYTES + 1))


def test_deep_nesting_is_refused():
    with pytest.raises(ArtifactError):
        decode(b"\x91" * 100_000)


@given(st.lists(st.floats(width=32)))
def test_values_survive(values):
    unpacked = unpack_values(pack_values(values))
    assert len(unpacked) == len(values)
    assert all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(values, unpacked, strict=True))


def test_values_too_large_for_float32_become_infinite():
    assert unpack_values(pack_values([1e300, -1e300])) == [math.inf, -math.inf]
    with pytest.raises(ArtifactError):
        unpack_values(b"123")


def test_window_of_20_metrics_costs_about_100_bytes():
    window = Window(
        seq=100_000, start_ms=1_790_000_000_000, duration_ms=60_000, values=pack_values([1.5] * 20), model_digest="ab" * 6
    )
    assert len(encode(WindowBatch(boot=2**62, windows=(window,), schema=2**31))) <= 150


def test_schema_crc_sees_order_and_kind_of_bins():
    assert schema_crc(METRICS, SKETCHES) != schema_crc(METRICS[::-1], SKETCHES)
    assert schema_crc(METRICS, SKETCHES) != schema_crc(METRICS, ())


@pytest.mark.parametrize("verb", VERBS)
def test_topic_survives(verb):
    text = topic("lab-1", "pi_2", verb)
    assert parse_topic(text) == ("lab-1", "pi_2", verb)
    assert text.count("/") == 4


@pytest.mark.parametrize("name", ["", "A", "a/b", "a+", "#", "$x", "a" * 64, "-a", "a\n", "ä"])
def test_name_refused(name):
    with pytest.raises(UsageError):
        topic(name, "pi", "w")
    with pytest.raises(UsageError):
        topic("lab", name, "w")


@pytest.mark.parametrize(
    "text", ["", "ek/1/lab/pi", "ek/2/lab/pi/w", "ek/1/lab/pi/zz", "ek/1/LAB/pi/w", "ek/1/lab/pi/w/x", "$SYS/x"]
)
def test_foreign_topic_refused(text):
    with pytest.raises(ArtifactError):
        parse_topic(text)


def test_subscription_is_shared_on_request():
    assert subscription("w") == "ek/1/+/+/w"
    assert subscription("w", group="g") == "$share/g/ek/1/+/+/w"


latencies = st.floats(1e-4, 1e9)


@given(st.lists(latencies, min_size=1), st.floats(0, 1))
def test_quantile_is_within_its_bucket(values, q):
    bins = LatencyHistogram()
    for value in values:
        bins.add(value)
    exact = sorted(values)[min(len(values) - 1, max(0, math.ceil(q * len(values)) - 1))]
    low, high = bounds_of(index_of(exact))
    assert low * 0.999 <= bins.quantile(q) <= high * 1.001


@given(st.lists(latencies), st.lists(latencies))
def test_merge_equals_counting_all(left, right):
    def fill(values):
        bins = LatencyHistogram()
        for value in values:
            bins.add(value)
        return bins

    merged = fill(left)
    merged.merge(fill(right))
    assert merged == fill(left + right)
    assert merged.count == len(left) + len(right)
    assert LatencyHistogram.decode(merged.encode()) == merged


@given(st.binary(max_size=60))
def test_histogram_garbage_is_our_error(data):
    with contextlib.suppress(ArtifactError):
        assert LatencyHistogram.decode(data).count >= 0


def test_histogram_count_that_no_double_holds_is_refused():
    with pytest.raises(ArtifactError):
        LatencyHistogram.decode(LatencyHistogram({3: 2**53 + 1}).encode())


@given(st.integers(-100, 200))
def test_bucket_bounds_hold_their_upper_end(index):
    low, high = bounds_of(index)
    assert index_of(high * 0.9999) == index
    assert index_of(low * 1.0001) == index
    assert high / low == pytest.approx(2 ** (1 / PER_OCTAVE))


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-300, 1e300, math.inf])
def test_extremes_are_counted(value):
    bins = LatencyHistogram()
    bins.add(value)
    bins.add(math.nan)
    assert bins.count == 1
    assert LatencyHistogram.decode(bins.encode()) == bins


def test_message_travels_compressed_where_that_is_worth_it():
    windows = tuple(
        Window(seq=n, start_ms=0, duration_ms=60_000, values=bytes(84), sketches=(b"\x01" * 30,)) for n in range(1, 31)
    )
    plain = encode(WindowBatch(boot=7, windows=windows))
    packed = compress(plain)
    assert len(packed) < len(plain) / 2
    assert decode(packed) == decode(memoryview(packed)) == decode(plain)
    small = encode(Death(boot=7))
    assert compress(small) is small


@given(st.binary(max_size=300))
def test_any_compressed_bytes_are_a_message_or_refused(data):
    for attempt in (b"\x78" + data, zlib.compress(data), zlib.compress(encode(Death(boot=7))) + data):
        try:
            decode(attempt)
        except ArtifactError as error:
            assert error.code == "telemetry.malformed"  # noqa: PT017 - only some bytes are refused


def test_small_message_does_not_become_a_large_one():
    with pytest.raises(ArtifactError, match="zlib"):
        decode(zlib.compress(bytes(MAX_BYTES * 50)))
